"""
LoRA files of every naming that tools for peft and Wan write, checked as a whole before anything is loaded.

    transformer.blocks.0.attn1.to_q.lora_A.weight                       diffusers; so is what this project writes
    decoder.blocks.0.attn1.to_q.lora_A.default.weight                   `checkpoint-N` folders of this trainer
    base_model.model.blocks.0.attn1.to_q.lora_A.weight                  PEFT, of the decoder or of the whole model
    [diffusion_model.]blocks.0.self_attn.q.lora_A[.default].weight      Wan's own names: DiffSynth, ComfyUI, lightx2v
    lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up, .alpha   kohya, musubi-tuner
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

logger = logging.get_logger(__name__)

# Component of the pipeline -> first parts of its keys in the file. Those of `mllm` are the names of its children.
PREFIXES = {"transformer": ("transformer",), "adapter": ("adapter",), "mllm": ("mllm", "vision_head")}

LORA_NAME, PEFT_NAME, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
TRAINED_NAME, EMA_NAME = "trained.safetensors", "ema.safetensors"  # of a checkpoint of the trainer
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the arguments of `LoraConfig`

PEFT_PREFIX = "base_model.model."
WAN_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "pipe.dit.", "dit.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")
# Parts of the decoder's names in diffusers and in Wan's own code, in the order of replacement.
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
# First parts of the decoder's names, in diffusers and in Wan's own code.
DECODER_CHILDREN = (
    "blocks", "condition_embedder", "patch_embedding", "proj_out", "head",
    "time_embedding", "time_projection", "text_embedding", "img_emb",
)  # fmt: skip
KNOWN_NAMINGS = (
    "diffusers' (`transformer.`, `adapter.`, `mllm.`, `vision_head.`), PEFT's (`base_model.model.`), those of Wan "
    "(`blocks.0.self_attn.q`, also after `diffusion_model.`) and kohya's (`lora_unet_blocks_0_self_attn_q`)"
)
# Values of `init_lora_weights` that also change the weights of the model, so that the LoRA alone is not enough.
CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
MAX_PATTERNS, MAX_PATTERN_LENGTH = 16, 200  # of patterns that are not plain names


@dataclass
class LoraFile:
    """Weights as a file names them, and what the file says about them."""

    tensors: dict[str, torch.Tensor]
    source: str  # for messages
    settings: dict[str, Any] | None = None  # arguments of `LoraConfig`, each after `component.`, as diffusers writes
    peft_config: dict[str, Any] | None = None  # of `adapter_config.json`, for all layers


@dataclass
class LoraPart:
    """The LoRA of one component: weights by peft's names in it, arguments of `LoraConfig`, rank and alpha by layer."""

    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    scales: dict[str, tuple[int, float]]


@dataclass
class _Layer:
    """What a file holds for one layer."""

    key: str  # as the file names the layer
    weights: list[str] = field(default_factory=list)  # its keys in the file
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # by kind: A, B, bias, alpha, diff, diff_b
    component: str = ""
    name: str = ""
    module: nn.Module | None = None


# --- finding and reading ------------------------------------------------------------------------------------------


