"""The components of a converted repository: their configurations, read off upstream's files and tensor shapes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from original_checkpoint import TEXT_ENCODER, VILA, WAN_CONFIG, WAN_VAE, OriginalCheckpoint, Part
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from omni_video_hf import OmniVideoAdapter, OmniVideoConfig, OmniVideoForConditionalGeneration, VilaConfig
from omni_video_hf.processing_omni_video import IMAGE_GENERATION_TOKEN, IMAGE_TOKEN, VIDEO_GENERATION_TOKEN

# Not to be read off the weights: fixed in upstream's code.
BRIDGE_HEADS = 8
UMT5_MAX_DISTANCE = 128


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
    text, vision = checkpoint.json(f"{VILA}/llm/config.json"), checkpoint.json(f"{VILA}/vision_tower/config.json")
    feature_layer = _check_vila(checkpoint)
    part = checkpoint.mllm()
    rows = part.tensors["mllm.model.language_model.embed_tokens.weight"].shape[0]
    vocabulary = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if rows != vocabulary:
        raise ValueError(
            f"{checkpoint.root / VILA / 'llm'}: the tokenizer has {vocabulary} tokens, but the embedding has {rows} "
            "rows. Upstream would cut rows off or make random ones up; convert a checkpoint whose parts fit."
        )
    head = _bridge_sizes(part, "vision_head.query_transformer.")
    config = OmniVideoConfig(
        mllm_config=VilaConfig(
            text_config=text, vision_config=vision, vision_feature_layer=feature_layer, image_token_id=vocabulary
        ),
        vision_head_config={
            "mllm_hidden_size": head.pop("input_size"),
            "null_length": part.tensors["vision_head.null_hidden_states.weight"].shape[0],
            **head,
        },
        adapter_config=None,
        decoder_config=None,
        image_generation_token_id=_generation_token(tokenizer, IMAGE_GENERATION_TOKEN, 2),
        video_generation_token_id=_generation_token(tokenizer, VIDEO_GENERATION_TOKEN, 3),
    )
    with torch.device("meta"):
        model = OmniVideoForConditionalGeneration(config)
    model.generation_config = _generation_config(checkpoint, tokenizer)
    tower = "mllm.model.vision_tower."
    layers = range(config.mllm_config.num_vision_layers, config.mllm_config.vision_config.num_hidden_layers)
    behind = tuple(f"{tower}encoder.layers.{layer}." for layer in layers)
    unused = [name for name in part.tensors if name.startswith((*behind, f"{tower}head."))]
    return Component("mllm", model, checkpoint.mllm, "model", unused)


def adapter_component(checkpoint: OriginalCheckpoint, max_context_length: int, with_markers: bool) -> Component:
    """Adapter and visual context adapter."""

    def load() -> Part:
        return checkpoint.adapter(with_markers)

    part = load()
    sizes = _bridge_sizes(part, "query_transformer.")
    patch = _tensor(part, "visual_context_adapter.patch_embedding.weight").shape
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
    original = checkpoint.json(WAN_CONFIG)
    part = checkpoint.transformer()
    patch = _tensor(part, "patch_embedding.weight").shape
    try:
        heads = original["num_heads"]
        config = {
            "patch_size": list(patch[2:]),
            "num_attention_heads": heads,
            "attention_head_dim": original["dim"] // heads,
            "in_channels": original["in_dim"],
            "out_channels": original["out_dim"],
            "text_dim": _tensor(part, "condition_embedder.text_embedder.linear_1.weight").shape[1],
            "freq_dim": original["freq_dim"],
            "ffn_dim": original["ffn_dim"],
            "num_layers": original["num_layers"],
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": original["eps"],
        }
    except KeyError as error:
        raise ValueError(f"{checkpoint.root / WAN_CONFIG}: has no {error}.") from None
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    return Component("transformer", model, checkpoint.transformer, "diffusion_pytorch_model")


def vae_component(checkpoint: OriginalCheckpoint) -> Component | None:
    """The Wan VAE, if the checkpoint has it."""
    if not checkpoint.has(WAN_VAE):
        return None
    part = checkpoint.vae()
    with torch.device("meta"):
        model = AutoencoderKLWan(
            base_dim=_tensor(part, "encoder.conv_in.weight").shape[0],
            z_dim=_tensor(part, "post_quant_conv.weight").shape[0],
        )
    return Component("vae", model, checkpoint.vae, "diffusion_pytorch_model")


def text_encoder_component(checkpoint: OriginalCheckpoint) -> Component | None:
    """umT5, if the checkpoint has it."""
    if not checkpoint.has(TEXT_ENCODER):
        return None
    part = checkpoint.text_encoder()
    vocab_size, width = _tensor(part, "shared.weight").shape
    block = "encoder.block.0.layer."
    buckets, heads = _tensor(part, f"{block}0.SelfAttention.relative_attention_bias.weight").shape
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=_tensor(part, f"{block}0.SelfAttention.q.weight").shape[0] // heads,
        d_ff=_tensor(part, f"{block}1.DenseReluDense.wi_0.weight").shape[0],
        num_layers=_count_layers(part, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=UMT5_MAX_DISTANCE,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    return Component("text_encoder", model, checkpoint.text_encoder, "model")


def expected_tensors(component: Component) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the component's files must have; tied weights are stored once."""
    tied = getattr(component.model, "all_tied_weights_keys", {})
    return {name: tuple(t.shape) for name, t in component.model.state_dict().items() if name not in tied}


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """State a number format in a configuration and those inside it."""
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name) is not None:
            _set_dtype(getattr(config, name), dtype)


