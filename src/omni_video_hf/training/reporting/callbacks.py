"""Trainer callbacks: previews, moving average of weights, log windows, epochs of the sampler, training time."""

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from ..trainer import OmniVideoTrainer


class CloseLogAtCheckpoint(TrainerCallback):
    """
    Log at every step that is saved.

    The sums of a resumed run start empty. If a logging window extended across a checkpoint, the next log entry would
    differ from that of an uninterrupted run.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Request a log entry; runs after the callback that decides about saving."""
        control.should_log |= control.should_save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Request a log entry at the end of an epoch."""
        control.should_log |= control.should_save


class EpochOfSampler(TrainerCallback):
    """
    Set the epoch of the batch sampler.

    transformers sets it if accelerate wrapped the sampler once, but not in a resumed epoch, where it is wrapped twice.
    """

    def __init__(self, trainer: "OmniVideoTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Set the epoch before the first batch is loaded; in a resumed epoch, `state.epoch` is not an integer."""
        self.trainer.train_batch_sampler.set_epoch(int(state.epoch or 0))


class MovingAverage(TrainerCallback):
    """Update the moving average of the weights after every optimiser step."""

    def __init__(self, trainer: "OmniVideoTrainer") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update the average, before a checkpoint is saved."""
        if self.trainer.ema is not None:
            self.trainer.ema.step(self.trainer.trained_parameters().values())


class Previews(TrainerCallback):
    """Generate the previews every `preview_steps` steps."""

    def __init__(self, trainer: "OmniVideoTrainer") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Generate on the main process; the other processes wait in their next step."""
        if state.global_step % args.preview_steps == 0 and state.is_world_process_zero:
            self.trainer.draw_previews()


class RunClock(TrainerCallback, ExportableState):
    """
    Training time of a run in seconds, including the time before it was resumed, which checkpoints store.

    Steps after the last checkpoint of a killed run are repeated and count once.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        """Training time until now, or until the end of the training."""
        return self._before + (0.0 if self._start is None else time.monotonic() - self._start)

    @classmethod
    def of(cls, trainer: "OmniVideoTrainer") -> "RunClock":
        """The clock of a trainer."""
        return next(entry for entry in trainer.callback_handler.callbacks if isinstance(entry, cls))

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the clock with the time in the checkpoint, or with 0 for a new run."""
        stored = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self._before, self._start = float(stored.get("args", {}).get("seconds", 0.0)), time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop the clock."""
        self._before, self._start = self.seconds, None
