"""
Entry point of the `omni-video` command and of `python -m omni_video_hf`.

Ctrl-C prints one line and exits with code 130 at any moment; `utils.command_start` handles it during the imports.
"""

import os
import signal
import sys
from importlib import import_module
from typing import NoReturn

from .utils.command_start import interruption, leave

INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command of `sys.argv` and exit: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        cli = import_module(f"{__package__}.cli.main")
        if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, leave):
            signal.signal(signal.SIGINT, interruption)
        code = cli.run()
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except BaseException as error:
        if isinstance(error, SystemExit) or not (interruption.happened or isinstance(error, KeyboardInterrupt)):
            raise
        code = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done, but Python may need a while to end
    if interruption.happened:
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write("error: interrupted\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
