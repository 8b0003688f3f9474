"""
Reading of LoRA files in every naming that tools for peft and Wan write; a file is checked before any layer is loaded.

    transformer.blocks.0.attn1.to_q.lora_A.weight                       diffusers, and files of this package
    decoder.blocks.0.attn1.to_q.lora_A.default.weight                   `checkpoint-N` folders of this trainer
    base_model.model.blocks.0.attn1.to_q.lora_A.weight                  PEFT, of the decoder or of the whole model
    [diffusion_model.]blocks.0.self_attn.q.lora_A[.default].weight      names of Wan: DiffSynth, ComfyUI, lightx2v
    lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up, .alpha   kohya, musubi-tuner
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from .layers import PEFT_PREFIX, FileLayer, LoraFile, LoraPart
from .matrices import layer_alpha, layer_matrices

logger = logging.get_logger(__name__)


# Component of the pipeline -> prefixes of its keys in the file. Those of `mllm` are the names of its children.
PREFIXES = {
    "transformer": ("transformer",),
    "adapter": ("adapter",),
    "mllm": ("mllm", "vision_head"),
    "transformer_2": ("transformer_2",),
    "adapter_2": ("adapter_2",),
}


LORA_NAME, PEFT_NAME, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)


TRAINED_NAME, EMA_NAME = "trained.safetensors", "ema.safetensors"  # files in a checkpoint of the trainer


METADATA_KEY = "lora_adapter_metadata"  # key under which diffusers stores the arguments of `LoraConfig`


WAN_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "pipe.dit.", "dit.")


KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")


# Parts of the decoder's layer names in diffusers and in the code of Wan, in the order of replacement.
WAN_NAMES = (
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".to_out.0", ".o"),
    (".add_k_proj", ".k_img"),
    (".add_v_proj", ".v_img"),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("proj_out", "head.head"),
)


# Prefixes of the decoder's layer names, in diffusers and in the code of Wan.
DECODER_CHILDREN = (
    "blocks", "condition_embedder", "patch_embedding", "proj_out", "head",
    "time_embedding", "time_projection", "text_embedding", "img_emb",
)  # fmt: skip


KNOWN_NAMINGS = (
    "diffusers' (`transformer.`, `adapter.`, `mllm.`, `vision_head.`), PEFT's (`base_model.model.`), those of Wan "
    "(`blocks.0.self_attn.q`, also after `diffusion_model.`) and kohya's (`lora_unet_blocks_0_self_attn_q`)"
)


def read_lora_file(
    given: str | Path | Mapping[str, torch.Tensor],
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> LoraFile:
    """
    Read a LoRA from a file, a folder, a Hub repository or a state dict.

    Args:
        given: a `.safetensors` file; a folder that `save_lora_weights` or PEFT wrote, or a `checkpoint-N` of a LoRA
            training; `owner/name` on the Hub; or a dict of weights by name.
        weight_name: name of the file, if there are several.
        subfolder: folder of the file within the folder or repository.
        hub: arguments of `hf_hub_download`, such as `revision` and `token`.

    Raises:
        ValueError: for a path that does not exist, a folder without a LoRA file or with several ones, and files that
            are not safetensors.
    """
    if isinstance(given, Mapping):
        return LoraFile(dict(given), "the state dict")
    path = Path(given)
    if path.is_dir():
        folder = path / (subfolder or "")
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        path = folder / _choose_file(names, str(folder), weight_name)
        config = path.with_name(PEFT_CONFIG)
    elif path.is_file():
        config = path.with_name(PEFT_CONFIG)
    else:
        path, config = _download(str(given), weight_name, subfolder, hub)
    return _read(path, config if path.name == PEFT_NAME or config.is_file() else None)


def _choose_file(names: set[str], source: str, weight_name: str | None) -> str:
    """Select the LoRA file among the file names of a folder or repository."""
    if weight_name is not None:
        if weight_name not in names:
            raise ValueError(f"{source}: contains no file {weight_name!r} (`weight_name`).")
        return weight_name
    for name in (LORA_NAME, PEFT_NAME):
        if name in names:
            return name
    if TRAINED_NAME in names:
        if EMA_NAME not in names:
            return TRAINED_NAME
        logger.warning(
            f"{source}: the moving average {EMA_NAME} is loaded, as in the result of the training; pass "
            f"`weight_name={TRAINED_NAME!r}` to load the last trained weights instead."
        )
        return EMA_NAME
    if "model_index.json" in names:
        raise ValueError(
            f"{source}: is a whole pipeline, not a LoRA: load it with `OmniVideoPipeline.from_pretrained`."
        )
    files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(f"{source}: contains several safetensors files: choose one of {files} with `weight_name`.")
    nested = sorted(name for name in names if name == "lora" or re.fullmatch(r"checkpoint-\d+", name))
    hint = f" It has the folders {nested}: pass one of them." if nested else ""
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        hint += " Pickles are not opened because they can run code: convert the file to safetensors."
    raise ValueError(f"{source}: contains no LoRA: there is no .safetensors file.{hint}")


def _download(given: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> tuple[Path, Path]:
    """Download the LoRA file of a Hub repository; returns it and the path of its PEFT configuration, if any."""
    hub = {name: value for name, value in hub.items() if value is not None}
    try:
        if hub.get("local_files_only") or HF_HUB_OFFLINE:
            return _cached(given, weight_name, subfolder, hub)
        files = HfApi(token=hub.get("token")).list_repo_files(given, revision=hub.get("revision"))
        prefix = f"{subfolder}/" if subfolder else ""
        names = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
        chosen = _choose_file(names, given, weight_name)
        if PEFT_CONFIG in names:
            hf_hub_download(given, PEFT_CONFIG, subfolder=subfolder, **hub)
        if chosen == EMA_NAME:
            hf_hub_download(given, TRAINED_NAME, subfolder=subfolder, **hub)
        path = Path(hf_hub_download(given, chosen, subfolder=subfolder, **hub))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{given}: no such file or folder, and no repository of this name on the Hub that you have access to."
        ) from error
    return path, path.with_name(PEFT_CONFIG)


def _cached(given: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> tuple[Path, Path]:
    """Find the LoRA file of a Hub repository in the local cache, without the network."""
    hub = hub | {"local_files_only": True}
    for name in (weight_name,) if weight_name else (LORA_NAME, PEFT_NAME, EMA_NAME, TRAINED_NAME):
        try:
            beside = {PEFT_NAME: PEFT_CONFIG, EMA_NAME: TRAINED_NAME}.get(name)
            if beside is not None:
                hf_hub_download(given, beside, subfolder=subfolder, **hub)
            path = Path(hf_hub_download(given, name, subfolder=subfolder, **hub))
            return path, path.with_name(PEFT_CONFIG)
        except LocalEntryNotFoundError:
            continue
    raise ValueError(
        f"{given}: no such file or folder, and no LoRA of this name in the local cache. Offline, a file with another "
        "than the default name needs `weight_name`."
    )


def _read(path: Path, config: Path | None) -> LoraFile:
    """Read tensors and settings of a file on disk."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: LoRAs are read from .safetensors files only, because pickles can run code: convert the file."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if path.name == EMA_NAME and path.with_name(TRAINED_NAME).is_file():
            with safe_open(path.with_name(TRAINED_NAME), "pt") as file:
                metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error}). Download it again.") from error
    if path.name in (TRAINED_NAME, EMA_NAME):
        _check_checkpoint(path, metadata)
    settings = _json(metadata[METADATA_KEY], f"{path}: `{METADATA_KEY}`") if METADATA_KEY in metadata else None
    if settings is not None or config is None:
        return LoraFile(tensors, str(path), settings)
    if not config.is_file():
        raise ValueError(
            f"{path}: the file {PEFT_CONFIG} is missing in its folder; without it the scale of the LoRA is unknown."
        )
    peft_config = _json(config.read_text(encoding="utf-8"), str(config))
    if peft_config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{config}: `peft_type` must be 'LORA', got {peft_config['peft_type']!r}.")
    return LoraFile(tensors, str(path), peft_config=peft_config)


