"""
A checkpoint in upstream's layout without upstream: names, shapes and formats of the released one, weights of zero.

Its files are as long as the released ones but sparse: 40 GB take a few MB of disk. Settings and tokenizers come from
the tiny golden checkpoint of the tests, the sizes in them replaced.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import WanTransformer3DModel
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch.serialization import skip_data
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from omni_video_hf.models.configuration_omni_video import WAN_2_1_T2V_1_3B
from omni_video_hf.utils.files import complete_or_absent

TEMPLATE = Path(__file__).parents[1] / "tests" / "data" / "core_A" / "omni_ckpts"
TEMPLATE_VAE_WIDTH, LATENT_CHANNELS = 4, 16
WAN = "wan/wanxiang1_3b"
VILA = "ar_model/checkpoint"
MARKERS = ("<img_st>", "<img_ed>", "<ipl_st>", "<ipl_ed>", "<prp_st>", "<prp_ed>")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Widths and depths; the released model's by default."""

    llm_width: int = 4096
    llm_ffn: int = 14336
    llm_layers: int = 32
    llm_heads: int = 32
    llm_key_heads: int = 8
    vocabulary: int = 128257
    tower_width: int = 1152
    tower_ffn: int = 4304
    tower_layers: int = 27
    tower_image: int = 384
    head_width: int = 1152
    bridge_layers: int = 4
    text_width: int = 4096
    text_ffn: int = 10240
    text_layers: int = 24
    text_vocabulary: int = 256384
    decoder_layers: int = 30
    queries: int = 256
    vae_width: int = 96
    null_length: int = 164


RELEASED = Sizes()
# About 1 GB in bfloat16, every part in it.
SMALL = Sizes(
    llm_width=1024, llm_ffn=3584, llm_layers=8, llm_heads=8, llm_key_heads=2, vocabulary=8192, tower_width=256,
    tower_ffn=1024, tower_layers=4, tower_image=98, head_width=256, bridge_layers=2, text_width=1024, text_ffn=2560,
    text_layers=4, text_vocabulary=16384, decoder_layers=3, queries=16, vae_width=24, null_length=16,
)  # fmt: skip


def write_checkpoint(folder: Path, sizes: Sizes = RELEASED, dtype: torch.dtype = torch.bfloat16) -> int:
    """
    Write upstream's whole `omni_ckpts`.

    Args:
        folder: to make; it must not exist.
        sizes: of all parts.
        dtype: of the weights; those of the VAE are in float32, as upstream's.

    Returns:
        Bytes of all weights.

    Raises:
        FileExistsError: when the folder exists.
    """
    ignored = shutil.ignore_patterns("*.safetensors", "*.pth", "*.pt", "*.bin", "*.pkl")
    shutil.copytree(TEMPLATE, folder, ignore=ignored)
    _write_settings(folder, sizes)
    head = query_transformer("visionHeadAdapter", sizes.llm_width, sizes.head_width, 4, sizes.bridge_layers)
    adapter = query_transformer("adapter", sizes.head_width, sizes.text_width, sizes.queries, sizes.bridge_layers)
    wan = wan_transformer(sizes)
    visual = {
        "patch_embedding.weight": (1536, LATENT_CHANNELS, 1, 4, 4),
        "patch_embedding.bias": (1536,),
        "projection.weight": (sizes.text_width, 1536),
        "projection.bias": (sizes.text_width,),
    }
    trained = {"wan_model.": wan, "adapter.": adapter, "ar_vision_head.": head, "visual_context_adapter.": visual}
    files = {
        f"{WAN}/diffusion_pytorch_model.safetensors": wan,
        f"{WAN}/models_t5_umt5-xxl-enc-bf16.pth": umt5(sizes),
        f"{WAN}/Wan2.1_VAE.pth": wan_vae(sizes.vae_width),
        "adapter/model.pt": adapter,
        "vision_head/vision_head/pytorch_model.bin": head,
        "transformer/model.pt": {prefix + name: s for prefix, part in trained.items() for name, s in part.items()},
        f"{VILA}/llm/model.safetensors": language_model(sizes),
        f"{VILA}/vision_tower/model.safetensors": vision_tower(sizes),
        f"{VILA}/mm_projector/model.safetensors": projector(sizes),
    }
    written = 0
    for name, shapes in track(files.items(), description="synthetic checkpoint"):
        stored = torch.float32 if name.endswith("Wan2.1_VAE.pth") else dtype
        write_sparse(folder / name, shapes, stored)
        written += sum(torch.Size(shape).numel() for shape in shapes.values()) * stored.itemsize
    _write_stored_states(folder, sizes)
    return written


