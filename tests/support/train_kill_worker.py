"""
Runs of `omni-video train` that die at chosen writes, as a program: `train_kill_worker.py FOLDER COUNT [SEED]`.

The folder gets a model, data, a run that is left alone, and `COUNT` runs that die by SIGKILL and are resumed. What
Python is about to do to files below a run's folder (open for writing, make, rename, remove) is counted by an audit
hook, and a run dies at one of these moments: while a checkpoint is written or rotated, or the pipeline put in place.
Prints one line a run. Attempts are forked, so that the libraries are imported once.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import tiny
import torch
import training
from safetensors.torch import load_file
from training_runs import write_samples

from omni_video_hf.training.recipe import read_recipe
from omni_video_hf.training.train import train

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
SETTINGS = "--use_cpu --bf16 false --report_to none --warmup_steps 0 --learning_rate 1e-2 --disable_tqdm --resume"
SETTINGS += " --max_steps 4 --save_steps 1 --save_total_limit 2 --ema_decay 0.5"


def writes(event: str, arguments: tuple, run: str) -> bool:
    """Whether an event of the audit hook changes files of a run, its hidden neighbours included."""
    if event not in EVENTS or not any(isinstance(path, str) and run in path for path in arguments[:2]):
        return False
    return event != "open" or bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def attempt(root: Path, name: str, moment: int | None = None) -> tuple[int, int]:
    """Train in a process of its own; how it ended, and how many moments it lived to see."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if writes(event, arguments, name):
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        words = ["--model", root / "base", "--data", root / "data", "--output_dir", root / name, *SETTINGS.split()]
        sys.addaudithook(hook)
        try:
            train(*read_recipe("decoder", list(map(str, words))))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os.write(writing, str(seen).encode())
        os._exit(0)
    os.close(writing)
    status = os.waitpid(pid, 0)[1]
    seen = int(os.read(reading, 20) or 0)
    os.close(reading)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), seen


def content(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run by file and name."""
    return {
        f"{name}:{key}": value
        for name in sorted(files(folder))
        if name.endswith(".safetensors")
        for key, value in load_file(folder / name).items()
    }


def files(folder: Path) -> set[str]:
    """Names of everything in a run's folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def main(root: Path, count: int, seed: int = 0) -> None:
    """All runs; fails when one is not resumed bit for bit."""
    torch.set_num_threads(1)
    tiny.pipeline().save_pretrained(root / "base")
    write_samples(root / "data", [training.sample(task, n) for task in ("t2i", "t2v") for n in range(2)])
    ended, moments = attempt(root, "run-whole")
    if ended != 0 or not moments:
        raise SystemExit("the uninterrupted run failed")
    whole = content(root / "run-whole")
    chance = np.random.default_rng(seed)
    for number in range(count):
        name = f"run-{number}"
        # One moment in each of `count` equal parts of the run.
        moment = 1 + int(moments * (number + chance.random()) / count)
        if attempt(root, name, moment)[0] != signal.SIGKILL:
            raise SystemExit(f"{name} did not die at {moment} of {moments}")
        left = sorted(path.name for path in (root / name).iterdir())
        if attempt(root, name)[0] != 0:
            raise SystemExit(f"{name} was not resumed")
        found = content(root / name)
        if found.keys() != whole.keys() or not all(torch.equal(found[key], value) for key, value in whole.items()):
            raise SystemExit(f"{name}, killed at {moment} of {moments}, is not the run that was left alone")
        if files(root / name) != files(root / "run-whole"):
            raise SystemExit(f"{name} leaves other files: {files(root / name) ^ files(root / 'run-whole')}")
        print(f"{name} killed at {moment} of {moments}, left {left}: bit-equal", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:]))
