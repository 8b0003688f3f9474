"""The components of a converted repository: their configurations, read off upstream's files and tensor shapes."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from omni_video_hf import OmniVideoAdapter, OmniVideoConfig, OmniVideoForConditionalGeneration
from omni_video_hf.hub.inspection import DTYPE_NAMES
from omni_video_hf.hub.repository import read_header
from omni_video_hf.tasks import IMAGE_GENERATION_TOKEN, VIDEO_GENERATION_TOKEN
from omni_video_hf.utils.safe_load import CorruptCheckpointError

from .original_checkpoint import TEXT_ENCODER, WAN_CONFIG, WAN_VAE, OriginalCheckpoint, Part
from .vila_settings import generation_config, generation_token_id, vila_config

# Not to be read off the weights: fixed in upstream's code.
BRIDGE_HEADS = 8
BRIDGE_ACTIVATION = "relu"
UMT5_MAX_DISTANCE = 128
UMT5_FEED_FORWARD = "gated-gelu"
WAN_LATENT_CHANNELS = 16  # Wan2.1_VAE.pth; statistics of its latents come with the class

# Settings of upstream's Wan code that `WanTransformer3DModel` has no other values of.
WAN_FIXED = {"model_type": "t2v", "qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}


@dataclass
class Component:
    """One folder of the output."""

    name: str
    model: torch.nn.Module  # on the meta device
    load: Callable[[], Part]  # opens the source files anew, so that their memory can be given back between shards
    weights_name: str  # stem of its files
    unused: list[str] = field(default_factory=list)  # weights that upstream's code never reads

    def save_config(self, folder: Path, dtype: torch.dtype) -> None:
        """Write `config.json`, which names the weights' number format, and what else belongs beside it."""
        if self.weights_name == "diffusion_pytorch_model":
            self.model.save_config(folder)
            return
        self.model.config.architectures = [type(self.model).__name__]
        _set_dtype(self.model.config, dtype)
        self.model.config.save_pretrained(folder)
        if self.name == "mllm":
            self.model.generation_config.save_pretrained(folder)


def mllm_component(checkpoint: OriginalCheckpoint, tokenizer: PreTrainedTokenizerBase) -> Component:
    """VILA and vision head; `tokenizer` is the language model's own, `<image>` added behind its vocabulary."""
    part = checkpoint.mllm()
    vila = vila_config(checkpoint, tokenizer)
    head = _bridge_sizes(part, "vision_head.query_transformer.")
    config = OmniVideoConfig(
        mllm_config=vila,
        vision_head_config={
            "mllm_hidden_size": head.pop("input_size"),
            "null_length": part.tensors["vision_head.null_hidden_states.weight"].shape[0],
            **head,
        },
        adapter_config=None,
        decoder_config=None,
        image_generation_token_id=generation_token_id(tokenizer, IMAGE_GENERATION_TOKEN),
        video_generation_token_id=generation_token_id(tokenizer, VIDEO_GENERATION_TOKEN),
    )
    with torch.device("meta"):
        model = OmniVideoForConditionalGeneration(config)
    model.generation_config = generation_config(checkpoint, tokenizer)
    tower = "mllm.model.vision_tower."
    layers = range(vila.num_vision_layers, vila.vision_config.num_hidden_layers)
    behind = tuple(f"{tower}encoder.layers.{layer}." for layer in layers)
    unused = [name for name in part.tensors if name.startswith((*behind, f"{tower}head."))]
    return Component("mllm", model, checkpoint.mllm, "model", unused)