# --- files ----------------------------------------------------------------------------------------------------------


def write_sparse(file: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    """A safetensors or torch file of zeros that takes no room on a disk with sparse files."""
    if file.suffix == ".safetensors":
        start, header = 0, {}
        for name, shape in shapes.items():
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            code = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + start)
        return
    weights = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}  # memory nobody touches
    wrapper = {"adapter": "model_state_dict", "transformer": "module"}.get(file.parent.name)
    with skip_data():
        torch.save({wrapper: weights} if wrapper else weights, file)


def _write_stored_states(folder: Path, sizes: Sizes) -> None:
    """Null states and markers, small and in torch's plain format."""
    states = {
        "text_emb": [torch.zeros(1, sizes.text_width)],
        "vlm_last_hidden_states": torch.zeros(1, sizes.null_length, sizes.llm_width),
    }
    torch.save(states, folder / "unconditioned_context/context.pkl")
    markers = {name: torch.zeros(1, sizes.text_width) for name in MARKERS}
    torch.save(markers, folder / "special_tokens/tokens.pkl")


def _write_settings(folder: Path, sizes: Sizes) -> None:
    """Put the sizes into the template's settings, and as many tokens as the embedding has rows into its tokenizer."""
    llm = {
        "hidden_size": sizes.llm_width,
        "intermediate_size": sizes.llm_ffn,
        "num_hidden_layers": sizes.llm_layers,
        "num_attention_heads": sizes.llm_heads,
        "num_key_value_heads": sizes.llm_key_heads,
        "head_dim": sizes.llm_width // sizes.llm_heads,
        "vocab_size": sizes.vocabulary,
    }
    _update(folder / VILA / "llm/config.json", llm)
    _update(folder / VILA / "vision_tower/config.json", tower_settings(sizes))
    square = {"height": sizes.tower_image, "width": sizes.tower_image}
    _update(folder / VILA / "vision_tower/preprocessor_config.json", {"size": square})
    decoder = WAN_2_1_T2V_1_3B
    wan = {
        "dim": decoder["num_attention_heads"] * decoder["attention_head_dim"],
        "num_heads": decoder["num_attention_heads"],
        "ffn_dim": decoder["ffn_dim"],
        "freq_dim": decoder["freq_dim"],
        "num_layers": sizes.decoder_layers,
    }
    _update(folder / WAN / "config.json", wan)
    file = folder / VILA / "llm/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    taken = 1 + max(token["id"] for token in tokenizer["added_tokens"])
    tokenizer["model"]["vocab"] |= {f"filler{index}": index for index in range(taken, sizes.vocabulary)}
    file.write_text(json.dumps(tokenizer))


def _update(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2))


# --- names and shapes, part by part, as upstream has them -----------------------------------------------------------


def _shapes(module: torch.nn.Module, prefix: str = "") -> Shapes:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def query_transformer(net: str, inputs: int, width: int, queries: int, layers: int) -> Shapes:
    """Vision head or adapter."""
    with torch.device("meta"):
        network = torch.nn.Transformer(width, 8, layers, layers, 4 * width, norm_first=True)
        projection = torch.nn.Sequential(
            torch.nn.Linear(inputs, width), torch.nn.GELU(), torch.nn.Linear(width, width)
        )
    return {"decoder_query": (1, queries, width)} | _shapes(projection, "fc.") | _shapes(network, f"{net}.")


def wan_transformer(sizes: Sizes) -> Shapes:
    """Wan's transformer in its original names."""
    with torch.device("meta"):
        ours = WanTransformer3DModel(
            **WAN_2_1_T2V_1_3B | {"num_layers": sizes.decoder_layers, "text_dim": sizes.text_width}
        )
    renamed = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "attn1.": "self_attn.",
        "attn2.": "cross_attn.",
        ".to_out.0.": ".o.",
        ".to_q.": ".q.",
        ".to_k.": ".k.",
        ".to_v.": ".v.",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        ".norm2.": ".norm3.",
        "proj_out": "head.head",
    }
    shapes = {}
    for name, shape in _shapes(ours).items():
        for new, old in renamed.items():
            name = name.replace(new, old)  # noqa: PLW2901
        name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")  # noqa: PLW2901
        shapes[name] = shape
    return shapes


