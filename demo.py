"""
What `make demo` runs: draw, edit and ask with the command line, and show all of it on one sheet.

The model is Omni-Video Shapes, the small trained checkpoint that comes with the package.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from omni_video_hf.shapes.pictures import Shown, results_sheet

ROOT = Path(__file__).parent
FOLDER = ROOT / "demo"
DRAW, EDIT, STILL = (
    "a large red circle moving left on a black background",
    "make it blue",
    "a small yellow square on grey",
)
QUESTION = "describe the video"
COMMANDS = {
    "circle.mp4": f"omni-video generate '{DRAW}' --output demo/circle.mp4 --overwrite --seed 0",
    "blue.mp4": f"omni-video edit demo/circle.mp4 '{EDIT}' --output demo/blue.mp4 --overwrite --seed 0",
    "square.png": f"omni-video generate '{STILL}' --output demo/square.png --overwrite --seed 0",
    "answer.txt": f"omni-video ask demo/blue.mp4 '{QUESTION}' --seed 0",
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
    """Everything into the folder `demo`; the files of an earlier run are replaced, others stay."""
    start = time.time()
    FOLDER.mkdir(exist_ok=True)
    for name, command in COMMANDS.items():
        printed = run(command)
        if name.endswith(".txt"):
            (FOLDER / name).write_text(printed)
    circle, blue, square, answer = (FOLDER / name for name in COMMANDS)
    rows = [
        Shown(DRAW, None, circle),
        Shown(EDIT, circle, blue),
        Shown(STILL, None, [Image.open(square)]),
        Shown(f"{QUESTION}  -  {answer.read_text().strip()}", blue),
    ]
    results_sheet(rows).save(FOLDER / "sheet.png")
    print(f"\nmade in {time.time() - start:.0f} seconds:")  # noqa: T201
    for path in (FOLDER / name for name in sorted([*COMMANDS, "sheet.png"])):
        print(f"  demo/{path.name}  {path.stat().st_size:,} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
