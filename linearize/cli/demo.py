"""`linearize demo`: the main job on the embedded model, start to end, every figure measured on the spot."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli._demo_figures import Figures, markdown_page, model_figure, site_figure, speed_figure
from linearize.cli._shell import out

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from linearize.calibration.recall import RecallBatch
    from linearize.program import Program
    from linearize.recipe import Recipe
    from linearize.runtime.model import LinearizedModel

RECIPE = "auto"
BESIDE = "lolcats{window=32}"  # the fitted rival that the figures stand beside
NO_WINDOW = 32  # of the baseline and of recall, for a recipe that has no window
LENGTH = 512
PROMPT = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __repr__(self):
        return f"Point({self.x}, {self.y})"

class Circle:
    def __init__(self,"""


@dataclass(frozen=True)
class Sizes:
    """How much the demo does."""

    tokens: int
    fit_length: int
    text_rows: int
    recall_rows: int
    site_rows: int
    contexts: tuple[int, ...]
    steps: int
    new_tokens: int


FULL = Sizes(65_536, 512, 16, 8, 8, (512, 4096, 16_384), 24, 48)
QUICK = Sizes(1024, 128, 2, 1, 2, (512,), 3, 8)


@dataclass
class Data:
    """What models are measured on: text int64 [B, T], recall sequences, and rows of both for the sites."""

    text: list[Tensor]
    recall: list[RecallBatch]
    edges: list[int]
    sites: list[Tensor]


def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Keep the results: DIR/compiled and DIR/onnx.")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Another recipe, with its window.")] = RECIPE,
    tokens: Annotated[int | None, typer.Option(min=0, help="Tokens to fit on instead of 65,536.")] = None,
    seed: Annotated[int, typer.Option(help="Of samples, of the fit, and of the recall sequences.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every figure to this file.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write a page like docs/figures.md.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same steps with small numbers.")] = False,
) -> None:
    """Do the main job on the embedded model: compile, measure, export, generate.

    Shows an attention before and after, compiles to a fixed-size state, exports it to ONNX.

    Compares errors, perplexity and recall with a window and with a fitted LoLCATs, speed and memory with the source.
    About two minutes on two cores.
    """
    from linearize.files import check_new_directory, write_atomically
    from linearize.recipe import Recipe

    sizes = QUICK if quick else FULL
    policies = [
        policy.model_copy(update={"fit": policy.fit.model_copy(update={"length": sizes.fit_length})})
        for policy in (Recipe.load(recipe), Recipe.load(BESIDE))
    ]
    if output is not None:
        check_new_directory(output)
    with tempfile.TemporaryDirectory(prefix="linearize-demo-") as scratch:
        budget = sizes.tokens if tokens is None else tokens
        job = Demo(sizes, policies[0], policies[1], budget, seed, output or Path(scratch, "out"))
        job.figures.quick = quick
        job.run()
    if json_file is not None:
        write_atomically(json_file, json.dumps(asdict(job.figures), indent=1).encode())
    if markdown_file is not None:
        write_atomically(markdown_file, markdown_page(job.figures).encode())
    if output is not None:
        job.tell(f"wrote {output / 'compiled'} and {output / 'onnx'}")


