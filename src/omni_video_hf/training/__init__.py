"""Fine-tuning Omni-Video with transformers' Trainer: the paper's stages, upstream's released recipe, and LoRA."""

from .arguments import OmniVideoTrainingArguments
from .stages import STAGES, Stage
from .trainer import OmniVideoTrainer

__all__ = ["STAGES", "OmniVideoTrainer", "OmniVideoTrainingArguments", "Stage"]
