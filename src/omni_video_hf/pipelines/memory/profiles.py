"""
Memory profiles: named settings for accelerators with little memory, and an estimate of the memory each one needs.

A profile combines settings of diffusers and transformers that users can also choose themselves: dtype, quantisation,
offloading and VAE tiling. The estimate reads only the headers of the weights.
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

from ..shared.repository_mixin import AS_STORED, stored_dtype

# All components with weights, in the order in which a call runs them.
COMPONENTS = ("mllm", "text_encoder", "adapter", "transformer", "vae")
# The VAE decodes in float32, as in the authors' code; everything else runs in bfloat16.
DTYPES = {"default": torch.bfloat16, "vae": torch.float32}
# Peak bytes of activations of the released model's components, for a video of 832x480x81, the largest preset, with
# both branches of guidance; measured by `python -m benchmarks activations`. The MLLM has 1024 tokens in its cache.
ACTIVATIONS = {
    "mllm": 320_000_000,
    "text_encoder": 100_000_000,
    "adapter": 100_000_000,
    "transformer": 2_170_000_000,
    "vae": 8_170_000_000,
}
TILED_VAE_ACTIVATIONS = 1_810_000_000
# Omni-Video 2 has a second adapter and decoder, of which only one runs at a time. Its numbers are estimates: those of
# a decoder grow with its width, and the MLLM has 4096 tokens in its cache.
EXPERT_COMPONENTS = ("mllm", "text_encoder", "adapter", "adapter_2", "transformer", "transformer_2", "vae")
MLLM_ACTIVATIONS_2 = 900_000_000
MEASURED_DECODER_WIDTH = 1536
LIBRARIES = 2**30  # approximate memory of the accelerator's libraries and of allocator fragmentation

Headers = Mapping[str, Mapping[str, tuple[str, tuple[int, ...], int]]]  # file -> weight -> dtype, shape, bytes


@dataclass(frozen=True)
class MemoryProfile:
    """
    Settings of a memory profile. All profiles use bfloat16, and float32 for the VAE.

    Args:
        name: memory of the accelerator, such as `"16GB"`.
        gibibytes: the same memory in GiB.
        quantized: components whose matrices are stored in 8 bits, which changes results slightly.
        offload: `"model"`, one component on the accelerator at a time, or `"group"`, one layer at a time, which needs
            the least memory and is slower, most of all for text answers, which move the whole MLLM for every token.
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


# The MLLM of Omni-Video 2 A14B alone has 62 GB in bfloat16, and each of its experts 28 GB.
OMNI_VIDEO_2_PROFILES = {
    profile.name: profile
    for profile in (
        MemoryProfile("80GB", 80),
        MemoryProfile("24GB", 24, offload="group"),
        MemoryProfile("16GB", 16, offload="group", tile_vae=True),
    )
}
_BY_PIPELINE = {"OmniVideo2Pipeline": OMNI_VIDEO_2_PROFILES}


def get_memory_profile(name: str, pipeline_class: str = "OmniVideoPipeline") -> MemoryProfile:
    """
    Look a memory profile up by its name, among those of a pipeline's class.

    Raises:
        ValueError: for an unknown name.
    """
    profiles = _BY_PIPELINE.get(pipeline_class, PROFILES)
    if name not in profiles:
        raise ValueError(
            f"`memory` must be one of {', '.join(map(repr, profiles))}, got {name!r}: choose the largest one that is "
            "not more than the memory of the accelerator."
        )
    return profiles[name]


def profiles_for(headers: Headers) -> dict[str, MemoryProfile]:
    """The profiles for a repository: those of Omni-Video 2 where the MLLM is a stock model."""
    return OMNI_VIDEO_2_PROFILES if _is_version_2(headers) else PROFILES


def _is_version_2(headers: Headers) -> bool:
    """Whether the MLLM is a stock model, whose weights have no prefix that tells them from a vision head."""
    return any(name.startswith("model.") for name, _ in _tensors_of("mllm", headers))


# --- applying a profile -------------------------------------------------------------------------------------------


