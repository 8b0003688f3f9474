"""
Operations of sampling at full size, counted on the meta device: ours over upstream's plain path.

Upstream runs vision head, adapter and visual context adapter anew in every pass of the decoder, pads the context to
2560 tokens and projects all of it in every pass. Counted are whole steps, both branches of guidance, and whole calls
from the first bridge to the last step, for upstream's number of steps. MLLM, text encoder and VAE run once in both and
are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from rich.progress import Progress
from torch.utils.flop_counter import FlopCounterMode

from omni_video_hf import OmniVideoAdapter, OmniVideoAdapterConfig, OmniVideoVisionHead, OmniVideoVisionHeadConfig
from omni_video_hf.models.configuration_omni_video import WAN_2_1_T2V_1_3B
from omni_video_hf.models.context_attention import constant_context
from omni_video_hf.pipelines.presets import PRESETS, LatentGrid
from omni_video_hf.tasks import get_task

MLLM_TOKENS, IMAGE_TOKENS = 164, 196  # of an instruction with its system prompt; of an image
PROMPT_TOKENS = 60  # two or three sentences, in every task
NULL_PROMPT_TOKENS = 1  # umT5's end token: the empty prompt
GRID = LatentGrid(spatial=8, temporal=4, patch=(1, 2, 2), source_patch=(1, 4, 4))
ADAPTER = OmniVideoAdapterConfig()
TITLE = "Operations at full size (10^12 floating-point operations)"
COLUMNS = {
    "setting": lambda row: row["setting"],
    "context tokens": lambda row: row["context"],
    "upstream, a step": lambda row: f"{row['upstream'] / 1e12:.2f}",
    "of it bridges": lambda row: f"{2 * row['bridges'] / 1e12:.2f}",
    "ours, first step": lambda row: f"{row['first'] / 1e12:.2f}",
    "later steps": lambda row: f"{row['later'] / 1e12:.2f}",
    "later / upstream": lambda row: f"{row['ratio']:.3f}",
    "whole call / upstream": lambda row: f"{row['call_ratio']:.3f}",
}


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
    def kind(self) -> str:
        """What is drawn."""
        return get_task(self.task).output

    @property
    def has_source(self) -> bool:
        """Whether something is edited."""
        return get_task(self.task).source is not None

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """`[batch, channels, frames, height, width]`."""
        return 1, 16, GRID.latent_frames(self.num_frames), self.height // GRID.spatial, self.width // GRID.spatial

    def context_length(self, prompt_tokens: int) -> int:
        """Tokens of the context, markers included."""
        vision = ADAPTER.num_query_tokens * (1 if self.kind == "image" else 4) + 2
        source = GRID.source_tokens(self.height, self.width, self.num_frames) + 2 if self.has_source else 0
        return source + vision + prompt_tokens + 2


CASES = (Case("t2i", 480, 480, 1), Case("v2v", 640, 352, 17), Case("t2v", 832, 480, 17), Case("t2v", 832, 480, 81))


def measure(progress: Progress) -> list[dict[str, Any]]:
    """One row per case."""
    cases = progress.track(CASES, description="  operations")
    return [{"setting": case.name} | count_operations(case) for case in cases]


def count_operations(case: Case) -> dict[str, float]:
    """
    Operations of one step and of one call of a task.

    Returns:
        `bridges` and `decoder` of one of upstream's passes; `upstream`, `first` and `later` of a step of both
        branches, and `ratio`, later over upstream; `upstream_call`, `call` and `call_ratio` of a whole call.
    """
    with torch.device("meta"):
        head, adapter = OmniVideoVisionHead(OmniVideoVisionHeadConfig()), OmniVideoAdapter()
        decoder = WanTransformer3DModel(**WAN_2_1_T2V_1_3B)
        latents, timestep = torch.empty(case.latents_shape), torch.empty(1)
        states = torch.empty(1, MLLM_TOKENS + IMAGE_TOKENS * case.has_source, 4096)
        null_states = torch.empty(1, MLLM_TOKENS, 4096)
        tokens = torch.empty(1, 4, head.config.hidden_size)
        source = latents if case.has_source else None
        padded = torch.empty(1, ADAPTER.max_context_length, ADAPTER.hidden_size)
        contexts = {
            branch: torch.empty(1, case.context_length(length), ADAPTER.hidden_size)
            for branch, length in (("cond", PROMPT_TOKENS), ("uncond", NULL_PROMPT_TOKENS))
        }
    for module in (head, adapter, decoder):
        module.requires_grad_(False)

    adapted = _count(adapter, tokens, None, source, None, case.kind)
    bridges = [_count(head, branch_states) + adapted for branch_states in (states, null_states)]
    plain = _count(decoder, latents, timestep, padded)
    with constant_context(decoder, contexts, ADAPTER.max_context_length) as constant:

        def step() -> int:
            constant.begin_step(passes=len(contexts))
            counted = 0
            for branch in contexts:
                with constant.enter(branch) as context:
                    counted += _count(decoder, latents, timestep, context)
            return counted

        first, later = step(), step()

    steps = PRESETS[case.task]["num_inference_steps"]
    upstream = sum(bridges) + 2 * plain
    ours = sum(bridges) + first + (steps - 1) * later
    return {
        "context": case.context_length(PROMPT_TOKENS),
        "bridges": bridges[0],
        "decoder": plain,
        "upstream": upstream,
        "first": first,
        "later": later,
        "ratio": later / upstream,
        "steps": steps,
        "upstream_call": steps * upstream,
        "call": ours,
        "call_ratio": ours / (steps * upstream),
    }


def _count(function: Callable[..., object], *arguments: object) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()
