"""
Named ways to run the pipeline in little accelerator memory, and what each of them needs, from headers alone.

A profile is nothing but settings of diffusers and transformers, which can be chosen by hand as well: number format,
quantisation, offloading and VAE tiling.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils.torch_utils import get_device
from transformers import QuantoConfig
from transformers.utils import is_optimum_quanto_available

# In the order in which a call runs them, all of a pipeline's weights.
COMPONENTS = ("mllm", "text_encoder", "adapter", "transformer", "vae")
# Upstream decodes in float32; everything else runs in bfloat16.
DTYPES = {"default": torch.bfloat16, "vae": torch.float32}
# Peak bytes of the released model's parts beyond their weights, for a video of 832x480x81, the largest preset, with
# both branches of guidance; counted by `python -m benchmarks activations`. The MLLM's is for 1024 tokens in its cache.
ACTIVATIONS = {
    "mllm": 320_000_000,
    "text_encoder": 100_000_000,
    "adapter": 100_000_000,
    "transformer": 2_170_000_000,
    "vae": 8_170_000_000,
}
TILED_VAE_ACTIVATIONS = 1_810_000_000
LIBRARIES = 2**30  # what the accelerator's own libraries and the fragments of its allocator take, about

Headers = Mapping[str, Mapping[str, tuple[str, tuple[int, ...], int]]]  # file -> weight -> format, shape, bytes


@dataclass(frozen=True)
class MemoryProfile:
    """
    What a profile switches on. All run in bfloat16, the VAE in float32.

    Args:
        name: the memory of the accelerator that it is for.
        gibibytes: that memory.
        quantized: components whose matrices are stored in 8 bits, for slightly other numbers.
        offload: `"model"`, one component on the accelerator at a time, or `"group"`, one layer at a time: in the least
            memory and slower, most of all for answers, which move the whole MLLM for every token.
        tile_vae: decode in overlapping tiles, whose blended seams change the pixels slightly.
    """

    name: str
    gibibytes: int
    quantized: tuple[str, ...] = ()
    offload: Literal["model", "group"] = "model"
    tile_vae: bool = False


PROFILES = {
    profile.name: profile
    for profile in (
        MemoryProfile("24GB", 24),
        MemoryProfile("16GB", 16, quantized=("mllm",)),
        MemoryProfile("12GB", 12, quantized=("mllm", "text_encoder"), tile_vae=True),
        MemoryProfile("8GB", 8, offload="group", tile_vae=True),
    )
}


def get_memory_profile(name: str) -> MemoryProfile:
    """
    The profile of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PROFILES:
        raise ValueError(
            f"`memory` must be one of {', '.join(map(repr, PROFILES))}, got {name!r}: take the largest that the "
            "accelerator has."
        )
    return PROFILES[name]


# --- switching on -------------------------------------------------------------------------------------------------


def loading_arguments(profile: MemoryProfile) -> dict[str, Any]:
    """
    Arguments of `from_pretrained` that a profile stands for.

    Raises:
        ImportError: when it quantises and the package for that is missing.
    """
    arguments: dict[str, Any] = {"dtype": dict(DTYPES)}
    if profile.quantized:
        if not is_optimum_quanto_available():
            raise ImportError(
                f"`memory={profile.name!r}` stores {' and '.join(profile.quantized)} in 8 bits with optimum-quanto: "
                "`pip install optimum-quanto`, or use '8GB', which quantises nothing."
            )
        mapping = {name: QuantoConfig(weights="int8") for name in profile.quantized}
        arguments["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    return arguments


def apply_memory_profile(
    pipe: DiffusionPipeline, profile: MemoryProfile, device: torch.device | str | None = None
) -> None:
    """
    Switch on what a profile does to a pipeline that is loaded with [`loading_arguments`].

    Args:
        pipe: on the CPU.
        profile: one of [`PROFILES`].
        device: the accelerator, the one that there is by default.

    Raises:
        ValueError: without an accelerator.
    """
    if device is None and get_device() == "cpu":
        raise ValueError(
            f"`memory={profile.name!r}` is about an accelerator's memory, and torch finds none here: leave it out."
        )
    device = torch.device(device or get_device())
    if profile.tile_vae:
        pipe.vae.enable_tiling()
    if profile.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        # Streams load the next layer while one computes; weights pinned as they go need no second copy in memory.
        streams = {"use_stream": True, "low_cpu_mem_usage": True} if device.type in ("cuda", "xpu") else {}
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", **streams)


# --- what it needs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes that the released model's pipeline needs at its largest preset.

    Args:
        accelerator: most at once, by component that runs.
        main: of all weights, which wait in main memory; 0 when nothing is offloaded.
    """

    accelerator: Mapping[str, int]
    main: int

    @property
    def peak(self) -> int:
        """Most bytes at once, libraries included."""
        return max(self.accelerator.values()) + LIBRARIES


def estimate_memory(headers: Headers, profile: MemoryProfile | None) -> MemoryEstimate:
    """
    What a repository needs under a profile, or with everything on the accelerator at once.

    Args:
        headers: of its weights, file by file, each in its component's folder.
        profile: one of [`PROFILES`], or `None`.

    Raises:
        ValueError: when a component has no weights.
    """
    tensors = {name: list(_tensors_of(name, headers)) for name in COMPONENTS}
    missing = [name for name, found in tensors.items() if not found]
    if missing:
        raise ValueError(f"The repository has no weights in {', '.join(missing)}: it is no complete pipeline.")
    quantized = profile.quantized if profile else ()
    sizes = {
        name: [
            _stored_bytes(weight, shape, DTYPES.get(name, DTYPES["default"]), name in quantized)
            for weight, shape in found
        ]
        for name, found in tensors.items()
    }
    totals = {name: sum(found) for name, found in sizes.items()}
    activations = ACTIVATIONS | ({"vae": TILED_VAE_ACTIVATIONS} if profile and profile.tile_vae else {})
    if profile is None:
        there = dict.fromkeys(COMPONENTS, sum(totals.values()))
    elif profile.offload == "model":
        # What encoded the source of an edit stays until the decoder has run.
        there = {name: totals[name] + totals["vae"] * (name in ("adapter", "transformer")) for name in COMPONENTS}
    else:
        there = {name: 2 * max(found) for name, found in sizes.items()}  # a layer, and the next one on its way
    return MemoryEstimate(
        accelerator={name: there[name] + activations[name] for name in COMPONENTS},
        main=sum(totals.values()) if profile else 0,
    )


def _tensors_of(component: str, headers: Headers) -> Iterable[tuple[str, tuple[int, ...]]]:
    for file, weights in headers.items():
        if file.rpartition("/")[0] == component:
            yield from ((name, shape) for name, (_, shape, _) in weights.items())


def _stored_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, quantized: bool) -> int:
    """Bytes of a weight; quantised are matrices, with one scale a row, except embeddings and the last layer."""
    is_matrix = len(shape) == 2 and name.endswith(".weight")
    if quantized and is_matrix and not any(part in name for part in ("embed", "lm_head", "shared", "null_")):
        return math.prod(shape) + shape[0] * dtype.itemsize
    return math.prod(shape) * dtype.itemsize


__all__ = [
    "COMPONENTS",
    "PROFILES",
    "MemoryEstimate",
    "MemoryProfile",
    "apply_memory_profile",
    "estimate_memory",
    "get_memory_profile",
    "loading_arguments",
]
