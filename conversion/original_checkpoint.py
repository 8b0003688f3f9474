"""What upstream's `omni_ckpts` folder holds, part by part, in our names, as tensors that stay on disk until used."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from omni_video_hf.utils.safe_load import CorruptCheckpointError, UnsafeCheckpointError, load_checkpoint

from .key_maps import (
    LANGUAGE_RULES,
    PROJECTOR_RULES,
    VISION_TOWER_RULES,
    VISUAL_CONTEXT_RULES,
    StateDict,
    convert_query_transformer,
    convert_umt5,
    convert_wan_transformer,
    convert_wan_vae,
    rename,
)

TRAINED = "transformer/model.pt"  # the whole trained model; wins over every other file
# Where the same weights may lie, later files winning key by key.
ADAPTER = ("adapter/adapter_pytorch_model.bin", "adapter/model.pt")
VISION_HEAD = ("ar_model/checkpoint/vision_head/pytorch_model.bin", "vision_head/vision_head/pytorch_model.bin")
WAN = "wan/wanxiang1_3b"
WAN_WEIGHTS = f"{WAN}/diffusion_pytorch_model*.safetensors"
WAN_CONFIG = f"{WAN}/config.json"
WAN_VAE = f"{WAN}/Wan2.1_VAE.pth"
TEXT_ENCODER = f"{WAN}/models_t5_umt5-xxl-enc-bf16.pth"
TEXT_TOKENIZER = f"{WAN}/google/umt5-xxl"
VILA = "ar_model/checkpoint"
NULL_STATES = "unconditioned_context/context.pkl"
MARKERS = "special_tokens/tokens.pkl"
MARKER_NAMES = ("<img_st>", "<img_ed>", "<ipl_st>", "<ipl_ed>", "<prp_st>", "<prp_ed>")
WRAPPERS = ("model_state_dict", "module", "model", "state_dict")
TRAINED_PREFIXES = ("wan_model.", "adapter.", "ar_vision_head.", "visual_context_adapter.")
WEIGHT_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pt", ".pth", ".safetensors")


@dataclass
class Part:
    """Tensors of one component, in our names."""

    tensors: StateDict
    files: set[str] = field(default_factory=set)  # that they came from
    unknown: list[str] = field(default_factory=list)  # upstream's names that fit nothing
    superseded: int = 0  # tensors that a file of higher priority has, too

    def add(self, other: "Part", prefix: str = "") -> None:
        """Take another part in."""
        self.tensors |= {prefix + name: tensor for name, tensor in other.tensors.items()}
        self.files |= other.files
        self.unknown += other.unknown
        self.superseded += other.superseded

    def override(self, other: "Part") -> None:
        """Take another part in whose tensors win."""
        self.superseded += len(self.tensors.keys() & other.tensors.keys())
        self.tensors |= other.tensors
        self.files |= other.files


class OriginalCheckpoint:
    """
    Upstream's folder.

    Args:
        root: path of `omni_ckpts`.

    Raises:
        CorruptCheckpointError: when the folder or a file that must be there is missing.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise CorruptCheckpointError(f"{self.root}: is no folder; give the path of upstream's `omni_ckpts`.")
        for name in (f"{VILA}/config.json", f"{VILA}/llm/config.json", WAN_CONFIG, NULL_STATES):
            self.path(name)

    def path(self, name: str) -> Path:
        """A file or folder that must be there."""
        path = self.root / name
        if not path.exists():
            raise CorruptCheckpointError(f"{path}: is missing from the checkpoint. Download it again.")
        return path

    def has(self, name: str) -> bool:
        """Whether an optional file or folder is there."""
        return (self.root / name).exists()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of settings; one that refers to code is refused."""
        return read_json(self.path(name))

    def unread_weights(self, used: Iterable[str]) -> list[str]:
        """Files of weights that are not among those `used`, such as a trainer's own."""
        files = [path.relative_to(self.root) for path in self.root.rglob("*") if path.suffix in WEIGHT_SUFFIXES]
        names = {path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts)}
        return sorted(names - set(used))

    # --- components -------------------------------------------------------------------------------------------------

    def mllm(self) -> Part:
        """VILA, the vision head and its null states."""
        part = Part({})
        language = self._weights(f"{VILA}/llm/*.safetensors")
        language.tensors, language.unknown = rename(language.tensors, LANGUAGE_RULES)
        part.add(language, "mllm.")
        vision = self._weights(f"{VILA}/vision_tower/*.safetensors")
        vision.tensors, vision.unknown = rename(vision.tensors, VISION_TOWER_RULES)
        part.add(vision, "mllm.model.vision_tower.")
        projector = self._weights(f"{VILA}/mm_projector/*.safetensors")
        projector.tensors, projector.unknown = rename(projector.tensors, PROJECTOR_RULES)
        part.add(projector, "mllm.model.multi_modal_projector.")

        head = self._trained("ar_vision_head.", VISION_HEAD)
        head.tensors, head.unknown = convert_query_transformer(head.tensors, "visionHeadAdapter")
        part.add(head, "vision_head.query_transformer.")
        part.add(Part({"null_hidden_states.weight": self._null("vlm_last_hidden_states")}), "vision_head.")
        part.files.add(NULL_STATES)
        return part

    def adapter(self, with_markers: bool = True) -> Part:
        """Adapter, visual context adapter, markers and null prompt."""
        network = self._trained("adapter.", ADAPTER)
        network.tensors, network.unknown = convert_query_transformer(network.tensors, "adapter")
        part = Part({})
        part.add(network, "query_transformer.")
        visual = self._trained("visual_context_adapter.", ())
        visual.tensors, visual.unknown = rename(visual.tensors, VISUAL_CONTEXT_RULES)
        part.add(visual)
        part.add(Part({"null_prompt_embeds.weight": self._null("text_emb")}, {NULL_STATES}))
        if with_markers:
            part.add(Part({"marker_embeds.weight": self._markers()}, {MARKERS}))
        return part

    def transformer(self) -> Part:
        """The Wan transformer."""
        part = self._trained("wan_model.", (WAN_WEIGHTS,))
        part.tensors, part.unknown = convert_wan_transformer(part.tensors)
        return part

    def vae(self) -> Part:
        """The Wan VAE."""
        part = self._weights(WAN_VAE)
        try:
            part.tensors, part.unknown = convert_wan_vae(part.tensors)
        except (KeyError, IndexError, ValueError) as error:
            raise CorruptCheckpointError(f"{self.root / WAN_VAE}: is not Wan's VAE ({error!r}).") from error
        return part

    def text_encoder(self) -> Part:
        """umT5."""
        part = self._weights(TEXT_ENCODER)
        part.tensors, part.unknown = convert_umt5(part.tensors)
        return part

    # --- reading ----------------------------------------------------------------------------------------------------

    def _trained(self, prefix: str, patterns: Iterable[str]) -> Part:
        """Weights of those files that are there, later ones winning, and last those under `prefix` in `TRAINED`."""
        part = Part({})
        for pattern in patterns:
            if any(self.root.glob(pattern)):
                part.override(self._weights(pattern))
        if self.has(TRAINED):
            trained = self._weights(TRAINED)
            strangers = [name for name in trained.tensors if not name.startswith(TRAINED_PREFIXES)]
            if strangers:
                raise CorruptCheckpointError(f"{self.root / TRAINED}: has unknown weights: {some_names(strangers)}.")
            trained.tensors = {
                name.removeprefix(prefix): tensor
                for name, tensor in trained.tensors.items()
                if name.startswith(prefix)
            }
            part.override(trained)
        if not part.tensors:
            raise CorruptCheckpointError(f"{self.root / TRAINED}: is missing, or has no weights under {prefix!r}.")
        return part

    def _weights(self, pattern: str) -> Part:
        """All weights of the files that fit; each must have its own."""
        paths = sorted(self.root.glob(pattern))
        if not paths:
            raise CorruptCheckpointError(f"{self.root / pattern}: is missing from the checkpoint. Download it again.")
        part = Part({})
        for path in paths:
            weights = read_weights(path)
            twice = part.tensors.keys() & weights.keys()
            if twice:
                raise CorruptCheckpointError(f"{path}: has weights that another file has, too: {some_names(twice)}.")
            part.tensors |= weights
            part.files.add(path.relative_to(self.root).as_posix())
        return part

    def _null(self, name: str) -> torch.Tensor:
        """A stored tensor of the null branch `[length, width]`, bare, in a list, or as a batch of one."""
        path = self.path(NULL_STATES)
        states = load_checkpoint(path)
        if not isinstance(states, dict) or name not in states:
            raise CorruptCheckpointError(f"{path}: has no {name!r}.")
        value = states[name]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, torch.Tensor) and value.ndim == 3 and len(value) == 1:
            value = value[0]
        if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
            raise CorruptCheckpointError(f"{path}: {name!r} must be one tensor [length, width], got {_kind(value)}.")
        return value

    def _markers(self) -> torch.Tensor:
        """Marker embeddings `[6, width]`, in the order of `OmniVideoAdapter.marker_embeds`."""
        path = self.path(MARKERS)
        markers = load_checkpoint(path)
        if not isinstance(markers, dict) or set(markers) != set(MARKER_NAMES):
            raise CorruptCheckpointError(f"{path}: must hold the tensors {', '.join(MARKER_NAMES)} and no others.")
        rows = [markers[name] for name in MARKER_NAMES]
        for name, row in zip(MARKER_NAMES, rows, strict=True):
            if not is_marker_row(row) or row.shape != rows[0].shape:
                raise CorruptCheckpointError(f"{path}: {name!r} must be a tensor [1, width], got {_kind(row)}.")
        return torch.cat(rows)