def read_lora_file(
    given: str | Path | Mapping[str, torch.Tensor],
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> LoraFile:
    """
    Read a LoRA from a file, a folder, a Hub repository or a state dict.

    Args:
        given: `.safetensors` file; folder, such as what `save_lora_weights` or PEFT wrote or a `checkpoint-N` of a
            LoRA run; `owner/name` on the Hub; or weights by name.
        weight_name: the file to take where there are several.
        subfolder: where it lies within the folder or repository.
        hub: arguments of `hf_hub_download`, such as `revision` and `token`.

    Raises:
        ValueError: for a path that does not exist, a folder with no or several LoRA files, and files that are not
            safetensors.
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
    """The LoRA file among the names of a folder or repository."""
    if weight_name is not None:
        if weight_name not in names:
            raise ValueError(f"{source}: holds no {weight_name!r} (`weight_name`).")
        return weight_name
    for name in (LORA_NAME, PEFT_NAME):
        if name in names:
            return name
    if TRAINED_NAME in names:
        if EMA_NAME not in names:
            return TRAINED_NAME
        logger.warning(
            f"{source}: the moving average {EMA_NAME} is loaded, as the result of the run has it; pass "
            f"`weight_name={TRAINED_NAME!r}` for the weights that were trained last."
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
        raise ValueError(f"{source}: holds several safetensors files: choose one of {files} with `weight_name`.")
    nested = sorted(name for name in names if name == "lora" or re.fullmatch(r"checkpoint-\d+", name))
    hint = f" It has the folders {nested}: pass one of them." if nested else ""
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        hint += " Pickles are not opened, they can run code: convert the file to safetensors."
    raise ValueError(f"{source}: holds no LoRA, no .safetensors file.{hint}")


def _download(given: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> tuple[Path, Path]:
    """The LoRA file of a Hub repository, and where its PEFT configuration would lie."""
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
            f"{given}: no such file or folder, and no repository of this name on the Hub that you may read."
        ) from error
    return path, path.with_name(PEFT_CONFIG)


def _cached(given: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> tuple[Path, Path]:
    """Likewise without the network."""
    hub = hub | {"local_files_only": True}
    for name in (weight_name,) if weight_name else (LORA_NAME, PEFT_NAME, TRAINED_NAME):
        try:
            if name == PEFT_NAME:
                hf_hub_download(given, PEFT_CONFIG, subfolder=subfolder, **hub)
            path = Path(hf_hub_download(given, name, subfolder=subfolder, **hub))
            return path, path.with_name(PEFT_CONFIG)
        except LocalEntryNotFoundError:
            continue
    raise ValueError(
        f"{given}: no such file or folder, and no LoRA of this name in the local cache. Offline, a file with a name "
        "of its own needs `weight_name`."
    )


def _read(path: Path, config: Path | None) -> LoraFile:
    """Tensors and settings of a file on disk."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: LoRA are read from .safetensors files. Pickles can run code and are not opened: convert it."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if path.name == EMA_NAME and path.with_name(TRAINED_NAME).is_file():
            with safe_open(path.with_name(TRAINED_NAME), "pt") as file:
                metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error}).") from error
    if path.name in (TRAINED_NAME, EMA_NAME):
        _check_checkpoint(path, metadata)
    settings = _json(metadata[METADATA_KEY], f"{path}: `{METADATA_KEY}`") if METADATA_KEY in metadata else None
    if settings is not None or config is None:
        return LoraFile(tensors, str(path), settings)
    if not config.is_file():
        raise ValueError(f"{path}: {PEFT_CONFIG} is missing beside it; without it the scale of the LoRA is unknown.")
    peft_config = _json(config.read_text(encoding="utf-8"), str(config))
    if peft_config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{config}: `peft_type` must be 'LORA', got {peft_config['peft_type']!r}.")
    return LoraFile(tensors, str(path), peft_config=peft_config)