class Demo:
    """The steps in order; each prints what it found and adds it to the figures."""

    def __init__(self, sizes: Sizes, recipe: Recipe, beside: Recipe, tokens: int, seed: int, folder: Path) -> None:
        import torch

        import linearize
        from linearize.capture import hf

        self.sizes, self.tokens, self.seed, self.folder = sizes, tokens, seed, folder
        self.recipe, self.beside = recipe, beside
        self.console: Console = out()
        torch.set_num_threads(1)  # a model this small waits for a second thread longer than it runs
        self.window = int(recipe.rules[-1].options.get("window", NO_WINDOW))
        self.figures = Figures(
            versions={"linearize": linearize.__version__, "torch": torch.__version__},
            threads=torch.get_num_threads(),
            window=self.window,
            recipe=recipe_text(recipe),
            beside=recipe_text(beside),
            baseline=f"window{{window={self.window}}}",
        )
        self.source = hf.load_model(str(linearize.demo_model_dir()))
        self.tokenizer: Any = hf.load_tokenizer(linearize.demo_model_dir())

    def run(self) -> None:
        started = time.perf_counter()
        with self.step("1  capture and match"):
            captured = self.capture()
        with self.step("2  compile"):
            compiled = self.compile(captured)
        with self.step("3  compare"):
            self.measure(captured, compiled)
        with self.step("4  speed and memory"):
            self.race(compiled)
        with self.step("5  save and export to ONNX"):
            self.save(compiled)
        with self.step("6  generate"):
            self.generate(compiled)
        self.figures.seconds["total"] = round(time.perf_counter() - started, 1)
        self.tell(f"\n{self.figures.seconds['total']:.0f} s in all", "dim")

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self.console.print(f"\n[bold cyan]{title}[/bold cyan]")
        started = time.perf_counter()
        yield
        self.figures.seconds[title.split("  ")[1]] = round(time.perf_counter() - started, 1)

    def tell(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    # ---- 1, 2: the compiler ------------------------------------------------------------------------------------------

    def capture(self) -> Program:
        import linearize
        from linearize import printing

        program = linearize.capture(self.source)
        self.console.print(printing.program_summary(program))
        self.tell(f"attention of layer 0 as captured ({program.matched[0].module})", "dim")
        self.show_attention(program.history[-1].text, program)
        return program

    def compile(self, captured: Program) -> LinearizedModel:
        from linearize import printing

        compiled = self.compiled(captured, self.recipe)
        self.tell(f"recipe {self.figures.recipe}: {self.fitting(compiled)}")
        self.tell("attention of layer 0 rewritten: a mixer, its state in and out", "dim")
        self.show_attention(compiled.source.history[-1].text, captured)
        kernels = sorted(set(compiled.report.kernels.values()))
        sizes = printing.bytes_text(compiled.state_bytes())
        self.tell(f"kernels {', '.join(kernels)}; state {sizes} a sequence, whatever its length", "dim")
        return compiled

    def compiled(self, captured: Program, recipe: Recipe) -> LinearizedModel:
        import linearize

        return linearize.compile(captured, recipe, tokens=self.tokens if recipe.fit.tokens else 0, seed=self.seed)

    def fitting(self, compiled: LinearizedModel) -> str:
        report = compiled.report
        if not report.tokens_fitted:
            return "nothing to fit"
        return f"fitted on {report.tokens_fitted:,} tokens of {report.data}"

    def show_attention(self, text: str, captured: Program) -> None:
        from linearize import printing

        nodes = captured.matched[0].nodes
        for line in printing.excerpt_after(text, (nodes.query, nodes.key, nodes.value), until="aten.linear("):
            if "= getitem(" in line and "  # " not in line:
                continue  # the new states, which go to the graph's outputs
            ours = "linearize_mixers" in line
            self.console.print(printing.code_line(line, ours), no_wrap=not ours, overflow=None if ours else "ellipsis")

    # ---- 3: what was lost --------------------------------------------------------------------------------------------

    def measure(self, captured: Program, compiled: LinearizedModel) -> None:
        from linearize.calibration.evaluate import logits_of, mixers_of, site_errors
        from linearize.passes.rewrite import RaiseAttention
        from linearize.pipeline import run_pipeline
        from linearize.recipe import Recipe

        teacher = run_pipeline(captured, [RaiseAttention()])
        data = self.data(compiled.vocab_size or 0)
        window = self.compiled(captured, Recipe.load(self.figures.baseline))
        beside = self.compiled(captured, self.beside)
        self.figures.tokens_fitted = beside.report.tokens_fitted
        self.tell(f"beside it {self.figures.beside}: {self.fitting(beside)}")
        models = {"window only": window, self.beside.name: beside, f"{self.recipe.name} (compiled)": compiled}
        errors = {name: site_errors(teacher, mixers_of(model.source), data.sites) for name, model in models.items()}
        for entry in compiled.plan.entries:
            row = {name: column[entry.site] for name, column in errors.items()}
            site = {"site": entry.site, "module": entry.module, "mixer": entry.label(), "errors": row}
            self.figures.sites.append(site)
        self.console.print(site_figure(self.figures).drawn())
        source = remembered(logits_of(self.source), data.text)
        self.figures.models["source"] = model_figures(logits_of(self.source), source, data)
        for name, model in models.items():
            found = model_figures(logits_of(model), source, data)
            self.figures.models[name] = {**found, "state_bytes": model.state_bytes()}
        self.console.print("")
        self.console.print(model_figure(self.figures).drawn())

    def data(self, vocab_size: int) -> Data:
        from linearize.calibration import demo

        sizes = self.sizes
        text = demo.text_rows(self.tokenizer, demo.held_out_documents(), sizes.text_rows, LENGTH)
        recall = demo.recall_batches(vocab_size, self.window, sizes.recall_rows, seed=self.seed + 1)
        half = sizes.site_rows // 2
        rows = [text[:half], recall[1].input_ids[: sizes.site_rows - half]]
        return Data(list(text.split(4)), recall, demo.recall_edges(self.window), rows)

    # ---- 4: what was gained ------------------------------------------------------------------------------------------

    def race(self, compiled: LinearizedModel) -> None:
        from linearize.runtime.speed import decode_speeds

        for context in self.sizes.contexts:
            source, fitted = decode_speeds(self.source, compiled, context, self.sizes.steps)
            self.figures.speed.append({"context": context, "source": asdict(source), "compiled": asdict(fitted)})
        self.console.print(speed_figure(self.figures).drawn())

    # ---- 5, 6: what remains ------------------------------------------------------------------------------------------

    def save(self, compiled: LinearizedModel) -> None:
        import torch

        import linearize
        from linearize.export.runner import OnnxModel

        compiled.save_pretrained(self.folder / "compiled")
        ids = torch.arange(100).unsqueeze(0) * 7 % (compiled.vocab_size or 2)
        again = linearize.load(self.folder / "compiled")
        with torch.no_grad():
            equal = torch.equal(again(ids).logits, compiled(ids).logits)
        self.tell(f"saved and loaded: logits {'equal to the bit' if equal else 'DIFFER'}")
        linearize.export(compiled, self.folder / "onnx", format="onnx")
        worst = largest_difference(compiled, OnnxModel(self.folder / "onnx"), ids, self.sizes.new_tokens)
        steps = self.sizes.new_tokens
        self.figures.onnx = {"prefill": 100, "steps": steps, "largest_difference": worst, "reload_equal": equal}
        self.tell(f"ONNX in onnxruntime: logits within {worst:.1e}, over a prompt of 100 tokens and {steps} steps")

    def generate(self, compiled: LinearizedModel) -> None:
        import torch

        from linearize.export.runner import OnnxModel

        ids, count = self.tokenizer(PROMPT, return_tensors="pt")["input_ids"], self.sizes.new_tokens
        from_source = self.source.generate(ids, max_new_tokens=count, do_sample=False)  # type: ignore[operator]
        from_compiled = compiled.generate(ids, max_new_tokens=count)
        from_onnx = torch.as_tensor(OnnxModel(self.folder / "onnx").generate(ids.numpy(), max_new_tokens=count))
        self.tell(PROMPT, "dim")
        for name, tokens in (("source", from_source), ("compiled", from_compiled)):
            self.tell(f"{name} continues", "cyan")
            self.tell(self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
        same = torch.equal(from_onnx, from_compiled)
        self.figures.onnx["same_tokens"] = same
        self.tell(f"ONNX in onnxruntime: {'the same tokens' if same else 'OTHER TOKENS'} as compiled", "dim")


def recipe_text(recipe: Recipe) -> str:
    """`lolcats{window=32}`; the name alone where layers differ, as the sites' table shows."""
    if len(recipe.rules) > 1:
        return recipe.name
    options = ",".join(f"{key}={value}" for key, value in recipe.rules[-1].options.items())
    return f"{recipe.name}{{{options}}}" if options else recipe.name


def remembered(logits: Any, rows: list[Tensor]) -> Any:
    """The same model, run once on each of `rows`; the tensors themselves are recognised, not their values."""
    known: dict[int, Tensor] = {}

    def look_up(ids: Tensor) -> Tensor:
        if not any(ids is row for row in rows):
            return logits(ids)
        if id(ids) not in known:
            known[id(ids)] = logits(ids)
        return known[id(ids)]

    return look_up


def model_figures(logits: Any, source: Any, data: Data) -> dict[str, Any]:
    """Perplexity on text, agreement with the source, recall by distance of one model."""
    from linearize.calibration import evaluate

    table = evaluate.recall(logits, data.recall, data.edges)
    on_text = remembered(logits, data.text)
    close = evaluate.agreement(source, on_text, data.text)
    return {
        "perplexity": evaluate.perplexity(on_text, data.text),
        "kl": close.kl,
        "top1": close.top1,
        "recall": evaluate.overall(table),
        "recall_by_distance": [asdict(row) for row in table],
    }


def largest_difference(compiled: LinearizedModel, onnx: Any, ids: Tensor, steps: int) -> float:
    """Over the logits of a prompt and of `steps` greedy steps, PyTorch against onnxruntime."""
    import torch

    worst, state, onnx_state, tokens = 0.0, None, None, ids
    with torch.no_grad():
        for _ in range(steps + 1):
            logits, state = compiled.step(tokens, state)
            onnx_logits, onnx_state = onnx.step(tokens.numpy(), onnx_state)
            worst = max(worst, (logits - torch.as_tensor(onnx_logits)).abs().max().item())
            tokens = logits[:, -1:].argmax(-1)
    return worst