def _check_checkpoint(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse checkpoints of the trainer that contain no LoRA, or a LoRA without its scale."""
    stage = json.loads(metadata.get("stage", "null"))
    if stage != "lora":
        raise ValueError(
            f"{path}: contains trained weights of the stage {stage!r}, not a LoRA. Load the repository that the "
            "training wrote (`OUTPUT_DIR/pipeline`)."
        )
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path}: was written without the alpha of its layers, so its scale is unknown: resume the training "
            "(`--resume`), and use the `lora` folder that it writes at its end."
        )


def _json(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(value).__name__}.")
    return value


def split_lora(file: LoraFile, components: Mapping[str, nn.Module | None]) -> dict[str, LoraPart]:
    """
    Split a LoRA by component, and check all of it.

    Args:
        file: result of [`read_lora_file`].
        components: `transformer`, `adapter` and `mllm`; `None` for a component that is not loaded.

    Raises:
        ValueError: for weights of an unknown naming or of a layer that the model does not have, wrong shapes, values
            that are not finite, a matrix without its partner, and unsupported settings.
    """
    layers = _layers(file)
    _find_modules(layers, components, file)
    parts: dict[str, LoraPart] = {}
    scales: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    matrices: dict[str, dict[str, dict[str, torch.Tensor]]] = defaultdict(dict)
    for layer in layers:
        found = layer_matrices(layer, file)
        if found:
            rank = found["A"].shape[0]
            alpha = layer_alpha(layer, rank, file)
            if layer.name in scales[layer.component]:
                raise ValueError(
                    f"{file.source}: contains the layer {layer.component}.{layer.name} twice, also as {layer.key}."
                )
            if "diff_b" in layer.tensors:  # tools for Wan add it unscaled, peft scales it like the matrices
                found["bias"] = layer.tensors["diff_b"] * (rank / alpha if alpha else 1.0)
            scales[layer.component][layer.name] = (rank, alpha)
            matrices[layer.component][layer.name] = found
    for component, entries in matrices.items():
        has_bias = any("bias" in entry for entry in entries.values())
        tensors = {}
        for name, entry in entries.items():
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = entry["A"], entry["B"]
            if has_bias:
                tensors[f"{name}.lora_B.bias"] = entry.get("bias", entry["B"].new_zeros(entry["B"].shape[0]))
        parts[component] = LoraPart(
            tensors, lora_settings(scales[component]) | {"lora_bias": has_bias}, scales[component]
        )
    if not parts:
        raise ValueError(f"{file.source}: contains no LoRA weights.")
    return parts


def lora_settings(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Arguments of `LoraConfig` for layers with the given ranks and alphas."""
    (rank, alpha), _ = Counter(layers.values()).most_common(1)[0]
    others = {f"^{re.escape(name)}": values for name, values in layers.items() if values != (rank, alpha)}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern: values[0] for pattern, values in others.items()},
        "alpha_pattern": {pattern: values[1] for pattern, values in others.items()},
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _layers(file: LoraFile) -> list[FileLayer]:
    """Group the weights of a file by layer, with the names in the file."""
    layers: dict[str, FileLayer] = {}
    adapters, unknown = set(), []
    for key, tensor in file.tensors.items():
        layer, kind, adapter = _parse(key)
        if kind is None:
            unknown.append(key)
            continue
        adapters.add(adapter)
        entry = layers.setdefault(layer, FileLayer(layer))
        entry.weights.append(key)
        if kind in entry.tensors:
            raise ValueError(
                f"{file.source}: contains several adapters ({sorted(filter(None, adapters))}): load them one by one."
            )
        entry.tensors[kind] = tensor
    for method, marks in (("DoRA", ("dora_scale", "lora_magnitude_vector")), ("LyCORIS", ("lokr_", "hada_", "oft_"))):
        if any(mark in key for key in unknown for mark in marks):
            raise ValueError(
                f"{file.source}: is a {method} file (it contains {unknown[0]!r}); only LoRA is supported. Merge it "
                "into its model with the tool that wrote it."
            )
    if unknown:
        _refuse_keys(unknown, file)
    if len(adapters) > 1:
        raise ValueError(
            f"{file.source}: contains several adapters ({sorted(filter(None, adapters))}): save and load them one by "
            "one."
        )
    return list(layers.values())