def _check_checkpoint(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse checkpoints of the trainer that hold no LoRA, or not its scale."""
    stage = json.loads(metadata.get("stage", "null"))
    if stage != "lora":
        raise ValueError(
            f"{path}: holds trained weights of the stage {stage!r}, not a LoRA. Load the repository that the run "
            "wrote (`OUTPUT_DIR/pipeline`)."
        )
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path}: was written without the alpha of its layers, so its scale is unknown: go on with the run "
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


# --- from names to layers -----------------------------------------------------------------------------------------


def split_lora(file: LoraFile, components: Mapping[str, nn.Module | None]) -> dict[str, LoraPart]:
    """
    The LoRA of every component, all of it checked.

    Args:
        file: as [`read_lora_file`] returns it.
        components: `transformer`, `adapter` and `mllm`; `None` for one that is not loaded.

    Raises:
        ValueError: for weights of no known naming or of no layer of the model, other shapes, values that are not
            finite, half pairs, and settings that cannot be followed.
    """
    layers = _layers(file)
    _find_modules(layers, components, file)
    parts: dict[str, LoraPart] = {}
    scales: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    matrices: dict[str, dict[str, dict[str, torch.Tensor]]] = defaultdict(dict)
    for layer in layers:
        found = _matrices(layer, file)
        if found:
            rank = found["A"].shape[0]
            alpha = _alpha(layer, rank, file)
            if layer.name in scales[layer.component]:
                raise ValueError(
                    f"{file.source}: holds the layer {layer.component}.{layer.name} twice, also as {layer.key}."
                )
            if "diff_b" in layer.tensors:  # Wan's tools add it as it is, peft scales it with the matrices
                found["bias"] = layer.tensors["diff_b"] * (rank / alpha if alpha else 1.0)
            scales[layer.component][layer.name] = (rank, alpha)
            matrices[layer.component][layer.name] = found
    for component, found in matrices.items():
        has_bias = any("bias" in entry for entry in found.values())
        tensors = {}
        for name, entry in found.items():
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = entry["A"], entry["B"]
            if has_bias:
                tensors[f"{name}.lora_B.bias"] = entry.get("bias", entry["B"].new_zeros(entry["B"].shape[0]))
        parts[component] = LoraPart(
            tensors, lora_settings(scales[component]) | {"lora_bias": has_bias}, scales[component]
        )
    if not parts:
        raise ValueError(f"{file.source}: holds no LoRA weights.")
    return parts


def lora_settings(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Arguments of `LoraConfig` that give every layer its rank and alpha."""
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


def _layers(file: LoraFile) -> list[_Layer]:
    """The weights of a file, layer by layer, under the file's own names."""
    layers: dict[str, _Layer] = {}
    adapters, unknown = set(), []
    for key, tensor in file.tensors.items():
        layer, kind, adapter = _parse(key)
        if kind is None:
            unknown.append(key)
            continue
        adapters.add(adapter)
        entry = layers.setdefault(layer, _Layer(layer))
        entry.weights.append(key)
        if kind in entry.tensors:
            raise ValueError(
                f"{file.source}: holds several adapters ({sorted(filter(None, adapters))}): load one each."
            )
        entry.tensors[kind] = tensor
    for method, marks in (("DoRA", ("dora_scale", "lora_magnitude_vector")), ("LyCORIS", ("lokr_", "hada_", "oft_"))):
        if any(mark in key for key in unknown for mark in marks):
            raise ValueError(
                f"{file.source}: is a {method} file, such as {unknown[0]!r}; LoRA alone is supported. Merge it "
                "into its model with the tool that made it."
            )
    if unknown:
        _refuse_keys(unknown, file)
    if len(adapters) > 1:
        raise ValueError(
            f"{file.source}: holds several adapters ({sorted(filter(None, adapters))}): save and load them one by one."
        )
    return list(layers.values())


def _parse(key: str) -> tuple[str, str | None, str | None]:
    """Name of the layer, kind of the weight (`None` if it is none of a LoRA) and name of the adapter, if any."""
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
            kind = kinds[first] if last == "weight" else "bias" if kinds[first] == "B" else None
            return layer, kind, ".".join(adapter) or None
    return key, None, None


def _refuse_keys(keys: list[str], file: LoraFile) -> None:
    namings = " and ".join(sorted({_naming(key) for key in keys}))
    raise ValueError(
        f"{file.source}: {len(keys)} of {len(file.tensors)} LoRA weights match no layer of this model, such as "
        f"{keys[0]!r}. These names are {namings}. The LoRA was made for another model, or for parts that this one "
        f"does not have; the names that can be read are {KNOWN_NAMINGS}, one kind in a file."
    )


def _naming(key: str) -> str:
    """The naming a key follows, in words."""
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


def _find_modules(layers: list[_Layer], components: Mapping[str, nn.Module | None], file: LoraFile) -> None:
    """Fill in the module of every layer; all names must be of one kind."""
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
        _refuse_keys(unmatched, file)


def _is_bare(key: str) -> bool:
    """Whether a name begins within the decoder, as diffusers or Wan name its layers."""
    return key.partition(".")[0] in DECODER_CHILDREN


def _names(components: Mapping[str, nn.Module | None]) -> tuple[dict[str, tuple[str, str, nn.Module]], ...]:
    """Modules by their names in the whole model, in the decoder alone (also Wan's), and flattened as by kohya."""
    qualified, decoder, flat = {}, {}, {}
    for component, module in components.items():
        for name, child in () if module is None else module.named_modules():
            found = (component, name, child)
            if component == "mllm":
                qualified[name] = found
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


# --- checks -------------------------------------------------------------------------------------------------------


def _matrices(layer: _Layer, file: LoraFile) -> dict[str, torch.Tensor]:
    """Both matrices of a layer, and its bias; a difference of weights becomes matrices. Empty if nothing changes."""
    for kind, tensor in layer.tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{file.source}: {layer.key} ({kind}) is {tensor.dtype}; LoRA weights are floating point."
            )
        bad = int((~torch.isfinite(tensor.float())).sum())
        if bad:
            raise ValueError(
                f"{file.source}: {layer.key} ({kind}) holds {bad} values that are NaN or infinite: its training broke "
                "off, or the file is damaged."
            )
    found = {kind: layer.tensors[kind] for kind in ("A", "B", "bias") if kind in layer.tensors}
    base = layer.module.get_base_layer() if hasattr(layer.module, "get_base_layer") else layer.module
    differences = [layer.tensors[kind] for kind in ("diff", "diff_b") if kind in layer.tensors]
    if not found and all(not difference.any() for difference in differences):
        return {}  # Wan's tools write zeros for norms
    is_linear = hasattr(base, "in_features") and hasattr(base, "out_features")
    if not is_linear and not isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError(
            f"{file.source}: {layer.key} changes {layer.component}.{layer.name}, a {type(base).__name__}; LoRA is "
            "supported for linear and convolution layers."
        )
    if not found:
        found = _of_differences(layer, base) if is_linear else {}
    if ("diff" in layer.tensors and "A" in layer.tensors) or not {"A", "B"} <= found.keys():
        raise ValueError(
            f"{file.source}: {layer.key} needs both matrices of its LoRA and nothing else, got "
            f"{sorted(layer.tensors)}."
        )
    _check_shapes(layer, found, base, file)
    return found