def loading_arguments(profile: MemoryProfile, given: Iterable[str] = ()) -> dict[str, Any]:
    """
    Arguments of `from_pretrained` for a profile.

    Args:
        profile: one of [`PROFILES`].
        given: names of components that are not loaded.

    Raises:
        ImportError: if the profile quantises and optimum-quanto is not installed.
    """
    arguments: dict[str, Any] = {"dtype": dict(DTYPES)}
    quantized = [name for name in profile.quantized if name not in set(given)]
    if quantized:
        if not is_optimum_quanto_available():
            raise ImportError(
                f"`memory={profile.name!r}` stores {' and '.join(quantized)} in 8 bits with optimum-quanto: "
                "run `pip install optimum-quanto`, or use '8GB', which quantises nothing."
            )
        mapping = {name: QuantoConfig(weights="int8") for name in quantized}
        arguments["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    return arguments


def apply_memory_profile(
    pipe: DiffusionPipeline, profile: MemoryProfile, device: torch.device | str | None = None
) -> None:
    """
    Enable offloading and VAE tiling of a profile on a pipeline that was loaded with [`loading_arguments`].

    Args:
        pipe: pipeline on the CPU.
        profile: one of [`PROFILES`].
        device: the accelerator. Default: the current one.

    Raises:
        ValueError: without an accelerator.
    """
    if device is None and get_device() == "cpu":
        raise ValueError(
            f"`memory={profile.name!r}` needs an accelerator, but torch finds none here: leave `memory` out."
        )
    device = torch.device(device or get_device())
    if profile.tile_vae and pipe.vae is not None:
        pipe.vae.enable_tiling()
    if profile.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        # A stream loads the next layer during the computation; pinning on the fly needs no second copy of the weights.
        streams = {"use_stream": True, "low_cpu_mem_usage": True} if device.type in ("cuda", "xpu") else {}
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", **streams)


# --- memory estimates ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes that the pipeline of the released model needs for its largest preset.

    Args:
        accelerator: peak bytes on the accelerator while a component runs, by component.
        main: bytes of all weights in main memory; 0 without offloading.
    """

    accelerator: Mapping[str, int]
    main: int

    @property
    def peak(self) -> int:
        """Peak bytes on the accelerator, including its libraries."""
        return max(self.accelerator.values()) + LIBRARIES


def estimate_memory(headers: Headers, profile: MemoryProfile | None) -> MemoryEstimate:
    """
    Estimate the memory that a repository needs.

    Args:
        headers: headers of its weights by file; each file is in the folder of its component.
        profile: one of [`PROFILES`], or `None` for all components on the accelerator, as they are stored.

    Raises:
        ValueError: if a component has no weights.
    """
    tensors = {name: list(_tensors_of(name, headers)) for name in EXPERT_COMPONENTS}
    tensors = {name: found for name, found in tensors.items() if found or name in COMPONENTS}
    missing = [name for name, found in tensors.items() if not found]
    if missing:
        raise ValueError(
            f"The repository has no weights in {', '.join(missing)}, so it is not a complete pipeline: download or "
            "complete it first."
        )
    quantized = profile.quantized if profile else ()
    dtypes = {name: _loaded_dtype(name, headers, profile) for name in tensors}
    sizes = {
        name: [_stored_bytes(weight, shape, dtypes[name], name in quantized) for weight, shape in found]
        for name, found in tensors.items()
    }
    totals = {name: sum(found) for name, found in sizes.items()}
    activations = _activations(tensors, headers)
    if profile and profile.tile_vae:
        activations["vae"] = TILED_VAE_ACTIVATIONS
    if profile is None:
        there = dict.fromkeys(tensors, sum(totals.values()))
    elif profile.offload == "model":
        # The encoder of an edit's source stays on the accelerator until the decoder has run.
        there = {
            name: total + totals["vae"] * name.startswith(("adapter", "transformer")) for name, total in totals.items()
        }
    else:
        there = {
            name: 2 * max(found) for name, found in sizes.items()
        }  # one layer, and the next one, which is being loaded
    return MemoryEstimate(
        accelerator={name: there[name] + activations[name] for name in tensors},
        main=sum(totals.values()) if profile else 0,
    )


def _activations(tensors: Mapping[str, list[tuple[str, tuple[int, ...]]]], headers: Headers) -> dict[str, int]:
    """Peak bytes of activations by component; of the decoders of Omni-Video 2 by their width."""
    activations = dict(ACTIVATIONS)
    if not _is_version_2(headers):
        return activations
    widths = [shape[0] for name, shape in tensors["transformer"] if name == "patch_embedding.weight"]
    scale = widths[0] / MEASURED_DECODER_WIDTH if widths else 1
    decoder = int(ACTIVATIONS["transformer"] * scale)
    second = {"adapter_2": ACTIVATIONS["adapter"], "transformer_2": decoder}
    return activations | {"mllm": MLLM_ACTIVATIONS_2, "transformer": decoder} | second


def _tensors_of(component: str, headers: Headers) -> Iterable[tuple[str, tuple[int, ...]]]:
    for file, weights in headers.items():
        if _folder(file) == component:
            yield from ((name, shape) for name, (_, shape, _) in weights.items())


def _loaded_dtype(component: str, headers: Headers, profile: MemoryProfile | None) -> torch.dtype:
    """The dtype that a profile loads a component in; without a profile, the stored one."""
    wanted = DTYPES.get(component, DTYPES["default"])
    if profile is not None or component not in AS_STORED:
        return wanted
    weights = {
        name: entry for file, found in headers.items() if _folder(file) == component for name, entry in found.items()
    }
    return stored_dtype(weights) or wanted


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def _stored_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, quantized: bool) -> int:
    """Bytes of a weight. Quantised are matrices, with one scale per row, except embeddings and the last layer."""
    is_matrix = len(shape) == 2 and name.endswith(".weight")
    if quantized and is_matrix and not any(part in name for part in ("embed", "lm_head", "shared", "null_")):
        return math.prod(shape) + shape[0] * dtype.itemsize
    return math.prod(shape) * dtype.itemsize


__all__ = [
    "COMPONENTS",
    "EXPERT_COMPONENTS",
    "OMNI_VIDEO_2_PROFILES",
    "PROFILES",
    "MemoryEstimate",
    "MemoryProfile",
    "apply_memory_profile",
    "estimate_memory",
    "get_memory_profile",
    "loading_arguments",
    "profiles_for",
]
