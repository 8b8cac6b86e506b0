"""The attention of a tiny Llama as text: captured, raised, and with a mixer in its place."""

import re
from collections import defaultdict
from collections.abc import Callable

from linearize.passes.rewrite import InsertMixers, RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.program import Program, program_text
from tests import zoo

NAME = "llama_mqa"


def attention_text(program: Program) -> str:
    """The lines of the attention, node names numbered in order of appearance and sizes as B and T, so that the text
    does not depend on how a version of torch counts."""
    chosen, inside = [], False
    for line in program_text(program).splitlines():
        if line.lstrip().startswith("#"):
            inside = ".self_attn" in line
        elif inside:
            chosen.append(line.strip())
    text = with_sizes("\n".join(chosen), program)
    return numbered(text, {node.name for node in program.graph.nodes if node.op in ("call_function", "call_module")})


def numbered(text: str, names: set[str]) -> str:
    counts: dict[str, int] = defaultdict(int)
    given: dict[str, str] = {}

    def renamed(found: re.Match[str]) -> str:
        name = found[0]
        if name in names and name not in given:
            base = re.sub(r"_\d+$", "", name)
            counts[base] += 1
            given[name] = f"%{base}.{counts[base]}"
        return given.get(name, name)

    return re.sub(r"(?<![.\w])\w+(?![.\w(])", renamed, text)


def with_sizes(text: str, program: Program) -> str:
    batch, length = (str(size) for size in program.node(program.input_names()[0]).meta["val"].shape)
    return re.sub(rf"\b{batch}\b", "B", re.sub(rf"\b{length}\b", "T", text))


def test_the_attention_as_captured(check_golden: Callable[[str, str], None]) -> None:
    check_golden("llama_attention_captured", attention_text(zoo.captured(NAME)))


def test_the_attention_raised(check_golden: Callable[[str, str], None]) -> None:
    check_golden("llama_attention_raised", attention_text(run_pipeline(zoo.captured(NAME), [RaiseAttention()])))


def test_the_attention_with_a_mixer(check_golden: Callable[[str, str], None]) -> None:
    entry = PlanEntry(site=0, module="model.layers.0.self_attn", mixer="lolcats", options={"window": 4})
    plan = Plan(entries=(entry,))
    rewritten = run_pipeline(zoo.captured(NAME), [RaiseAttention(), InsertMixers(plan)])
    check_golden("llama_attention_with_lolcats", attention_text(rewritten))