def _of_differences(layer: _Layer, base: nn.Module) -> dict[str, torch.Tensor]:
    """A difference of whole weights as two matrices whose product it is; for a bias alone the product is zero."""
    bias = layer.tensors.get("diff_b")
    if "diff" not in layer.tensors:
        return {"A": bias.new_zeros(1, base.in_features), "B": bias.new_zeros(base.out_features, 1)}
    difference = layer.tensors["diff"]
    identity = torch.eye(min(difference.shape), dtype=difference.dtype)
    if difference.shape[0] < difference.shape[1]:
        return {"A": difference, "B": identity}
    return {"A": identity, "B": difference}


def _check_shapes(layer: _Layer, found: Mapping[str, torch.Tensor], base: nn.Module, file: LoraFile) -> None:
    """Refuse matrices that are not those of this layer."""
    rank = found["A"].shape[0] if found["A"].ndim else 0
    if hasattr(base, "in_features"):
        shapes = {"A": (rank, base.in_features), "B": (base.out_features, rank), "bias": (base.out_features,)}
    else:
        ones = (1,) * len(base.kernel_size)
        inputs = (rank, base.in_channels // base.groups, *base.kernel_size)
        shapes = {"A": inputs, "B": (base.out_channels, rank, *ones), "bias": (base.out_channels,)}
    if "diff_b" in layer.tensors:
        found = {**found, "bias": layer.tensors["diff_b"]}
    for kind, tensor in found.items():
        if tuple(tensor.shape) != shapes[kind] or rank == 0:
            raise ValueError(
                f"{file.source}: {layer.key} ({kind}) is {tuple(tensor.shape)}, which does not fit {layer.component}."
                f"{layer.name} of this model, {shapes[kind]}: the LoRA was made for a model of other sizes."
            )


# --- scale --------------------------------------------------------------------------------------------------------


def _alpha(layer: _Layer, rank: int, file: LoraFile) -> float:
    """The alpha with which `alpha / rank` is the scale of a layer; without any, the rank, as diffusers has it."""
    settings = file.peft_config
    if file.settings is not None:
        prefix = f"{layer.component}."
        settings = {key.removeprefix(prefix): value for key, value in file.settings.items() if key.startswith(prefix)}
    stored = None
    if "alpha" in layer.tensors:
        if layer.tensors["alpha"].numel() != 1:
            raise ValueError(f"{file.source}: {layer.key}.alpha must be one number.")
        stored = float(layer.tensors["alpha"])
    if not settings:
        return rank if stored is None else stored
    names = (layer.name, f"{layer.component}.{layer.name}", layer.key.removeprefix(PEFT_PREFIX))
    _check_settings(settings, file)
    said = _of_layer(settings, "rank_pattern", "r", names, file)
    if said != rank:
        raise ValueError(f"{file.source}: its settings give {layer.key} the rank {said:g}, its matrices have {rank}.")
    alpha = _of_layer(settings, "alpha_pattern", "lora_alpha", names, file)
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)
    if stored is not None and stored != alpha:
        raise ValueError(f"{file.source}: {layer.key} has the alpha {stored:g}, the file's settings say {alpha:g}.")
    return int(alpha) if alpha == int(alpha) else alpha


