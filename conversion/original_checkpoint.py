"""What upstream's `omni_ckpts` folder holds, part by part, in our names, as tensors that stay on disk until used."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from key_maps import (
    PROJECTOR_RULES,
    VISUAL_CONTEXT_RULES,
    StateDict,
    convert_query_transformer,
    convert_umt5,
    convert_wan_transformer,
    convert_wan_vae,
    rename,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from omni_video_hf.safe_load import CorruptCheckpointError, load_checkpoint

TRAINED = "transformer/model.pt"  # the whole trained model; wins over every other file
ADAPTER = ("adapter/model.pt", "adapter/adapter_pytorch_model.bin")
VISION_HEAD = ("vision_head/vision_head/pytorch_model.bin", "ar_model/checkpoint/vision_head/pytorch_model.bin")
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
WRAPPERS = ("model_state_dict", "module", "state_dict")


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
        """A JSON file."""
        path = self.path(name)
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise CorruptCheckpointError(f"{path}: not a readable JSON file ({error}).") from error

    # --- components -------------------------------------------------------------------------------------------------

    def mllm(self) -> Part:
        """VILA, the vision head and its null states."""
        part = Part({})
        language = self._weights([f"{VILA}/llm/*.safetensors"])
        for name, tensor in language.tensors.items():
            target = name if name.startswith("lm_head.") else f"model.language_model.{name.removeprefix('model.')}"
            part.tensors[f"mllm.{target}"] = tensor
        part.files |= language.files
        vision = self._weights([f"{VILA}/vision_tower/*.safetensors"])
        vision.tensors = {name.removeprefix("vision_model."): tensor for name, tensor in vision.tensors.items()}
        part.add(vision, "mllm.model.vision_tower.")
        projector = self._weights([f"{VILA}/mm_projector/*.safetensors"])
        projector.tensors, projector.unknown = rename(projector.tensors, PROJECTOR_RULES)
        part.add(projector, "mllm.model.multi_modal_projector.")

        head = self._trained("ar_vision_head.", VISION_HEAD)
        head.tensors, head.unknown = convert_query_transformer(head.tensors, "visionHeadAdapter")
        part.add(head, "vision_head.query_transformer.")
        states = self._null("vlm_last_hidden_states")
        part.tensors["vision_head.null_hidden_states.weight"] = states.squeeze(0)
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
        prompt = self._null("text_emb")
        part.tensors["null_prompt_embeds.weight"] = prompt[0] if isinstance(prompt, list) else prompt.squeeze(0)
        part.files.add(NULL_STATES)
        if with_markers:
            markers = load_checkpoint(self.path(MARKERS))
            if not isinstance(markers, dict) or set(markers) != set(MARKER_NAMES):
                raise CorruptCheckpointError(
                    f"{self.root / MARKERS}: must hold the tensors {', '.join(MARKER_NAMES)}."
                )
            part.tensors["marker_embeds.weight"] = torch.cat([markers[name] for name in MARKER_NAMES])
            part.files.add(MARKERS)
        return part

    def transformer(self) -> Part:
        """The Wan transformer."""
        part = self._trained("wan_model.", [WAN_WEIGHTS])
        part.tensors, part.unknown = convert_wan_transformer(part.tensors)
        return part

    def vae(self) -> Part:
        """The Wan VAE."""
        part = self._weights([WAN_VAE])
        try:
            part.tensors, part.unknown = convert_wan_vae(part.tensors)
        except (KeyError, IndexError, ValueError) as error:
            raise CorruptCheckpointError(f"{self.root / WAN_VAE}: is not Wan's VAE ({error!r}).") from error
        return part

    def text_encoder(self) -> Part:
        """umT5."""
        part = self._weights([TEXT_ENCODER])
        part.tensors, part.unknown = convert_umt5(part.tensors)
        return part

    # --- reading ----------------------------------------------------------------------------------------------------

    def _trained(self, prefix: str, names: Iterable[str]) -> Part:
        """Weights of the first of `names` that is there, overridden by those under `prefix` in the trained model."""
        part = self._weights([next((n for n in names if list(self.root.glob(n))), None)])
        if self.has(TRAINED):
            trained = read_weights(self.root / TRAINED)
            known = ("wan_model.", "adapter.", "ar_vision_head.", "visual_context_adapter.")
            strangers = [name for name in trained if not name.startswith(known)]
            if strangers:
                raise CorruptCheckpointError(f"{self.root / TRAINED}: has unknown weights: {_some(strangers)}.")
            wins = {name.removeprefix(prefix): t for name, t in trained.items() if name.startswith(prefix)}
            part.superseded = len(part.tensors.keys() & wins.keys())
            part.tensors |= wins
            part.files.add(TRAINED)
        if not part.tensors:
            raise CorruptCheckpointError(f"{self.root / TRAINED}: is missing, or has no weights under {prefix!r}.")
        return part

    def _weights(self, patterns: list[str | None]) -> Part:
        """All weights of the files that fit; each must have its own."""
        part = Part({})
        for pattern in patterns:
            if pattern is None:
                continue
            paths = sorted(self.root.glob(pattern))
            if not paths:
                raise CorruptCheckpointError(f"{self.root / pattern}: is missing from the checkpoint.")
            for path in paths:
                weights = read_weights(path)
                twice = part.tensors.keys() & weights.keys()
                if twice:
                    raise CorruptCheckpointError(f"{path}: has weights that another file has, too: {_some(twice)}.")
                part.tensors |= weights
                part.files.add(path.relative_to(self.root).as_posix())
        return part

    def _null(self, name: str) -> Any:
        path = self.path(NULL_STATES)
        states = load_checkpoint(path)
        if not isinstance(states, dict) or name not in states:
            raise CorruptCheckpointError(f"{path}: has no {name!r}.")
        return states[name]


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
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CorruptCheckpointError(f"{path}: has entries that are no tensors: {_some(others)}.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _some(names: Iterable[Any], most: int = 20) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
