"""What the whole model returns."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class OmniVideoOutput(ModelOutput):
    """
    Output of [`OmniVideoForConditionalGeneration`]; what the inputs do not ask for is `None`.

    Args:
        loss: sum of the losses that the inputs allow, times their weights.
        logits: `[batch, length, vocabulary]` of the MLLM.
        past_key_values: cache of the MLLM.
        hidden_states: of the MLLM, one `[batch, length, width]` per layer, as in every transformers model.
        attentions: of the MLLM.
        answer_loss: cross-entropy of `labels`.
        alignment_loss: distance of the mean visual token from `target_features`.
        text_alignment_loss: distance of the adapter's mean token from that of the target's text.
        flow_matching_loss: weighted squared error of the decoder's velocity.
        vision_tokens: `[batch, num_query_tokens, vision width]`.
        velocity: `[batch, channels, frames, height, width]`, the decoder's prediction.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    answer_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    text_alignment_loss: torch.Tensor | None = None
    flow_matching_loss: torch.Tensor | None = None
    vision_tokens: torch.Tensor | None = None
    velocity: torch.Tensor | None = None


__all__ = ["OmniVideoOutput"]