def _check_settings(settings: Mapping[str, Any], file: LoraFile) -> None:
    """Refuse what peft would do beyond two matrices and their scale."""
    kind = settings.get("init_lora_weights", True)
    if isinstance(kind, str) and kind.lower().startswith(CHANGES_THE_MODEL):
        raise ValueError(
            f"{file.source}: `init_lora_weights` is {kind!r}, which also changed the model's weights: convert the "
            "LoRA with peft's `save_pretrained(path_initial_model_for_weight_conversion=...)`."
        )
    for name in ("use_dora", "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices"):
        if settings.get(name):
            raise ValueError(f"{file.source}: `{name}` of its settings is {settings[name]!r}, which is not supported.")


def _of_layer(
    settings: Mapping[str, Any],
    patterns: Literal["rank_pattern", "alpha_pattern"],
    default: str,
    names: tuple[str, ...],
    file: LoraFile,
) -> float:
    """A number of one layer: the one of the first pattern that its name ends with, as in peft, or that of all."""
    table = settings.get(patterns) or {}
    value = settings.get(default)
    if not isinstance(table, dict):
        raise ValueError(f"{file.source}: `{patterns}` must map names to numbers, got {table!r}.")
    complex_patterns = 0
    for pattern, number in table.items():
        plain = pattern.removeprefix("^").replace("\\.", ".").replace("\\_", "_").replace("\\-", "-")
        if re.fullmatch(r"[\w.\-]+", plain):
            matches = plain in _endings(names) if not pattern.startswith("^") else plain in names
        else:
            complex_patterns += 1
            matches = complex_patterns <= MAX_PATTERNS and _matches(pattern, names, patterns, file)
        if complex_patterns > MAX_PATTERNS:
            raise ValueError(f"{file.source}: `{patterns}` has more than {MAX_PATTERNS} patterns that are not names.")
        if matches:
            value = number
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{file.source}: `{default}` of its settings must be a number, got {value!r}.")
    return value


def _endings(names: tuple[str, ...]) -> Iterator[str]:
    """Names, and what follows each of their dots."""
    for name in names:
        yield name
        for position, letter in enumerate(name):
            if letter == ".":
                yield name[position + 1 :]


def _matches(pattern: str, names: tuple[str, ...], table: str, file: LoraFile) -> bool:
    """Whether an expression matches the end of a name; refuses those whose matching may take for ever."""
    quantifiers = len(re.findall(r"[*+?{]", re.sub(r"\\.", "", pattern)))
    if len(pattern) > MAX_PATTERN_LENGTH or quantifiers > 2 or re.search(r"\)[*+?{]", pattern):
        raise ValueError(
            f"{file.source}: the expression {pattern[:MAX_PATTERN_LENGTH]!r} of `{table}` is too complex to be "
            "matched safely: write the names of the layers."
        )
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{file.source}: {pattern!r} of `{table}` is no expression: {error}.") from error
    return any(expression.fullmatch(ending) for ending in _endings(names))


__all__ = ["PREFIXES", "LoraFile", "LoraPart", "lora_settings", "read_lora_file", "split_lora"]
