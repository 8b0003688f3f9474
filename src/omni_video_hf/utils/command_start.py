"""Whether this process is the `omni-video` command, and what Ctrl-C does until its entry point runs."""

import _signal as signal  # what `signal` is made of, without the time that its enumerations take
import os
import sys


def is_command() -> bool:
    """Whether Python was started as the command: by its name, or with `-m` and a module of it."""
    package = __name__.partition(".")[0]
    started = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    modules = {after for before, after in started if before == "-m"}
    name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""  # noqa: PTH119 - likewise
    return name in ("omni-video", "omni-video.exe") or not modules.isdisjoint({package, f"{package}.cli.main"})


def leave(_signum: int, _frame: object) -> None:
    """End the process at once with one line: nothing is open yet, and an import cannot swallow it."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


class _Interruption:
    """The handler of Ctrl-C while the command runs. It remembers: some imports turn its exception into another."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, _signum: int, _frame: object) -> None:
        self.happened = True
        raise KeyboardInterrupt


interruption = _Interruption()

if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)

__all__ = ["interruption", "is_command", "leave"]