def _check_vila(checkpoint: OriginalCheckpoint) -> int:
    """Refuse VILA settings that the port does not reproduce; returns the selected layer."""
    name = f"{VILA}/config.json"
    config = checkpoint.json(name)
    projector = checkpoint.json(f"{VILA}/mm_projector/config.json")
    tower = checkpoint.json(f"{VILA}/vision_tower/config.json")
    allowed = {
        "mm_use_im_start_end": (config.get("mm_use_im_start_end", False), (False,)),
        "mm_use_im_patch_token": (config.get("mm_use_im_patch_token", True), (False,)),
        "mm_vision_select_feature": (config.get("mm_vision_select_feature"), ("cls_patch",)),
        "s2": (config.get("s2", False), (False, None)),
        "mm_projector_type": (projector.get("mm_projector_type"), ("mlp_downsample",)),
        "vision tower": (tower.get("model_type"), ("siglip_vision_model",)),
    }
    for key, (value, supported) in allowed.items():
        if value not in supported:
            raise ValueError(f"{checkpoint.root / name}: {key} is {value!r}; only {supported[0]!r} is supported.")
    layer = config.get("mm_vision_select_layer")
    if not isinstance(layer, int):
        raise ValueError(f"{checkpoint.root / name}: mm_vision_select_layer is {layer!r}; it must be a number.")
    return layer


def _bridge_sizes(part: Part, prefix: str) -> dict[str, Any]:
    """Sizes of a query transformer."""
    queries = _tensor(part, f"{prefix}query_tokens").shape
    return {
        "input_size": _tensor(part, f"{prefix}input_proj_1.weight").shape[1],
        "hidden_size": queries[2],
        "intermediate_size": _tensor(part, f"{prefix}encoder_layers.0.mlp.fc1.weight").shape[0],
        "num_encoder_layers": _count_layers(part, f"{prefix}encoder_layers."),
        "num_decoder_layers": _count_layers(part, f"{prefix}decoder_layers."),
        "num_attention_heads": BRIDGE_HEADS,
        "num_query_tokens": queries[1],
    }


def _count_layers(part: Part, prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in part.tensors if name.startswith(prefix))


def _tensor(part: Part, name: str) -> torch.Tensor:
    """A tensor that a configuration is read from."""
    if name not in part.tensors:
        raise ValueError(f"{', '.join(sorted(part.files))}: the weight {name!r} is missing, in its upstream name.")
    return part.tensors[name]


def _generation_token(tokenizer: PreTrainedTokenizerBase, token: str, offset: int) -> int:
    """Id of a routing token; where the tokenizer lacks it, upstream's literal, counted from bos."""
    ids = tokenizer.encode(token, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else tokenizer.bos_token_id + offset


def missing_generation_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Routing tokens that the tokenizer splits into pieces."""
    tokens = (IMAGE_GENERATION_TOKEN, VIDEO_GENERATION_TOKEN)
    return [token for token in tokens if len(tokenizer.encode(token, add_special_tokens=False)) != 1]


def _generation_config(checkpoint: OriginalCheckpoint, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Upstream's sampling: its arguments, and the stop ids of the checkpoint with the end of a turn."""
    name = f"{VILA}/llm/generation_config.json"
    stored = checkpoint.json(name) if checkpoint.has(name) else {}
    eos = stored.get("eos_token_id", tokenizer.eos_token_id)
    eos = eos if isinstance(eos, list) else [eos]
    end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    return GenerationConfig(
        do_sample=True,
        temperature=0.2,
        top_p=1.0,
        max_new_tokens=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys([*eos, end_of_turn])),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
