"""
Operations per denoising step at full size, counted on the meta device: ours over upstream's plain path.

Upstream runs vision head and adapter anew in every step, pads the context to 2560 tokens and projects all of it in
every step. Counted is one branch of guidance; the other costs the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from omni_video_hf import OmniVideoAdapter, OmniVideoAdapterConfig, OmniVideoVisionHead, OmniVideoVisionHeadConfig
from omni_video_hf.attention_omni_video import constant_context
from omni_video_hf.configuration_omni_video import WAN_2_1_T2V_1_3B
from omni_video_hf.settings_omni_video import LatentGrid

MLLM_TOKENS = 164  # of an instruction; an image adds 196
PROMPT_TOKENS, INSTRUCTION_TOKENS = 60, 20  # two or three sentences to draw from; one sentence to edit by
GRID = LatentGrid(spatial=8, temporal=4, patch=(1, 2, 2), source_patch=(1, 4, 4))
ADAPTER = OmniVideoAdapterConfig()


@dataclass(frozen=True)
class Case:
    """One setting of one task."""

    task: str
    width: int
    height: int
    num_frames: int

    @property
    def name(self) -> str:
        """Such as `t2v 832x480x17`."""
        return f"{self.task} {self.width}x{self.height}" + (f"x{self.num_frames}" if self.num_frames > 1 else "")

    @property
    def context_length(self) -> int:
        """Tokens of the context, markers included."""
        vision = ADAPTER.num_query_tokens * (1 if self.task.endswith("i") else 4) + 2
        if self.task not in ("v2v", "i2i"):
            return vision + PROMPT_TOKENS + 2
        return GRID.source_tokens(self.height, self.width, self.num_frames) + 2 + vision + INSTRUCTION_TOKENS + 2


CASES = (Case("t2i", 480, 480, 1), Case("v2v", 640, 352, 17), Case("t2v", 832, 480, 17), Case("t2v", 832, 480, 81))


def count_operations(case: Case) -> dict[str, float]:
    """Operations of one step of one branch: upstream's bridges and decoder, our first step and our later steps."""
    with torch.device("meta"):
        head, adapter = OmniVideoVisionHead(OmniVideoVisionHeadConfig()), OmniVideoAdapter()
        states = torch.empty(1, MLLM_TOKENS + (196 if case.task in ("v2v", "i2i") else 0), 4096)
        decoder = WanTransformer3DModel(**WAN_2_1_T2V_1_3B)
        latents = torch.empty(
            1, 16, GRID.latent_frames(case.num_frames), case.height // GRID.spatial, case.width // GRID.spatial
        )
        context = torch.empty(1, case.context_length, ADAPTER.hidden_size)
        padded = torch.empty(1, ADAPTER.max_context_length, ADAPTER.hidden_size)
        timestep = torch.empty(1)

    for module in (head, adapter, decoder):
        module.requires_grad_(False)

    def count(function: Callable[..., object], *arguments: object) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*arguments)
        return counter.get_total_flops()

    kind = "image" if case.task.endswith("i") else "video"
    tokens = torch.empty(1, 4, head.config.hidden_size, device="meta")
    recomputed = count(head, states) + count(adapter, tokens, None, None, None, kind)
    plain = count(decoder, latents, timestep, padded)
    with constant_context(decoder, {"cond": context}, ADAPTER.max_context_length) as constant:
        first = count(decoder, latents, timestep, constant.enter("cond"))
        later = count(decoder, latents, timestep, constant.enter("cond"))
    upstream = recomputed + plain
    return {
        "bridges": recomputed,
        "decoder": plain,
        "upstream": upstream,
        "first": first,
        "later": later,
        "ratio": later / upstream,
    }
