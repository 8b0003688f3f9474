"""
Generate, edit and ask with the command line, and show the results on one sheet; `make demo` runs this script.

The model is Omni-Video Shapes, the small trained checkpoint that the package contains.
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
VIDEO_PROMPT, INSTRUCTION, IMAGE_PROMPT = (
    "a large red circle moving left on a black background",
    "make it blue",
    "a small yellow square on grey",
)
QUESTION = "describe the video"
COMMANDS = {
    "circle.mp4": f"omni-video generate '{VIDEO_PROMPT}' --output demo/circle.mp4 --overwrite --seed 0",
    "blue.mp4": f"omni-video edit demo/circle.mp4 '{INSTRUCTION}' --output demo/blue.mp4 --overwrite --seed 0",
    "square.png": f"omni-video generate '{IMAGE_PROMPT}' --output demo/square.png --overwrite --seed 0",
    "answer.txt": f"omni-video ask demo/blue.mp4 '{QUESTION}' --seed 0",
}


def run(command: str) -> str:
    """Run a command of this environment, print the command and its output, and return the output."""
    print(f"\n$ {command}", flush=True)  # noqa: T201
    program, *arguments = shlex.split(command)
    program = Path(sys.executable).parent / program
    done = subprocess.run([program, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)  # noqa: S603
    print(done.stdout.rstrip(), flush=True)  # noqa: T201
    return done.stdout


def main() -> None:
    """Write all results into the folder `demo`. Results of an earlier run are replaced; other files stay."""
    start = time.time()
    FOLDER.mkdir(exist_ok=True)
    for name, command in COMMANDS.items():
        printed = run(command)
        if name.endswith(".txt"):
            (FOLDER / name).write_text(printed)
    circle, blue, square, answer = (FOLDER / name for name in COMMANDS)
    rows = [
        Shown(VIDEO_PROMPT, None, circle),
        Shown(INSTRUCTION, circle, blue),
        Shown(IMAGE_PROMPT, None, [Image.open(square)]),
        Shown(f"{QUESTION}  -  {answer.read_text().strip()}", blue),
    ]
    results_sheet(rows).save(FOLDER / "sheet.png")
    print(f"\nwritten in {time.time() - start:.0f} seconds:")  # noqa: T201
    for path in (FOLDER / name for name in sorted([*COMMANDS, "sheet.png"])):
        print(f"  demo/{path.name}  {path.stat().st_size:,} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
