"""The pages tell the truth: their Python runs, and the commands that they name exist."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    info: list[str]
    body: str
    line: int


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, with the words of the fence and the line where the body starts."""
    return [
        Block(match["info"].split(), match["body"], text.count("\n", 0, match.start("body")) + 1)
        for match in FENCE.finditer(text)
    ]


def run_python_blocks(path: Path) -> int:
    """Run a page's ```python blocks, but for `python no-run`, in one namespace; how many ran."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    pythons = [block for block in blocks_of(path.read_text()) if block.info[:1] == ["python"]]
    blocks = [block for block in pythons if "no-run" not in block.info]
    for block in blocks:
        # Blank lines in front make a traceback point at the page's own line.
        exec(compile("\n" * (block.line - 1) + block.body, str(path), "exec"), namespace)
    return len(blocks)


def commands_in(text: str) -> list[str]:
    """The first word after `linearize` on every command line of the console and shell blocks."""
    shells = [block for block in blocks_of(text) if block.info[:1] in (["console"], ["bash"], ["sh"])]
    lines = [line for block in shells for line in command_lines(block)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1] for line in words if len(line) > 1 and line[0] == "linearize" and not line[1].startswith("-")]


def command_lines(block: Block) -> list[str]:
    """The commands of a block, continued lines joined; in a console block only what follows a prompt."""
    lines = re.sub(r"\\\n\s*", " ", block.body).splitlines()
    if block.info[0] == "console":
        lines = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
    return [line.strip() for line in lines]


def existing_commands() -> set[str]:
    import typer

    from linearize.cli import app

    return set(getattr(typer.main.get_command(app), "commands", {}))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python_blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_page_exist(page: Path) -> None:
    unknown = set(commands_in(page.read_text())) - existing_commands()
    assert not unknown, f"{page.name} names commands that do not exist: {sorted(unknown)}"


def test_the_readme_is_among_the_pages() -> None:
    assert ROOT / "README.md" in PAGES


# ---- the checks can fail ---------------------------------------------------------------------------------------------


def test_a_page_whose_python_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2, 'wrong'\n```\n")
    with pytest.raises(AssertionError, match="wrong") as caught:
        run_python_blocks(page)
    assert caught.traceback[-1].lineno == 7  # counted from 0: the eighth line of the page


def test_blocks_of_a_page_share_a_namespace_and_no_run_is_skipped(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n```python no-run\nraise SystemExit\n```\n```python\nassert x == 1\n```\n")
    assert run_python_blocks(page) == 2


def test_commands_are_read_from_prompts_and_shell_lines() -> None:
    text = (
        "```console\n$ linearize inspect demo --json\nlinearize printed this\n```\n"
        "```bash\nlinearize compile \\\n  model -o out  # a comment\nlinearize --help\n```\n"
        "```text\nlinearize nonsense\n```\n"
    )
    assert commands_in(text) == ["inspect", "compile"]
