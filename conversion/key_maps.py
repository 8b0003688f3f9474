"""
Upstream's tensor names to ours, one function per component.

Every function takes a state dict in upstream's names and returns the same tensors under ours. Tensors are only renamed
or viewed, never copied, so memory-mapped ones stay on disk.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

StateDict = dict[str, torch.Tensor]
Rules = Iterable[tuple[str, str]]

# Upstream's bridges are `torch.nn.Transformer`s behind a two-layer projection.
QUERY_TRANSFORMER_RULES: Rules = (
    (r"^decoder_query$", r"query_tokens"),
    (r"^fc\.0\.(weight|bias)$", r"input_proj_1.\1"),
    (r"^fc\.2\.(weight|bias)$", r"input_proj_2.\1"),
    (r"^{net}\.(encoder|decoder)\.norm\.(weight|bias)$", r"\1_norm.\2"),
    (r"^{net}\.(encoder|decoder)\.layers\.(\d+)\.self_attn\.out_proj\.(.+)$", r"\1_layers.\2.self_attn.out_proj.\3"),
    (r"^{net}\.decoder\.layers\.(\d+)\.multihead_attn\.out_proj\.(.+)$", r"decoder_layers.\1.cross_attn.out_proj.\2"),
    (r"^{net}\.(encoder|decoder)\.layers\.(\d+)\.linear1\.(.+)$", r"\1_layers.\2.mlp.fc1.\3"),
    (r"^{net}\.(encoder|decoder)\.layers\.(\d+)\.linear2\.(.+)$", r"\1_layers.\2.mlp.fc2.\3"),
    (r"^{net}\.(encoder|decoder)\.layers\.(\d+)\.norm1\.(.+)$", r"\1_layers.\2.self_attn_norm.\3"),
    (r"^{net}\.encoder\.layers\.(\d+)\.norm2\.(.+)$", r"encoder_layers.\1.mlp_norm.\2"),
    (r"^{net}\.decoder\.layers\.(\d+)\.norm2\.(.+)$", r"decoder_layers.\1.cross_attn_norm.\2"),
    (r"^{net}\.decoder\.layers\.(\d+)\.norm3\.(.+)$", r"decoder_layers.\1.mlp_norm.\2"),
)
FUSED_ATTENTION = (
    (r"^{net}\.(encoder|decoder)\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$", r"\1_layers.\2.self_attn", 3),
    (r"^{net}\.decoder\.layers\.(\d+)\.multihead_attn\.in_proj_(weight|bias)$", r"decoder_layers.\1.cross_attn", 2),
)
VISUAL_CONTEXT_RULES: Rules = (
    (r"^patch_embedding\.(weight|bias)$", r"visual_context_adapter.patch_embedding.\1"),
    (r"^projection\.(weight|bias)$", r"visual_context_adapter.proj.\1"),
)
UMT5_RULES: Rules = (
    (r"^token_embedding\.weight$", r"shared.weight"),
    (r"^norm\.weight$", r"encoder.final_layer_norm.weight"),
    (r"^blocks\.(\d+)\.norm1\.weight$", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"^blocks\.(\d+)\.norm2\.weight$", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.weight$", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.weight$",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.weight$", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"^blocks\.(\d+)\.ffn\.fc1\.weight$", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"^blocks\.(\d+)\.ffn\.fc2\.weight$", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)
# VILA's folders, each with a state dict of its own.
LANGUAGE_RULES: Rules = (
    (r"^model\.(.+)$", r"model.language_model.\1"),
    (r"^(lm_head\.weight)$", r"\1"),
)
VISION_TOWER_RULES: Rules = ((r"^vision_model\.(.+)$", r"\1"),)
PROJECTOR_RULES: Rules = (
    (r"^layers\.1\.(weight|bias)$", r"norm.\1"),
    (r"^layers\.2\.(weight|bias)$", r"linear_1.\1"),
    (r"^layers\.4\.(weight|bias)$", r"linear_2.\1"),
)


def rename(state_dict: Mapping[str, torch.Tensor], rules: Rules) -> tuple[StateDict, list[str]]:
    """Apply the first rule that fits each name; returns the renamed tensors and the names no rule fits."""
    renamed, unknown = {}, []
    for name, tensor in state_dict.items():
        for pattern, replacement in rules:
            if re.match(pattern, name):
                renamed[re.sub(pattern, replacement, name)] = tensor
                break
        else:
            unknown.append(name)
    return renamed, unknown


def convert_query_transformer(state_dict: Mapping[str, torch.Tensor], net: str) -> tuple[StateDict, list[str]]:
    """
    Vision head (`net="visionHeadAdapter"`) or adapter (`net="adapter"`) to `OmniVideoQueryTransformer`.

    The fused `in_proj` of `torch.nn.MultiheadAttention` becomes separate query, key and value projections.
    """
    fused = [(re.compile(pattern.format(net=net)), target, kind) for pattern, target, kind in FUSED_ATTENTION]
    converted, plain = {}, {}
    for name, tensor in state_dict.items():
        for pattern, target, kind in fused:
            if match := pattern.match(name):
                parts = zip("qkv", tensor.chunk(3), strict=True)
                converted |= {f"{match.expand(target)}.{p}_proj.{match[kind]}": part for p, part in parts}
                break
        else:
            plain[name] = tensor
    renamed, unknown = rename(
        plain, [(pattern.format(net=net), target) for pattern, target in QUERY_TRANSFORMER_RULES]
    )
    return converted | renamed, unknown


def convert_with_diffusers(
    converter: Callable[[StateDict], StateDict], state_dict: Mapping[str, torch.Tensor]
) -> tuple[StateDict, list[str]]:
    """One of diffusers' own converters; a name it folds onto another is reported as unknown."""
    converted = converter(dict(state_dict))
    kept = {id(tensor) for tensor in converted.values()}
    return converted, [name for name, tensor in state_dict.items() if id(tensor) not in kept]


def convert_wan_transformer(state_dict: Mapping[str, torch.Tensor]) -> tuple[StateDict, list[str]]:
    """Original Wan transformer to `WanTransformer3DModel`."""
    return convert_with_diffusers(convert_wan_transformer_to_diffusers, state_dict)


def convert_wan_vae(state_dict: Mapping[str, torch.Tensor]) -> tuple[StateDict, list[str]]:
    """Original Wan VAE to `AutoencoderKLWan`."""
    return convert_with_diffusers(convert_wan_vae_to_diffusers, state_dict)


def convert_umt5(state_dict: Mapping[str, torch.Tensor]) -> tuple[StateDict, list[str]]:
    """Wan's umT5 encoder to `UMT5EncoderModel`."""
    return rename(state_dict, UMT5_RULES)
