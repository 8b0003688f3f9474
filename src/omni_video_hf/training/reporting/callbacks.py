"""Trainer callbacks: previews, moving average of weights, log windows."""

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from ..trainer import OmniVideoTrainer


class CloseLogAtCheckpoint(TrainerCallback):
    """
    Log at every step that is saved.

    A resumed run begins with empty sums; so a window of logging must not reach across a checkpoint, or the entry after
    it would differ from the uninterrupted run's.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Runs behind the callback that decides about saving."""
        control.should_log |= control.should_save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Likewise at the end of an epoch."""
        control.should_log |= control.should_save


class EpochOfSampler(TrainerCallback):
    """
    Tell the batch sampler its epoch.

    transformers reaches samplers that accelerate wrapped once, but not those of a resumed epoch, wrapped twice.
    """

    def __init__(self, trainer: "OmniVideoTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Before the first batch is drawn; `state.epoch` is whole or lies within the epoch that is resumed."""
        self.trainer.train_batch_sampler.set_epoch(int(state.epoch or 0))


class MovingAverage(TrainerCallback):
    """Step the trainer's moving average behind every step of the optimiser."""

    def __init__(self, trainer: "OmniVideoTrainer") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Before the step is saved."""
        if self.trainer.ema is not None:
            self.trainer.ema.step(self.trainer.trained_parameters().values())


class Previews(TrainerCallback):
    """Draw the previews every `preview_steps` steps."""

    def __init__(self, trainer: "OmniVideoTrainer") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """On the main process; the others wait at their next step."""
        if state.global_step % args.preview_steps == 0 and state.is_world_process_zero:
            self.trainer.draw_previews()


class RunClock(TrainerCallback, ExportableState):
    """
    Seconds that a run has trained, over all its attempts: the state of a checkpoint carries them on.

    What a killed attempt did behind its last checkpoint is done again and counts once.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        """Until now, or until the end of training."""
        return self._before + (0.0 if self._start is None else time.monotonic() - self._start)

    @classmethod
    def of(cls, trainer: "OmniVideoTrainer") -> "RunClock":
        """The clock of a trainer."""
        return next(entry for entry in trainer.callback_handler.callbacks if isinstance(entry, cls))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start from what the checkpoint says, which is nothing for a new run."""
        stored = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self._before, self._start = float(stored.get("args", {}).get("seconds", 0.0)), time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop."""
        self._before, self._start = self.seconds, None
