"""The frame around the commands: help, usage errors, one-line errors, --debug, quiet libraries."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from linearize.cli import app
from linearize.cli._shell import exit_code, message_of, quiet_libraries, take_debug
from linearize.errors import RecipeError
from tests.cli.conftest import Run, assert_one_error

COMMANDS = ["demo", "inspect", "compile", "generate", "export", "recipes", "doctor"]


def test_help_lists_the_commands_in_the_order_of_use(run: Run) -> None:
    text = run("--help").stdout
    places = [text.index(f"│ {command} ") for command in COMMANDS]
    assert places == sorted(places)


def test_no_command_prints_the_help(run: Run) -> None:
    result = run()
    assert result.exit_code == 0
    assert "Commands" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_explained(run: Run, command: str) -> None:
    import typer

    result = run(command, "--help")
    assert result.exit_code == 0
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert [one.name for one in parameters if not getattr(one, "help", "")] == []


def test_version(run: Run) -> None:
    assert run("--version").stdout.startswith("linearize 0.")


def test_help_brings_in_nothing_heavy() -> None:
    code = (
        "import sys\nfrom linearize.cli import main\nsys.argv = ['linearize', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnx', 'onnxruntime', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["inspekt"], ["inspekt", "Did you mean 'inspect'", "linearize --help"]),
        (["inspect"], ["Missing argument", "inspect --help"]),
        (["compile", "demo"], ["Missing option", "--output"]),
        (["recipes", "--frobnicate"], ["--frobnicate"]),
        (["compile", "demo", "-o", "x", "--tokens", "-3"], ["--tokens", "greater than or equal to 0"]),
        (["generate", "x", "y", "-n", "many"], ["--max-new-tokens", "integer"]),
    ],
)
def test_a_wrong_command_line_is_one_error(run: Run, arguments: list[str], parts: list[str]) -> None:
    assert_one_error(run(*arguments), *parts)


def test_debug_is_taken_before_and_after_the_command_but_not_after_two_dashes() -> None:
    assert take_debug(["--debug", "doctor"]) == (["doctor"], True)
    assert take_debug(["recipes", "window", "--debug"]) == (["recipes", "window"], True)
    assert take_debug(["generate", "d", "--", "--debug"]) == (["generate", "d", "--", "--debug"], False)


@pytest.mark.parametrize("arguments", [["--debug", "recipes", "nope"], ["recipes", "nope", "--debug"]])
def test_debug_lets_the_traceback_out(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, RecipeError)


def fail(error: BaseException) -> None:
    raise error


def test_an_unexpected_error_is_one_line_that_names_its_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: fail(ZeroDivisionError("by\nzero")), debug=False) == 1
    assert capsys.readouterr().err.startswith("error: unexpected ZeroDivisionError: by (run again with --debug")


def test_an_error_of_ours_keeps_its_text_on_one_line() -> None:
    assert message_of(RecipeError("two\n  lines")) == "two lines"


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: fail(KeyboardInterrupt()), debug=False) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_markup_in_an_error_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code(lambda: fail(RecipeError("[red]no[/red] [0, 1]")), debug=False)
    assert "[red]no[/red] [0, 1]" in capsys.readouterr().err


def test_libraries_are_quiet_while_a_command_runs_and_as_before_afterwards() -> None:
    logger, level = logging.getLogger("transformers"), logging.getLogger("transformers").level
    value = os.environ.get("TRANSFORMERS_VERBOSITY")
    with quiet_libraries(debug=False), warnings.catch_warnings(record=True) as seen:
        assert logger.level == logging.ERROR
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
        warnings.warn("psst", stacklevel=1)
    assert seen == []
    assert (logger.level, os.environ.get("TRANSFORMERS_VERBOSITY")) == (level, value)
