"""`OmniVideoTrainingArguments`: the settings of transformers' Trainer and those of Omni-Video's stages."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import HubStrategy

from ..diffusion.losses import OmniVideoLossConfig
from ..utils.names import check_known
from ..utils.tokens import check_no_tokens, clean_token
from .stages import PARTS, Stage, get_stage

LORA_PARTS = ("mllm", "vision_head", "adapter", "decoder")
# Settings of peft's LoraConfig that a LoRA file can store, and the components that get LoRA layers.
LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules", "parts")


@dataclass
class OmniVideoTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] of transformers with the settings of Omni-Video's stages.

    Args:
        stage: training stage: `align`, `connect`, `joint`, `decoder`, `understand` or `lora` (see `stages.STAGES`).
        losses: options of [`OmniVideoLossConfig`] that replace those of the stage, e.g. `{"alignment": "squared_l2"}`.
        part_learning_rates: learning rates of components, instead of `learning_rate`, e.g. `{"decoder": 1e-6}`; names
            are `text_head`, `vision_head`, `adapter`, `visual_context_adapter`, `decoder`.
        condition_dropout: probability per sample, 0..1, that instruction and prompt are both replaced by the stored
            null states (upstream: 0.2).
        instruction_dropout: probability per sample, 0..1, that only the instruction is replaced.
        prompt_dropout: probability per sample, 0..1, that only the prompt is replaced. The three dropouts exclude each
            other, so their sum must be at most 1.
        source_dropout: probability per sample, 0..1, that the source is left out, for `source_guidance_scale`. It is
            independent of the other three.
        ema_decay: decay of an exponential moving average of the trained weights, 0 for none. `save_model` and previews
            use the average.
        preview_steps: number of steps between previews, 0 for no previews.
        previews: arguments of the pipeline's call, one mapping per preview, e.g. `{"prompt": "a fox", "task": "t2i"}`.
        frozen_dtype: dtype of frozen weights: `float32`, or `bfloat16` for half the memory (with `bf16`).
        result_dtype: dtype of the trained weights in the result: `float32`, so that the next stage starts without
            loss, or `bfloat16` for files of half the size. Other weights keep the dtype of the base model.
        hub_strategy: `end`, or `every_save` to push the whole repository at every checkpoint.
        lora: settings of peft's `LoraConfig` for the `lora` stage; `parts` lists the components that get LoRA layers.

    Raises:
        ValueError: for unknown names and numbers out of range.

    Example:
        >>> from omni_video_hf.training import OmniVideoTrainingArguments
        >>> OmniVideoTrainingArguments("run", stage="align", report_to="none").training_stage.lora
        False
    """

    stage: str = field(
        default="decoder", metadata={"help": "Stage: align, connect, joint, decoder, understand or lora."}
    )
    losses: dict[str, Any] | str | None = field(default=None, metadata={"help": "Options of OmniVideoLossConfig."})
    part_learning_rates: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Learning rates of parts in place of learning_rate."}
    )
    condition_dropout: float = field(default=0.2, metadata={"help": "Instruction and prompt replaced by null states."})
    instruction_dropout: float = field(default=0.0, metadata={"help": "Instruction alone replaced."})
    prompt_dropout: float = field(default=0.0, metadata={"help": "Prompt alone replaced."})
    source_dropout: float = field(default=0.0, metadata={"help": "Source left out, for source_guidance_scale."})
    ema_decay: float = field(default=0.0, metadata={"help": "Decay of the moving average of weights, 0 for none."})
    preview_steps: int = field(default=0, metadata={"help": "Number of steps between previews, 0 for none."})
    previews: list[dict[str, Any]] | None = field(default=None, metadata={"help": "Arguments of pipeline calls."})
    frozen_dtype: str = field(default="float32", metadata={"help": "Dtype of frozen weights."})
    result_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the trained weights in the result: float32 or bfloat16."},
    )
    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "`end`, or `every_save`: a push of the whole repository at every checkpoint."}
    )
    lora: dict[str, Any] | str | None = field(default=None, metadata={"help": "Settings of peft's LoraConfig."})

    # Batches hold latents and features, which are no arguments of a dataset's columns alone.
    remove_unused_columns: bool | None = False
    # A batch of one task does not run every part, and two processes may have different tasks.
    ddp_find_unused_parameters: bool | None = True

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "losses", "part_learning_rates", "lora"]  # noqa: RUF012

    def __post_init__(self) -> None:
        self.hub_token: Any = clean_token(self.hub_token, "`hub_token`")
        check_no_tokens({"output_dir": self.output_dir, "hub_model_id": self.hub_model_id})
        super().__post_init__()
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"`output_dir` {self.output_dir} is a file: choose a folder.")
        check_known("report_to", self.report_to, INTEGRATION_TO_CALLBACK)
        # `__post_init__` above has made dictionaries of what the command line gives as JSON.
        self.loss_config = self.training_stage.loss_config(cast("dict[str, Any] | None", self.losses))
        self._check_numbers()
        if self.preview_steps and not self.previews:
            raise ValueError("`preview_steps` is set, but `previews` is empty: pass arguments of the pipeline's call.")
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy` {HubStrategy(self.hub_strategy).value!r} would push optimiser states: use 'end' or "
                "'every_save', which push the repository."
            )
        for name in ("frozen_dtype", "result_dtype"):
            check_known(name, [getattr(self, name)], ["float32", "bfloat16"])
        if self.frozen_dtype == "bfloat16" and not self.bf16:
            raise ValueError("`frozen_dtype: bfloat16` needs `bf16: true`, which combines it with float32 weights.")
        if self.lora is not None and not self.training_stage.lora:
            raise ValueError(f"`lora` is set but `stage` is {self.stage!r}: use `stage: lora`.")
        lora = cast("dict[str, Any]", self.lora or {})
        check_known("lora", lora, LORA_SETTINGS)
        check_known("lora.parts", lora.get("parts") or (), LORA_PARTS)

    def _check_numbers(self) -> None:
        check_known("part_learning_rates", self.part_learning_rates or {}, [*PARTS, "mllm"])
        for name, rate in cast("dict[str, float]", self.part_learning_rates or {}).items():
            if not isinstance(rate, (int, float)) or rate < 0:
                raise ValueError(f"`part_learning_rates`: {name} must be a number of 0 or more, got {rate!r}.")
        dropouts = {
            name: getattr(self, name) for name in ("condition_dropout", "instruction_dropout", "prompt_dropout")
        }
        for name, value in (dropouts | {"source_dropout": self.source_dropout}).items():
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")
        if sum(dropouts.values()) > 1:
            raise ValueError(f"The three dropouts exclude each other and must add up to 1 at most, got {dropouts}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be 0 (none) or less than 1, got {self.ema_decay}.")
        if self.preview_steps < 0:
            raise ValueError(f"`preview_steps` must be 0 (never) or more, got {self.preview_steps}.")

    @property
    def training_stage(self) -> Stage:
        """The stage behind its name."""
        return get_stage(self.stage)

    @property
    def drops_conditions(self) -> bool:
        """Whether any condition is ever dropped."""
        return self.condition_dropout + self.instruction_dropout + self.prompt_dropout > 0


__all__ = ["OmniVideoLossConfig", "OmniVideoTrainingArguments"]
