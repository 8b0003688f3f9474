"""
What `make demo` runs: convert a tiny checkpoint, then generate, edit and ask with the command line.

The checkpoint is upstream's format at a thousandth of its size, with random weights: the pictures are noise, every
step is real.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent
FOLDER = ROOT / "demo"
COMMANDS = {
    "model": "python conversion/convert_omni_video.py --original tests/data/core_A/omni_ckpts"
    " --output demo/omni-video-tiny",
    "generated.mp4": "omni-video generate 'a red fox in the snow' --output demo/generated.mp4"
    " --model demo/omni-video-tiny --size 256x160 --frames 9 --steps 2 --seed 0",
    "edited.mp4": "omni-video edit tests/data/bigbuckbunny.mp4 'make it snow' --output demo/edited.mp4"
    " --model demo/omni-video-tiny --size 256x160 --frames 9 --fps 8 --steps 2 --seed 0",
    "answer.txt": "omni-video ask tests/data/bigbuckbunny.mp4 'What happens in this video?'"
    " --model demo/omni-video-tiny --seed 0",
}


def run(command: str) -> str:
    """Run a command of this environment, show it, and return what it prints."""
    print(f"\n$ {command}", flush=True)  # noqa: T201
    program, *arguments = shlex.split(command)
    program = Path(sys.executable).parent / program
    done = subprocess.run([program, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)  # noqa: S603
    print(done.stdout.rstrip(), flush=True)  # noqa: T201
    return done.stdout


def main() -> None:
    """Everything into the folder `demo`."""
    start = time.time()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, command in COMMANDS.items():
        printed = run(command)
        if name.endswith(".txt"):
            (FOLDER / name).write_text(printed)
    print(f"\nmade in {time.time() - start:.0f} seconds:")  # noqa: T201
    for name in COMMANDS:
        if (FOLDER / name).is_file():
            print(f"  demo/{name}  {(FOLDER / name).stat().st_size:,} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
