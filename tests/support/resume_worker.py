"""
A training run that is killed again and again, as a program of its own: `resume_worker.py FOLDER`.

The folder gets three runs: `whole` is left alone,
`killed` dies at chosen points, `timed` at random moments.

Every attempt is a process that dies by SIGKILL at its point and leaves what it wrote; the next one goes on from the
last complete checkpoint. Attempts are forked, so that the libraries are imported once.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny
import training

from omni_video_hf.training import OmniVideoTrainer
from omni_video_hf.training.checkpointing import checkpoints

STEPS = 10
SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 3,
    "logging_steps": 3,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "condition_dropout": 0.4,
    "prompt_dropout": 0.2,
    "ema_decay": 0.9,
    "max_grad_norm": 0.5,
}
# Where an attempt dies: in a step, in its second batch, or within the writing of a checkpoint, early and late.
POINTS = [("batch", 1), ("weights", 2), ("batch", 3), ("optimiser", 4), ("batch", 4), ("rng", 6), ("promote", 6)]
POINTS += [("sealed", 8), ("rotated", 8)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(OmniVideoTrainer):
    """Dies at its point."""

    point = (None, None)

    def _dies(self, what: str) -> bool:
        return self.point == (what, self.state.global_step)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self._dies("batch") and self._micro_step[1] == 1:
            die()
        return loss

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self._writing and self._dies("weights"):
            file = Path(output_dir) / checkpoints.TRAINED_NAME
            os.truncate(file, file.stat().st_size // 2)
            die()

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._dies("optimiser"):
            die()

    def _save_rng_state(self, output_dir):
        if self._dies("rng"):
            die()
        super()._save_rng_state(output_dir)

    def _rotate(self, run_folder, *kept):
        clear = checkpoints.clear
        if self._dies("rotated"):
            checkpoints.clear = lambda writing: die() if writing.exists() else None
        super()._rotate(run_folder, *kept)
        checkpoints.clear = clear

    def _save_checkpoint(self, model, trial):
        promote = checkpoints.promote
        if self._dies("sealed"):
            checkpoints.promote = lambda *_: die()
        super()._save_checkpoint(model, trial)
        checkpoints.promote = promote
        if self._dies("promote"):
            die()


def run(folder: Path, point: tuple = (None, None), seconds: float | None = None) -> None:
    """Train to the end, or to death at a point or after some seconds."""
    samples = [training.sample(task, number) for number, task in enumerate(["t2v", "v2v", "t2i"] * 2) for _ in "ab"]
    sampler = training.BatchesInOrder([[2 * i, 2 * i + 1] for i in range(6)], seed=3)
    trainer = Mortal(
        tiny.model(enable_mllm=False),
        training.arguments(folder, **SETTINGS),
        train_dataset=training.Samples(samples),
        train_batch_sampler=sampler,
        data_collator=training.collate,
    )
    trainer.point = point
    if seconds is not None:
        threading.Thread(target=lambda: (time.sleep(seconds), die()), daemon=True).start()
    trainer.train(resume_from_checkpoint=checkpoints.last_checkpoint(folder))


def attempt(*args: object) -> int:
    """Run in a process of its own; the signal it died of, 0 if it ended well."""
    pid = os.fork()
    if pid == 0:
        try:
            run(*args)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def main(folder: Path) -> None:
    """All runs; fails when an attempt does not end as planned."""
    started = time.monotonic()
    if attempt(folder / "whole") != 0:
        raise SystemExit("the uninterrupted run failed")
    duration = time.monotonic() - started
    for point in POINTS:
        if attempt(folder / "killed", point) != signal.SIGKILL:
            raise SystemExit(f"{point} did not kill")
    for share in (0.5, 0.8, 0.65, 0.4, 0.55):
        attempt(folder / "timed", (None, None), duration * share)
    for name in ("killed", "timed", "killed"):  # the last one finds the run complete
        if attempt(folder / name) != 0:
            raise SystemExit(f"the last attempt of {name} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