def adapter_component(checkpoint: OriginalCheckpoint, max_context_length: int, with_markers: bool) -> Component:
    """Adapter and visual context adapter."""

    def load() -> Part:
        return checkpoint.adapter(with_markers)

    part = load()
    sizes = _bridge_sizes(part, "query_transformer.")
    patch = needed_tensor(part, "visual_context_adapter.patch_embedding.weight").shape
    with torch.device("meta"):
        model = OmniVideoAdapter(
            vision_hidden_size=sizes.pop("input_size"),
            latent_channels=patch[1],
            visual_context_size=patch[0],
            visual_context_patch_size=list(patch[2:]),
            use_markers=with_markers,
            null_prompt_length=part.tensors["null_prompt_embeds.weight"].shape[0],
            max_context_length=max_context_length,
            **sizes,
        )
    return Component("adapter", model, load, "diffusion_pytorch_model")


def transformer_component(checkpoint: OriginalCheckpoint) -> Component:
    """The Wan transformer."""
    part = checkpoint.transformer()
    original, file = checkpoint.json(WAN_CONFIG), checkpoint.root / WAN_CONFIG
    for name, supported in WAN_FIXED.items():
        if original.get(name, supported) != supported:
            raise ValueError(f"{file}: {name} is {original[name]!r}; only {supported!r} is supported.")
    sizes = ("dim", "num_heads", "in_dim", "out_dim", "freq_dim", "ffn_dim", "num_layers")
    wrong = [name for name in sizes if type(original.get(name)) is not int or original[name] < 1]
    wrong += [] if isinstance(original.get("eps"), float) else ["eps"]
    if wrong:
        raise CorruptCheckpointError(f"{file}: has no usable {', '.join(wrong)}.")
    layers = count_layers(part, "blocks.")
    if original["num_layers"] != layers:
        raise ValueError(f"{file}: num_layers is {original['num_layers']}, but there are weights of {layers} layers.")
    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=list(needed_tensor(part, "patch_embedding.weight").shape[2:]),
            num_attention_heads=original["num_heads"],
            attention_head_dim=original["dim"] // original["num_heads"],
            in_channels=original["in_dim"],
            out_channels=original["out_dim"],
            text_dim=needed_tensor(part, "condition_embedder.text_embedder.linear_1.weight").shape[1],
            freq_dim=original["freq_dim"],
            ffn_dim=original["ffn_dim"],
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=original["eps"],
        )
    return Component("transformer", model, checkpoint.transformer, "diffusion_pytorch_model")


def vae_component(checkpoint: Any, file: str = WAN_VAE) -> Component | None:
    """The Wan VAE, if the checkpoint has it."""
    if not checkpoint.has(file):
        return None
    part = checkpoint.vae()
    channels = needed_tensor(part, "post_quant_conv.weight").shape[0]
    if channels != WAN_LATENT_CHANNELS:
        raise ValueError(
            f"{checkpoint.root / file}: has {channels} latent channels; Wan 2.1's VAE has {WAN_LATENT_CHANNELS}. "
            "Remove the file and give a repository with the right one by `--wan-repo`."
        )
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=needed_tensor(part, "encoder.conv_in.weight").shape[0], z_dim=channels)
    return Component("vae", model, checkpoint.vae, "diffusion_pytorch_model")


