"""`OmniVideoOutput`: losses and tensors that the whole model returns."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class OmniVideoOutput(ModelOutput):
    """
    Output of [`OmniVideoForConditionalGeneration`]; fields that were not computed are `None`.

    Args:
        loss: weighted sum of all losses whose inputs were passed.
        logits: `[batch, length, vocabulary]`, logits of the MLLM.
        past_key_values: cache of the MLLM.
        hidden_states: hidden states of the MLLM, `[batch, length, width]` per layer, as in every transformers model.
        attentions: attention weights of the MLLM.
        answer_loss: cross-entropy of `labels`.
        alignment_loss: distance between the mean visual token and `target_features`.
        text_alignment_loss: distance between the mean adapter token and the mean embedding of the target's text.
        flow_matching_loss: weighted squared error of the velocity.
        vision_tokens: `[batch, num_query_tokens, vision width]`, visual tokens of the vision head.
        velocity: `[batch, channels, frames, height, width]`, velocity predicted by the decoder.
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
