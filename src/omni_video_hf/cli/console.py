"""Output of the commands to the terminal: results, notes, one-line errors, exit codes; imports nothing slow."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

import typer

from ..utils.command_start import interruption
from ..utils.masking import mask_logging, mask_tokens

if TYPE_CHECKING:
    from rich.console import Console

FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # exit codes


class UsageProblem(ValueError):  # noqa: N818 - named for the user's side
    """A command-line argument that cannot be used. The exit code is 2 instead of 1."""


def console() -> "Console":
    """A rich console on stderr, for everything but results."""
    return import_module("rich.console").Console(stderr=True)


def note(text: str) -> None:
    """Print a note that is not an error to stderr. Markup in `text` is printed literally."""
    escape = import_module("rich.markup").escape
    console().print(f"[yellow]note:[/] {escape(mask_tokens(text))}", highlight=False, soft_wrap=True)


def result(text: str) -> None:
    """Print a result to stdout; nothing else is printed there."""
    print(mask_tokens(text), flush=True)  # noqa: T201


def start_libraries(verbose: bool, quiet: bool = False) -> None:
    """Import transformers and diffusers, register the package's classes, and set the log levels."""
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.INFO if verbose else logging.ERROR)
    import_module("..processing.registration", __package__).register_auto_classes()
    libraries = [import_module("transformers").logging, import_module("diffusers").logging]
    libraries[0].disable_progress_bar()  # the progress bar of diffusers shows the components
    for library in libraries:
        library.set_verbosity_info() if verbose else library.set_verbosity_error()
    if quiet:
        libraries[1].disable_progress_bar()
        import_module("huggingface_hub.utils").disable_progress_bars()
    mask_logging()


class one_line_errors:  # noqa: N801 - used as a function
    """
    Context manager that turns an error into one line on stderr and an exit code.

    The exit code is 2 for a [`UsageProblem`], 130 for Ctrl-C, and 1 for any other error.

    Args:
        verbose: also show the traceback and the messages of the libraries.
        light: do not import the libraries, for commands that run without a model; see [`start_libraries`].
    """

    def __init__(self, verbose: bool, light: bool = False) -> None:
        self.verbose, self.light = verbose, light

    def __enter__(self) -> None:
        if not self.light:
            start_libraries(self.verbose)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (typer.Exit, typer.Abort, SystemExit, BrokenPipeError)):
            return
        if isinstance(error, KeyboardInterrupt) or interruption.happened:
            return  # `__main__` reports it, because it can also happen outside of this block
        if hasattr(error, "format_message"):  # an error of typer about an option; `run` prints it
            return
        if self.verbose:
            sys.stderr.write(mask_tokens("".join(traceback.format_exception(error))))
        fail(one_line(error), USAGE if isinstance(error, UsageProblem) else FAILURE)


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Turn a `ValueError` into a [`UsageProblem`], for a block that only checks arguments."""
    try:
        yield
    except UsageProblem:
        raise
    except ValueError as error:
        raise UsageProblem(_message(error)) from error


def one_line(error: BaseException) -> str:
    """The message of an error on one line, with access tokens masked."""
    text = mask_tokens(" ".join(_message(error).split())) or type(error).__name__
    return text if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: {text}"


def _message(error: BaseException) -> str:
    """The message of an error; a `SizeError` then names flags instead of Python arguments."""
    return getattr(error, "for_command_line", error.__str__)()


def fail(message: str, code: int = FAILURE) -> NoReturn:
    """Print an error on one line and end the command."""
    print_error(message)
    raise typer.Exit(code)


def print_error(message: str) -> None:
    """Print `error: message` to stderr, in red on a terminal; it needs no import of rich."""
    is_plain = os.environ.get("NO_COLOR") or not sys.stderr.isatty()
    start, end = ("", "") if is_plain else ("\x1b[1;31m", "\x1b[0m")
    sys.stderr.write(f"{start}error:{end} {mask_tokens(message)}\n")
    sys.stderr.flush()


__all__ = [
    "FAILURE",
    "INTERRUPTED",
    "USAGE",
    "UsageProblem",
    "as_usage",
    "console",
    "fail",
    "note",
    "one_line",
    "one_line_errors",
    "print_error",
    "result",
    "start_libraries",
]
