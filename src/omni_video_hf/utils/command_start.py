"""Start of the `omni-video` command: detect it, and handle Ctrl-C until its entry point runs."""

import _signal as signal  # faster to import than `signal`, which creates enumerations
import os
import sys


def is_command() -> bool:
    """Whether Python was started as `omni-video`, or with `-m` and this package."""
    package = __name__.partition(".")[0]
    started = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    modules = {after for before, after in started if before == "-m"}
    name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""  # noqa: PTH119 - pathlib is slow to import
    return name in ("omni-video", "omni-video.exe") or not modules.isdisjoint({package, f"{package}.cli.main"})


def leave(_signum: int, _frame: object) -> None:
    """End the process at once with one line. No file is open yet, and an import cannot catch it as an exception."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


class _Interruption:
    """Handler of Ctrl-C while the command runs. It remembers Ctrl-C, because some imports replace the exception."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, _signum: int, _frame: object) -> None:
        self.happened = True
        raise KeyboardInterrupt


interruption = _Interruption()

if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)

__all__ = ["interruption", "is_command", "leave"]
