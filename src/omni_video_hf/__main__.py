"""
Entry point of the `omni-video` command, which is also `python -m omni_video_hf`.

It imports next to nothing by itself, so that Ctrl-C is one line and exit code 130 from the first moment on.
"""

import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


class _Interruption:
    """Remembers Ctrl-C: some imports turn the exception that it raises into another one."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, _signum: int, _frame: FrameType | None) -> None:
        self.happened = True
        raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command of `sys.argv` and exit: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    interruption = _Interruption()
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interruption)
        code = import_module(f"{__package__}.cli").run()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except BaseException as error:
        if isinstance(error, SystemExit) or not (interruption.happened or isinstance(error, KeyboardInterrupt)):
            raise
        code = INTERRUPTED
    if interruption.happened:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C does not break the one line
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write("error: interrupted\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