def read_json(path: Path) -> dict[str, Any]:
    """
    A JSON file of settings.

    Raises:
        ValueError: when it is missing or damaged, holds something else, or refers to code.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path}: must hold a JSON object, not a {type(content).__name__}.")
    if content.get("auto_map"):
        raise UnsafeCheckpointError(f"{path}: `auto_map` refers to code that would be run; remove it.")
    return content


def read_tokenizer(folder: Path, *needed: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer in a folder.

    Args:
        folder: with the tokenizer's files.
        needed: special tokens that it must know, such as `"eos_token"`.

    Raises:
        ValueError: when it is damaged, brings code along or lacks a needed token.
    """
    # Without this file a tokenizer of the usual kind would be made up, with other special tokens.
    settings = read_json(folder / "tokenizer_config.json")
    for file in sorted(folder.glob("*.json")):
        read_json(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, clean_up_tokenization_spaces=False
        )
    except Exception as error:  # the tokenizers library raises bare ones
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CorruptCheckpointError(f"{folder}: not a readable tokenizer ({reason}).") from error
    for token in needed:
        if not settings.get(token) or getattr(tokenizer, f"{token}_id") is None:
            raise CorruptCheckpointError(f"{folder / 'tokenizer_config.json'}: names no `{token}`.")
    return tokenizer


def read_weights(path: Path) -> StateDict:
    """
    The state dict in a file of any of upstream's formats, without wrappers and `module.` prefixes.

    Raises:
        ValueError: when the file is damaged, unsafe or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpointError(f"{path}: not a complete safetensors file ({error}).") from error
    content = load_checkpoint(path)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content:
        raise CorruptCheckpointError(f"{path}: holds no weights.")
    others = [name for name, value in content.items() if not isinstance(name, str) or not _is_weight(value)]
    if others:
        raise CorruptCheckpointError(f"{path}: has entries that are no plain tensors: {some_names(others)}.")
    weights = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    if len(weights) < len(content):
        raise CorruptCheckpointError(f"{path}: has weights twice, with and without the prefix 'module.'.")
    return weights


def _is_weight(value: Any) -> bool:
    """Whether `value` is a tensor whose values are there; a file can also ask for ones on the meta device."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided


def is_marker_row(value: Any) -> bool:
    """Whether `value` is a marker embedding `[1, width]`."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 2 and len(value) == 1


def _kind(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def some_names(names: Iterable[Any], most: int = 20) -> str:
    """Names for a message, the first `most` of them."""
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