def wan_vae(width: int) -> Shapes:
    """Wan's VAE: the template's, with all widths but those of pictures, latents and kernels multiplied."""
    factor = width // TEMPLATE_VAE_WIDTH
    template = torch.load(TEMPLATE / WAN / "Wan2.1_VAE.pth", weights_only=True, mmap=True)
    # where latents come in or go out: which of the first two dimensions are the latents'
    latents = {"conv1": (0, 1), "conv2": (0, 1), "encoder.head.2": (0,), "decoder.conv1": (1,)}

    def scaled(name: str, shape: torch.Size) -> tuple[int, ...]:
        kept = latents.get(name.rpartition(".")[0], ())
        return tuple(
            size if place > 1 or place in kept or size in (1, 3) else size * factor for place, size in enumerate(shape)
        )

    return {name: scaled(name, tensor.shape) for name, tensor in template.items()}


def umt5(sizes: Sizes) -> Shapes:
    """umT5's encoder in the names of Wan's own."""
    width, inner, heads = sizes.text_width, sizes.text_width, sizes.text_width // 64
    block = {
        "norm1.weight": (width,),
        **{f"attn.{name}.weight": (inner, width) for name in "qkv"},
        "attn.o.weight": (width, inner),
        "norm2.weight": (width,),
        "ffn.gate.0.weight": (sizes.text_ffn, width),
        "ffn.fc1.weight": (sizes.text_ffn, width),
        "ffn.fc2.weight": (width, sizes.text_ffn),
        "pos_embedding.embedding.weight": (32, heads),
    }
    blocks = {f"blocks.{index}.{name}": s for index in range(sizes.text_layers) for name, s in block.items()}
    return {"token_embedding.weight": (sizes.text_vocabulary, width)} | blocks | {"norm.weight": (width,)}


def language_model(sizes: Sizes) -> Shapes:
    """Llama."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.llm_width,
        intermediate_size=sizes.llm_ffn,
        num_hidden_layers=sizes.llm_layers,
        num_attention_heads=sizes.llm_heads,
        num_key_value_heads=sizes.llm_key_heads,
    )
    with torch.device("meta"):
        return _shapes(LlamaForCausalLM(config))


def tower_settings(sizes: Sizes) -> dict[str, int]:
    """SigLIP's sizes in transformers' words."""
    return {
        "hidden_size": sizes.tower_width,
        "intermediate_size": sizes.tower_ffn,
        "num_hidden_layers": sizes.tower_layers,
        "num_attention_heads": sizes.tower_width // 64 if sizes.tower_width % 72 else sizes.tower_width // 72,
        "image_size": sizes.tower_image,
    }


def vision_tower(sizes: Sizes) -> Shapes:
    """SigLIP, behind the prefix that its files had in upstream's version of transformers."""
    with torch.device("meta"):
        tower = SiglipVisionModel(SiglipVisionConfig(patch_size=14, **tower_settings(sizes)))
    return _shapes(tower, "vision_model.")


def projector(sizes: Sizes) -> Shapes:
    """VILA's projector of four neighbouring patches."""
    merged, width = 4 * sizes.tower_width, sizes.llm_width
    layers = {"1": (merged,), "2": (width, merged), "4": (width, width)}
    weights = {f"layers.{layer}.weight": shape for layer, shape in layers.items()}
    return weights | {f"layers.{layer}.bias": (shape[0],) for layer, shape in layers.items()}


def fill(folder: Path) -> None:
    """Replace the zeros of a converted repository by random numbers, so that nothing about it is sparse."""
    generator = torch.Generator().manual_seed(0)
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no dict
        drawn = {name: torch.randn(t.shape, generator=generator).mul_(0.02).to(t.dtype) for name, t in tensors.items()}
        with complete_or_absent(file) as partial:
            save_file(drawn, partial, metadata={"format": "pt"})


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    small: Annotated[bool, typer.Option("--small", help="1 GB instead of the released sizes.")] = False,
) -> None:
    """Write a synthetic checkpoint, to try the conversion on."""
    written = write_checkpoint(folder, SMALL if small else RELEASED)
    typer.echo(f"{folder}: {written / 1e9:.1f} GB of weights")


if __name__ == "__main__":
    typer.run(main)
