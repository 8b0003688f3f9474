"""
Memory of activations at full size, from live tensors on the meta device: no weights, no accelerator, no rounding.

Counted is what the parts hold at once beyond their weights, kept keys and values included, at 2 bytes a value where
the part runs in bfloat16. Attention is taken not to write its scores down, as in every fused kernel. What an
accelerator's allocator and libraries take on top (fragments, workspaces, the CUDA context) is not in it.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from rich.progress import Progress
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from omni_video_hf import OmniVideoAdapter, OmniVideoConfig, OmniVideoForConditionalGeneration, OmniVideoPipeline
from omni_video_hf.models.configuration_omni_video import WAN_2_1_T2V_1_3B

from .operations import ADAPTER, CASES, IMAGE_TOKENS, MLLM_TOKENS, NULL_PROMPT_TOKENS, PROMPT_TOKENS, Case

UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


PARTS = ("mllm", "text_encoder", "adapter", "transformer", "vae", "vae_tiled")
TITLE = "Activations at full size (GB)"
COLUMNS = {"setting": lambda row: row["setting"]} | {
    name: lambda row, name=name: f"{row[name] / 1e9:.2f}" for name in PARTS
}


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()
        self.given: dict[int, torch.UntypedStorage] = {}  # weights and inputs: met as arguments, made before

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """As the function called; new storages are counted until they are freed."""
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.seen:
                self.given[storage._cdata] = storage
        output = function(*args, **(kwargs or {}))
        for storage in _storages(output):
            self._add(storage)
        self.peak = max(self.peak, self.live)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.seen and key not in self.given:
            size = storage.nbytes()
            self.seen.add(key)
            self.live += size
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def peak(function: Callable[[], object]) -> int:
    """Most bytes that a function's tensors take at once."""
    with torch.no_grad(), FusedAttention(), PassedChecks(), LiveMemory() as memory:
        function()
    return memory.peak


class FusedAttention(TorchFunctionMode):
    """Attention that writes nothing down but its output, as the kernels do that the meta device has not."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """As the function called, except for attention."""
        if function is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return function(*args, **(kwargs or {}))


class PassedChecks(TorchFunctionMode):
    """Passes every check of values, such as whether latents are finite: tensors on the meta device have no values."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """As the function called, except for the truth of a tensor on the meta device."""
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        return function(*args, **(kwargs or {}))


def pipeline() -> OmniVideoPipeline:
    """The released pipeline on the meta device in bfloat16, the VAE in float32; without processor and tokenizer."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with torch.device("meta"):
        half = OmniVideoForConditionalGeneration(OmniVideoConfig(adapter_config=None, decoder_config=None))
        pipe = OmniVideoPipeline(
            processor=None,
            mllm=half.bfloat16(),
            adapter=OmniVideoAdapter().bfloat16(),
            transformer=WanTransformer3DModel(**WAN_2_1_T2V_1_3B).bfloat16(),
            text_encoder=UMT5EncoderModel(UMT5Config(**UMT5_XXL)).bfloat16(),
            tokenizer=None,
            vae=AutoencoderKLWan(),
            scheduler=scheduler,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(progress: Progress) -> list[dict[str, Any]]:
    """
    One row per case: peak bytes of every part, and of the VAE's decoding with tiles.

    The MLLM reads an instruction with an image, the text encoder a prompt of 512 tokens, the sampling loop runs both
    branches.
    """
    pipe = pipeline()
    length = MLLM_TOKENS + IMAGE_TOKENS
    states = {
        "inputs_embeds": torch.empty(1, length, 4096, dtype=torch.bfloat16, device="meta"),
        "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool, device="meta"),
    }
    shared = {
        "mllm": peak(lambda: pipe.mllm.mllm(**states, logits_to_keep=1, output_hidden_states=True)),
        "text_encoder": peak(lambda: pipe.text_encoder(torch.zeros(1, 512, dtype=torch.long, device="meta"))),
    }
    cases = progress.track(CASES, description="  activations")
    return [{"setting": case.name} | shared | _of_case(pipe, case) for case in cases]


def _of_case(pipe: OmniVideoPipeline, case: Case) -> dict[str, int]:
    meta = torch.device("meta")
    tokens = torch.empty(1, 4, 1152, dtype=torch.bfloat16, device=meta)
    source = torch.empty(case.latents_shape, device=meta) if case.has_source else None
    latents = torch.empty(case.latents_shape, device=meta)
    contexts = [
        torch.empty(1, case.context_length(length), ADAPTER.hidden_size, dtype=torch.bfloat16, device=meta)
        for length in (PROMPT_TOKENS, NULL_PROMPT_TOKENS)
    ]
    found = {
        "adapter": peak(lambda: pipe.adapter(tokens, None, source, None, case.kind)),
        "transformer": peak(
            lambda: pipe.denoise(latents, pipe.prepare_scheduler(3, 5.0, meta), *contexts, guidance_scale=6.0)
        ),
        "vae": peak(lambda: pipe.vae.decode(latents)),
    }
    pipe.vae.enable_tiling()
    found["vae_tiled"] = peak(lambda: pipe.vae.decode(latents))
    pipe.vae.disable_tiling()
    return found
