"""What happens beside the steps of a run."""

from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .trainer import OmniVideoTrainer


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
