"""`linearize plan`: a plan on disk that compile takes, what it prints, and what it refuses before working."""

from pathlib import Path

import pytest

import linearize
from linearize.plan import Plan
from tests.cli.conftest import Run, assert_one_error

FAST = ("--tokens", 64, "--length", 32, "--context", "256", "--target", "h200", "--measurements", 2, "--quiet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


def test_it_writes_a_plan_that_compiles_and_draws_the_curve(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    plan, svg = tmp_path / "plan.json", tmp_path / "curve.svg"
    result = run(
        "plan", llama_dir, *FAST, "--budget", "70%", "-o", plan, "--pareto", svg, "--pin", "1=keep", "--never", "drop"
    )
    assert result.exit_code == 0, result.output
    for text in ("state", "loss, KL", "measured", "decoding on h200", "pinned"):
        assert text in result.stdout
    written = Plan.load(plan)
    assert written.entry(1).mixer == "keep"
    assert written.figures is not None
    assert written.figures.measured_loss is not None
    assert svg.read_text().startswith("<svg")
    assert "auto" in svg.read_text()
    assert run("compile", llama_dir, "-o", tmp_path / "out", "--plan", plan, "--tokens", 0, "-q").exit_code == 0
    assert linearize.load(tmp_path / "out").state_bytes(1, 256) == written.figures.state_bytes


def test_what_an_export_does_not_take_is_left_out_and_named(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    result = run("plan", llama_dir, *FAST, "--budget", "70%", "-o", plan, "--exports", "genai")
    assert result.exit_code == 0, result.output
    for mixer in ("mla", "keep"):
        assert f"left out: {mixer}: onnxruntime-genai cannot carry" in " ".join(result.stderr.split())
    written = Plan.load(plan)
    assert "keep" not in str(written.entries)
    assert written.figures is not None
    assert written.figures.exports == ("genai",)
    result = run("plan", llama_dir, *FAST, "--exports", "genai", "--pin", "1=keep")
    assert_one_error(result, "site 1 (model.layers.1.self_attn): the pin is refused by an export that is wished for")


def test_a_model_that_stays_on_disk_is_planned_from_its_directory(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    text, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text("def main():\n    return 0\n" * 40)
    result = run("plan", llama_dir, *FAST, "--streaming", "--data", text, "--budget", "50%", "-o", plan)
    assert result.exit_code == 0, result.output
    assert "scoring block by block needs about" in result.stderr
    assert "to second order, from gradients" in " ".join(result.stdout.split())
    figures = Plan.load(plan).figures
    assert figures is not None
    assert (figures.estimate, figures.measured_loss is None) == ("second order", False)
    assert_one_error(run("plan", llama_dir, *FAST, "--streaming"), "stays on disk is not sampled")
    assert_one_error(run("plan", llama_dir, *FAST, "--memory", "much"), "is no amount of memory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "much"), "cannot read the budget 'much'"),
        (("--context", "far"), "cannot read the context 'far'"),
        (("--pin", "0:keep"), "cannot read the pin '0:keep'"),
        (("--pin", "9=keep"), "site 9 cannot be pinned: the model's matched sites are [0]"),
        (("--never", "dorp"), "no mixer named 'dorp'"),
        (("--add", "citrsu{keep=3}"), "no mixer named 'citrsu'"),
        (("--exports", "gguf"), "no way of exporting is named 'gguf'; there are onnx, portable, genai"),
        (("--target", "gpu"), "no target 'gpu'"),
        (("--pareto", "curve.pdf"), "--pareto draws .svg or .html"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, plain_module: Path, arguments: tuple[str, str], message: str) -> None:
    result = run("plan", "plain_model_of_a_user:make", "--target", "h200", "--quiet", *arguments)
    assert_one_error(result, message)


def test_an_edited_plan_that_is_wrong_names_its_line(run: Run, plain_module: Path) -> None:
    model = "plain_model_of_a_user:make"
    assert run("inspect", model, "--recipe", "lolcats", "--save-plan", "plan.json").exit_code == 0
    path = Path("plan.json")
    path.write_text(path.read_text().replace('"mixer": "lolcats"', '"mixer": "locats"'))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "locats" in text)
    result = run("compile", model, "-o", "out", "--plan", "plan.json", "--tokens", 0)
    assert_one_error(result, f"plan.json line {line}: ")
