"""The components of a converted repository of Omni-Video 2: their configurations, read off files and tensor shapes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedTokenizerBase

from omni_video_hf import OmniVideo2Adapter, OmniVideo2Processor
from omni_video_hf.hub.repository import read_header

from .components import (
    Component,
    count_layers,
    expected_tensors,
    needed_tensor,
    text_encoder_component,
    vae_component,
)
from .original_checkpoint import read_json, read_tokenizer, some_names
from .original_checkpoint_2 import TEXT_ENCODER_2, WAN_VAE_2, OriginalCheckpoint2

HEAD_DIM = 128  # of every decoder of Wan that was released
WAN_EPS = 1e-6
MAX_CONTEXT_LENGTHS = {"A14B": 6144, "1.3B": 6272}
# Types of MLLM that fit a layout. The width alone does not tell: models of several sizes are 2048 wide.
MLLM_TYPES = {"A14B": ("qwen3_vl_moe",), "1.3B": ("qwen3_vl_moe", "qwen3_vl")}
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
_PREPROCESSOR_FIELDS = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")


def decoder_component(checkpoint: OriginalCheckpoint2, number: int, heads: int | None = None) -> Component:
    """Decoder of expert `number`; `heads` for decoders whose heads are not 128 wide."""
    part = checkpoint.transformer(number)
    embedding = needed_tensor(part, "patch_embedding.weight").shape
    width = embedding[0]
    if heads is None and width % HEAD_DIM:
        raise ValueError(
            f"{', '.join(sorted(part.files))}: the decoder is {width} wide, which heads of {HEAD_DIM} do not divide: "
            "pass their number as `decoder_heads`."
        )
    heads = heads or width // HEAD_DIM
    patch = list(embedding[2:])
    outputs = needed_tensor(part, "proj_out.weight").shape[0]
    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=patch,
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=embedding[1],
            out_channels=outputs // (patch[0] * patch[1] * patch[2]),
            text_dim=needed_tensor(part, "condition_embedder.text_embedder.linear_1.weight").shape[1],
            freq_dim=needed_tensor(part, "condition_embedder.time_embedder.linear_1.weight").shape[1],
            ffn_dim=needed_tensor(part, "blocks.0.ffn.net.0.proj.weight").shape[0],
            num_layers=count_layers(part, "blocks."),
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=WAN_EPS,
        )
    name = "transformer" if number == 0 else f"transformer_{number + 1}"
    return Component(name, model, partial(checkpoint.transformer, number), "diffusion_pytorch_model")


def adapter_component_2(checkpoint: OriginalCheckpoint2, number: int, max_context_length: int) -> Component:
    """Adapter of expert `number`."""
    part = checkpoint.adapter(number)
    patch = needed_tensor(part, "visual_context_adapter.patch_embedding.weight").shape
    width, states = needed_tensor(part, "mllm_proj.weight").shape
    with torch.device("meta"):
        model = OmniVideo2Adapter(
            mllm_hidden_size=states,
            hidden_size=width,
            latent_channels=patch[1],
            visual_context_size=patch[0],
            visual_context_patch_size=list(patch[2:]),
            max_context_length=max_context_length,
        )
    name = "adapter" if number == 0 else f"adapter_{number + 1}"
    return Component(name, model, partial(checkpoint.adapter, number), "diffusion_pytorch_model")


def other_components(checkpoint: OriginalCheckpoint2) -> list[Component]:
    """VAE and text encoder, those that the checkpoint has."""
    made = (vae_component(checkpoint, WAN_VAE_2), text_encoder_component(checkpoint, TEXT_ENCODER_2))
    return [component for component in made if component is not None]


def mllm_config(folder: Path, layout: str, mllm_hidden_size: int) -> PreTrainedConfig:
    """
    Configuration of the MLLM in a folder.

    Raises:
        ValueError: for another type or width than the checkpoint needs.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in MLLM_TYPES[layout]:
        raise ValueError(
            f"{folder / 'config.json'}: is of type {kind!r}, but Omni-Video 2 {layout} needs "
            f"{' or '.join(map(repr, MLLM_TYPES[layout]))}: give the released Qwen3-VL-30B-A3B-Instruct by `--mllm`."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # values of any kind, checked by transformers
        raise ValueError(f"{folder / 'config.json'}: makes no configuration ({error}).") from error
    width = config.get_text_config().hidden_size
    if width != mllm_hidden_size:
        raise ValueError(
            f"{folder / 'config.json'}: the MLLM is {width} wide, but the adapter takes states of {mllm_hidden_size}: "
            "give the MLLM that the checkpoint was trained with by `--mllm`."
        )
    return config


def mllm_model(config: PreTrainedConfig) -> torch.nn.Module:
    """The MLLM on the meta device."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def qwen_processor(folder: Path) -> OmniVideo2Processor:
    """The processor with the tokenizer and the pixel settings of an MLLM's folder."""
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, "eos_token")
    settings: dict[str, Any] = read_json(folder / VIDEO_PREPROCESSOR) if (folder / VIDEO_PREPROCESSOR).exists() else {}
    return OmniVideo2Processor(
        tokenizer, **{name: settings[name] for name in _PREPROCESSOR_FIELDS if name in settings}
    )


def check_experts(models: dict[str, torch.nn.Module]) -> None:
    """Whether neighbours in the pipeline fit each other; a `ValueError` names the two that do not."""
    adapter, decoder = models["adapter"].config, models["transformer"].config
    pairs = {
        "adapter hidden_size": (adapter.hidden_size, decoder.text_dim),
        "adapter latent_channels": (adapter.latent_channels, models["vae"].config.z_dim),
        "transformer in_channels": (decoder.in_channels, models["vae"].config.z_dim),
        "text_encoder d_model": (models["text_encoder"].config.d_model, adapter.hidden_size),
    }
    for name in ("transformer", "adapter"):
        second = models.get(f"{name}_2")
        if second is not None:
            own, other = ({k: v for k, v in models[m].config.items() if k[0] != "_"} for m in (name, f"{name}_2"))
            pairs[f"{name}_2 configuration"] = (other, own)
    for name, (value, wanted) in pairs.items():
        if value != wanted:
            raise ValueError(f"The {name} is {value}, but its neighbour has {wanted}: the parts do not fit together.")


def check_mllm_files(model: torch.nn.Module, folder: Path) -> None:
    """Refuse an MLLM without weights, with weights of another model, or with pickles."""
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: has no .safetensors files. Download the MLLM's weights as safetensors.")
    header = {
        name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in read_header(file).items()
    }
    # Released weights of experts are stored transposed, which loading turns round, so the order of a shape is free.
    found = {name: sorted(shape) for name, (_, shape, _) in header.items()}
    wanted = {name: sorted(shape) for name, shape in expected_tensors(model).items()}
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit config.json: {some_names(wrong)}. Download them again.")
