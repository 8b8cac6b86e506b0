"""What every command shares: consoles, quiet libraries, and errors told in one line.

Exit codes: 0 done, 1 an error, 2 only from `inspect` (some attentions were refused), 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from linearize.errors import LinearizeError

DEBUG = "--debug"
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
NOISY_LOGGERS = ("transformers", "huggingface_hub", "torch", "onnx", "onnxscript", "onnx_ir", "httpx")


def out() -> Console:
    """Results go to stdout."""
    return Console(highlight=False)


def err() -> Console:
    """What happens on the way goes to stderr."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One dim line on stderr, wrapped only by the terminal."""
    err().print(Text(text, style="dim"), soft_wrap=True)


def complain(text: str) -> None:
    """`error: ...` as one line on stderr."""
    err().print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


class Shell(TyperGroup):
    """Takes `--debug` before or after the command, and tells every error in one line instead of a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments, debug = take_debug(sys.argv[1:] if args is None else args)

        def run() -> Any:
            return super(Shell, self).main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)

        if not standalone_mode:
            return run()
        with quiet_libraries(debug):
            code = exit_code(run, debug)
        sys.exit(code)


def take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, and whether it was among those before a `--`."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != DEBUG]
    return [*options, *arguments[end:]], len(options) < end


def exit_code(run: Callable[[], Any], debug: bool) -> int:
    """Run a command; its exit code, after telling what went wrong if anything did."""
    try:
        result = run()
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except Exception as error:
        if debug and not is_usage(error):
            raise
        complain(message_of(error))
        return 1
    return result if isinstance(result, int) else 0


def is_usage(error: Exception) -> bool:
    """Whether the command line itself was wrong (typer carries its own copy of click from 0.26 on)."""
    return hasattr(error, "format_message")


def message_of(error: Exception) -> str:
    """One line for the reader."""
    if is_usage(error):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "linearize"
        return f"{error.format_message().rstrip('.')}; see {command} --help"  # type: ignore[attr-defined]
    if isinstance(error, LinearizeError):
        return " ".join(str(error).split())
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return f"unexpected {what} (run again with {DEBUG} for the traceback)"


@contextmanager
def quiet_libraries(debug: bool) -> Iterator[None]:
    """Keep other libraries' warnings, logs and progress bars off the terminal while a command runs."""
    if debug:
        yield
        return
    before = {name: os.environ.get(name) for name in QUIET}
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    os.environ.update(QUIET)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _drop_stdout() -> None:
    """The reader of our output has gone: let nothing more be written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