def _parse(key: str) -> tuple[str, str | None, str | None]:
    """Name of the layer, kind of the weight (`None` if it is not a LoRA weight) and name of the adapter, if any."""
    for kind in ("alpha", "diff", "diff_b"):
        if key.endswith(f".{kind}"):
            return key.removesuffix(f".{kind}"), kind, None
    for mark, kinds in (
        (".lora_", {"A": "A", "B": "B", "down": "A", "up": "B"}),
        (".lora.", {"down": "A", "up": "B"}),
        (".lora_linear_layer.", {"down": "A", "up": "B"}),
    ):
        layer, found, rest = key.partition(mark)
        first, *adapter, last = rest.split(".") if "." in rest else (rest, "")
        if found and first in kinds and last in ("weight", "bias"):
            weight = kinds[first] if last == "weight" else "bias" if kinds[first] == "B" else None
            return layer, weight, ".".join(adapter) or None
    return key, None, None


def _refuse_keys(keys: list[str], file: LoraFile) -> None:
    namings = " and ".join(sorted({_naming(key) for key in keys}))
    raise ValueError(
        f"{file.source}: {len(keys)} of {len(file.tensors)} LoRA weights match no layer of this model, such as "
        f"{keys[0]!r}. These names are {namings}. The LoRA was trained for another model, or for components that this "
        f"model does not have. Supported names are {KNOWN_NAMINGS}; one file must use one of these namings."
    )


