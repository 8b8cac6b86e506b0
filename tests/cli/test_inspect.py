"""`linearize inspect`: JSON and tables, --why, --stage, --save-plan, exit codes."""

import json
import re
from pathlib import Path

from linearize.plan import Plan
from tests.cli.conftest import Run, assert_one_error

SITE_KEYS = {
    "index", "module", "status", "reason", "heads", "kv_heads", "head_dim", "mask", "extras", "plan",
    "positions", "projections",
}  # fmt: skip
DILATED = "plain_model_of_a_user:make_dilated"


def test_json_of_a_matched_model(run: Run, llama_dir: Path) -> None:
    result = run("inspect", llama_dir, "--json", "--recipe", "lolcats{window=16}")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["model"] == "LlamaForCausalLM"
    assert found["captured_by"] == "torch.export"
    assert found["nodes"] > 50
    assert [set(site) for site in found["sites"]] == [SITE_KEYS] * 2
    first = found["sites"][0]
    assert (first["index"], first["module"], first["status"]) == (0, "model.layers.0.self_attn", "matched")
    assert (first["heads"], first["kv_heads"], first["head_dim"], first["mask"]) == (4, 2, 8, "causal")
    assert first["plan"].startswith("lolcats{window=16")
    assert "gqa" in first["extras"]


def test_json_of_a_model_with_a_refused_attention_and_exit_code_2(run: Run, plain_module: Path) -> None:
    result = run("inspect", DILATED, "--json")
    assert result.exit_code == 2
    matched, refused = json.loads(result.stdout)["sites"]
    assert (matched["status"], matched["reason"], matched["plan"]) == ("matched", "", None)
    assert refused["status"] == "refused"
    assert "mask" in refused["reason"]
    assert refused["heads"] is None


def test_the_table_says_what_was_refused_and_why_below(run: Run, plain_module: Path) -> None:
    result = run("inspect", DILATED, "--recipe", "window")
    assert result.exit_code == 2
    assert "1 of 2 attentions matched" in result.stdout
    assert "window{window=64" in result.stdout
    assert "site 1 refused: " in result.stdout
    assert "--why 1" in result.stdout


def test_why_of_a_refused_site_shows_nodes_and_source_line(run: Run, plain_module: Path) -> None:
    result = run("inspect", DILATED, "--why", 1)
    assert result.exit_code == 2
    assert "refused" in result.stdout
    assert "scaled_dot_product_attention" in result.stdout
    assert "plain_model_of_a_user.py:" in result.stdout


def test_why_of_a_matched_site_shows_what_was_established(run: Run, plain_module: Path) -> None:
    result = run("inspect", "plain_model_of_a_user:make", "--why", 0, "--recipe", "lolcats")
    assert result.exit_code == 0
    for part in ("matched", "4 query, 4 key-value", "causal", "fused-qkv", "attentions.0.qkv", "lolcats{window=64"):
        assert part in result.stdout


def test_why_of_a_site_that_is_not_there_is_one_error(run: Run, plain_module: Path) -> None:
    result = run("inspect", "plain_model_of_a_user:make", "--why", 5)
    assert_one_error(result, "no site 5", "has 1")


def test_stage_prints_the_program_after_a_pass_or_a_stage(run: Run, plain_module: Path) -> None:
    by_pass = run("inspect", "plain_model_of_a_user:make", "--stage", "raise_attention")
    assert by_pass.exit_code == 0
    assert "linearize.attention(" in by_pass.stdout
    assert "# after raise_attention" in by_pass.stdout
    by_stage = run("inspect", "plain_model_of_a_user:make", "--recipe", "lolcats", "--stage", "lower")
    assert "linearize.hybrid_ring(" in by_stage.stdout
    assert "def Model(input_ids" in by_stage.stdout


def test_an_unknown_stage_is_one_error_that_lists_them(run: Run, plain_module: Path) -> None:
    result = run("inspect", "plain_model_of_a_user:make", "--stage", "nope")
    assert_one_error(result, "capture", "match_attention", "raise_attention", "--recipe")


def test_an_unknown_recipe_is_one_error_before_the_model_is_loaded(run: Run) -> None:
    assert_one_error(run("inspect", "/nowhere", "--recipe", "nope"), "no recipe named 'nope'", "lolcats")


def test_a_saved_plan_can_be_read_back(run: Run, plain_module: Path) -> None:
    result = run("inspect", DILATED, "--recipe", "lolcats", "--save-plan", plain_module / "plan.json")
    assert result.exit_code == 2
    assert [entry.mixer for entry in Plan.load(plain_module / "plan.json").entries] == ["lolcats"]


def test_saving_a_plan_needs_a_recipe(run: Run) -> None:
    assert_one_error(run("inspect", "demo", "--save-plan", "plan.json"), "--recipe")


def test_a_model_without_attention_says_so_and_is_no_failure(run: Run, plain_module: Path) -> None:
    (plain_module / "recurrent_model_of_a_user.py").write_text(
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)\n"
        "    def forward(self, ids):\n"
        "        return self.head(self.embed(ids).cumsum(1))\n"
    )
    result = run("inspect", "recurrent_model_of_a_user:Model")
    assert result.exit_code == 0, result.output
    assert "no softmax attention" in result.stdout


def test_a_page_is_written_of_a_source_and_of_what_it_was_compiled_to(
    run: Run, llama_dir: Path, compiled_dir: Path, tmp_path: Path
) -> None:
    source, compiled = tmp_path / "source.html", tmp_path / "compiled.html"
    assert run("inspect", llama_dir, "--recipe", "window", "--html", source).exit_code == 0
    result = run("inspect", compiled_dir, "--html", compiled)
    assert result.exit_code == 0, result.output
    assert f"wrote {compiled}" in result.stdout.replace("\n", "")
    assert {'data-graph="before"', 'data-graph="after"'} <= set(re.findall(r'data-graph="\w+"', source.read_text()))
    assert set(re.findall(r'data-graph="\w+"', compiled.read_text())) == {'data-graph="after"'}


def test_pipes_print_one_form_alone(run: Run, llama_dir: Path, compiled_dir: Path, tmp_path: Path) -> None:
    assert run("inspect", llama_dir, "--dot").stdout.startswith('digraph "LlamaForCausalLM" {')
    assert run("inspect", compiled_dir, "--svg").stdout.startswith("<svg ")
    assert run("inspect", llama_dir, "--python").stdout.startswith("def LlamaForCausalLM(input_ids")
    assert_one_error(run("inspect", llama_dir, "--dot", "--svg"), "choose one of --html, --dot, --svg and --python")
    assert_one_error(run("inspect", llama_dir, "--html", tmp_path), "it is a directory, or in none")