def text_encoder_component(checkpoint: Any, file: str = TEXT_ENCODER) -> Component | None:
    """umT5, if the checkpoint has it."""
    if not checkpoint.has(file):
        return None
    part = checkpoint.text_encoder()
    vocab_size, width = needed_tensor(part, "shared.weight").shape
    block = "encoder.block.0.layer."
    buckets, heads = needed_tensor(part, f"{block}0.SelfAttention.relative_attention_bias.weight").shape
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=needed_tensor(part, f"{block}0.SelfAttention.q.weight").shape[0] // heads,
        d_ff=needed_tensor(part, f"{block}1.DenseReluDense.wi_0.weight").shape[0],
        num_layers=count_layers(part, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=UMT5_MAX_DISTANCE,
        feed_forward_proj=UMT5_FEED_FORWARD,
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    return Component("text_encoder", model, checkpoint.text_encoder, "model")


def load_component(name: str, folder: Path) -> torch.nn.Module:
    """A component from its written configuration, on the meta device."""
    with torch.device("meta"):
        if name == "mllm":
            return OmniVideoForConditionalGeneration(OmniVideoConfig.from_pretrained(folder))
        if name == "text_encoder":
            return UMT5EncoderModel(UMT5Config.from_pretrained(folder))
        classes = {"adapter": OmniVideoAdapter, "transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}
        return classes[name].from_config(classes[name].load_config(folder))


def expected_tensors(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the files of a component must have; tied weights are stored once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def check_files(model: torch.nn.Module, folder: Path, dtypes: dict[str, torch.dtype] | None = None) -> None:
    """Compare the headers of a component's files with its model, by name, shape and, where given, number format."""
    header = {
        name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in read_header(file).items()
    }
    tied = getattr(model, "all_tied_weights_keys", {})
    written = {tied.get(name, name): shape for name, (_, shape, _) in header.items()}
    wrong = sorted(written.items() ^ expected_tensors(model).items())
    if wrong:
        raise ValueError(f"{folder}: the files do not fit the configuration: {wrong[:20]}. Make the folder again.")
    if dtypes is not None:
        found = {name: DTYPE_NAMES.get(dtype) for name, (dtype, _, _) in header.items()}
        if found != {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}:
            raise ValueError(f"{folder}: was written in another number format than asked for. Please report this.")


def check_widths(models: dict[str, torch.nn.Module]) -> None:
    """Whether neighbours in the pipeline fit each other; a `ValueError` names the two that do not."""
    transformer, channels = models["transformer"].config, models["vae"].config.z_dim
    whole = OmniVideoConfig(
        mllm_config=models["mllm"].config.mllm_config,
        vision_head_config=models["mllm"].config.vision_head_config,
        adapter_config=models["adapter"].attention_config,
        decoder_config={name: value for name, value in transformer.items() if name[0] != "_"},
    )
    pairs = {
        "text_encoder d_model": (models["text_encoder"].config.d_model, whole.adapter_config.hidden_size),
        "vae z_dim": (channels, transformer.in_channels),
        "adapter latent_channels": (whole.adapter_config.latent_channels, channels),
    }
    for name, (value, wanted) in pairs.items():
        if value != wanted:
            raise ValueError(
                f"The {name} is {value}, but its neighbour has {wanted}: the parts do not belong together."
            )


def grouped(names: list[str]) -> str:
    """Names of weights, those of one layer or head together."""
    groups = Counter(re.sub(r"(\.layers\.\d+|\.head)\..*", r"\1", name) for name in names)
    return ", ".join(f"{group}.* ({count})" for group, count in groups.items())


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """State a number format in a configuration and those inside it."""
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name) is not None:
            _set_dtype(getattr(config, name), dtype)


def _bridge_sizes(part: Part, prefix: str) -> dict[str, Any]:
    """Sizes of a query transformer."""
    queries = needed_tensor(part, f"{prefix}query_tokens").shape
    return {
        "input_size": needed_tensor(part, f"{prefix}input_proj_1.weight").shape[1],
        "hidden_size": queries[2],
        "intermediate_size": needed_tensor(part, f"{prefix}encoder_layers.0.mlp.fc1.weight").shape[0],
        "num_encoder_layers": count_layers(part, f"{prefix}encoder_layers."),
        "num_decoder_layers": count_layers(part, f"{prefix}decoder_layers."),
        "num_attention_heads": BRIDGE_HEADS,
        "hidden_act": BRIDGE_ACTIVATION,
        "num_query_tokens": queries[1],
    }


def count_layers(part: Part, prefix: str) -> int:
    """How many layers there are weights of. A gap in their numbers shows as a missing weight."""
    return len({name.removeprefix(prefix).split(".")[0] for name in part.tensors if name.startswith(prefix)})


def needed_tensor(part: Part, name: str) -> torch.Tensor:
    """A tensor that a configuration is read from."""
    if name not in part.tensors:
        raise ValueError(f"{', '.join(sorted(part.files))}: the weight {name!r} is missing, in its upstream name.")
    return part.tensors[name]