def _naming(key: str) -> str:
    """Description of the naming of a key, for messages."""
    first = key.partition(".")[0]
    if key.startswith(PEFT_PREFIX):
        return "PEFT's"
    if key.startswith(KOHYA_PREFIXES):
        return "kohya's"
    if key.startswith(WAN_PREFIXES) or (first == "blocks" and (".self_attn." in key or ".cross_attn." in key)):
        return "those of Wan"
    if first == "decoder" or any(first in prefixes for prefixes in PREFIXES.values()):
        return "diffusers' or those of this trainer"
    return "those of a decoder alone" if first in DECODER_CHILDREN else f"of an unknown kind ({first!r})"


def _find_modules(layers: list[FileLayer], components: Mapping[str, nn.Module | None], file: LoraFile) -> None:
    """Find the module of every layer; all names in a file must follow the same naming."""
    qualified, decoder, flat = _names(components)
    kinds = Counter("of a decoder" if _is_bare(layer.key) else _naming(layer.key) for layer in layers)
    unmatched = []
    for layer in layers:
        kohya = next((prefix for prefix in KOHYA_PREFIXES if layer.key.startswith(prefix)), None)
        if kohya is not None:
            found = flat.get(layer.key.removeprefix(kohya))
        else:
            key = layer.key.removeprefix(PEFT_PREFIX)
            key = key.removeprefix(next((prefix for prefix in WAN_PREFIXES if key.startswith(prefix)), ""))
            found = qualified.get(key) or decoder.get(key)
        kind = "of a decoder" if _is_bare(layer.key) else _naming(layer.key)
        if found is None or kind != kinds.most_common(1)[0][0]:
            unmatched += layer.weights
        else:
            layer.component, layer.name, layer.module = found
    if unmatched:
        _refuse_absent_parts(unmatched, components, file)
        _refuse_keys(unmatched, file)


def _refuse_absent_parts(keys: list[str], components: Mapping[str, nn.Module | None], file: LoraFile) -> None:
    """Say so where a file is for a component that the pipeline was loaded without."""
    firsts = {key.removeprefix(PEFT_PREFIX).partition(".")[0] for key in keys}
    for component, prefixes in PREFIXES.items():
        names = {*prefixes, *(("decoder",) if component == "transformer" else ())}
        if components.get(component) is None and firsts & names:
            raise ValueError(
                f"{file.source}: has LoRA layers of `{component}`, which this pipeline does not have: load the "
                "pipeline with it, or give a file (or state dict) without these layers."
            )


def _is_bare(key: str) -> bool:
    """Whether a name has no component prefix: it begins with a module of the decoder in diffusers or Wan."""
    return key.partition(".")[0] in DECODER_CHILDREN


def _names(components: Mapping[str, nn.Module | None]) -> tuple[dict[str, tuple[str, str, nn.Module]], ...]:
    """Modules by names in the whole model, by names in the decoder (diffusers and Wan), and by kohya's flat names."""
    qualified, decoder, flat = {}, {}, {}
    for component, module in components.items():
        for name, child in () if module is None else module.named_modules():
            found = (component, name, child)
            if component == "mllm":
                qualified[name] = found
                qualified.setdefault(f"mllm.{name}", found)  # the component's name before its own names
                continue
            qualified[f"{component}.{name}"] = found
            if component == "transformer":
                wan = name
                for ours, theirs in WAN_NAMES:
                    wan = wan.replace(ours, theirs)
                qualified[f"decoder.{name}"] = found
                for alias in (name, wan):
                    decoder[alias] = found
                    flat[alias.replace(".", "_")] = found
    return qualified, decoder, flat


__all__ = ["PREFIXES", "lora_settings", "read_lora_file", "split_lora"]
