"""What upstream's folder of Omni-Video 2 holds, part by part, in our names; tensors stay on disk until used."""

from collections.abc import Iterable
from pathlib import Path

import torch

from omni_video_hf.utils.safe_load import CorruptCheckpointError, load_checkpoint

from .key_maps import VISUAL_CONTEXT_RULES, Rules, convert_umt5, convert_wan_transformer, convert_wan_vae, rename
from .original_checkpoint import WEIGHT_SUFFIXES, Part, is_marker_row, read_weights, some_names

TEXT_ENCODER_2 = "models_t5_umt5-xxl-enc-bf16.pth"
WAN_VAE_2 = "Wan2.1_VAE.pth"
TEXT_TOKENIZER_2 = "google/umt5-xxl"
MARKERS_2 = "special_tokens.pkl"
MARKER_NAMES_2 = ("<img_st>", "<img_ed>", "<prp_st>", "<prp_ed>")
HIGH_NOISE, LOW_NOISE = "high_noise_model/model.pt", "low_noise_model/model.pt"
ONE_DECODER = "transformer/pytorch_model.pt"
# Layouts by name: the file of each decoder, in the order of the components `transformer`, `transformer_2`.
LAYOUTS = {"A14B": (HIGH_NOISE, LOW_NOISE), "1.3B": (ONE_DECODER,)}
DECODER_PREFIX = "wan_model."
ADAPTER_RULES: Rules = (
    (r"^vlm_norm\.weight$", r"mllm_norm.weight"),
    (r"^vlm_proj\.(weight|bias)$", r"mllm_proj.\1"),
    *((pattern.replace("^", r"^visual_context_adapter\."), target) for pattern, target in VISUAL_CONTEXT_RULES),
)


def find_layout(root: Path) -> str | None:
    """
    Name of the layout of Omni-Video 2 in a folder; `None` for a folder of version 1 or another one.

    Raises:
        CorruptCheckpointError: for a folder with one of two experts.
    """
    experts = [name for name in LAYOUTS["A14B"] if (root / name).is_file()]
    if len(experts) == 1:
        missing = next(name for name in LAYOUTS["A14B"] if name not in experts)
        raise CorruptCheckpointError(f"{root / missing}: is missing, but {experts[0]} is there. Download it again.")
    if experts:
        return "A14B"
    return "1.3B" if (root / ONE_DECODER).is_file() and (root / MARKERS_2).is_file() else None


class OriginalCheckpoint2:
    """
    Upstream's folder of Omni-Video 2.

    Args:
        root: path of the folder.
        layout: a key of `LAYOUTS`, from [`find_layout`].

    Raises:
        CorruptCheckpointError: when a file that must be there is missing.
    """

    def __init__(self, root: str | Path, layout: str) -> None:
        self.root, self.layout = Path(root), layout
        self.decoders = LAYOUTS[layout]
        for name in (*self.decoders, MARKERS_2):
            if not (self.root / name).is_file():
                raise CorruptCheckpointError(f"{self.root / name}: is missing from the checkpoint. Download it again.")

    def has(self, name: str) -> bool:
        """Whether an optional file or folder is there."""
        return (self.root / name).exists()

    def unread_weights(self, used: Iterable[str]) -> list[str]:
        """Files of weights that are not among those `used`."""
        files = [path.relative_to(self.root) for path in self.root.rglob("*") if path.suffix in WEIGHT_SUFFIXES]
        names = {path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts)}
        return sorted(names - set(used))

    def transformer(self, number: int) -> Part:
        """The decoder of expert `number`, from 0."""
        part = self._expert(number, DECODER_PREFIX)
        try:
            part.tensors, part.unknown = convert_wan_transformer(part.tensors)
        except (KeyError, IndexError, ValueError) as error:
            raise CorruptCheckpointError(f"{self.root / self.decoders[number]}: no Wan ({error!r}).") from error
        return part

    def adapter(self, number: int) -> Part:
        """Norm, projection, visual context adapter and markers of expert `number`."""
        part = self._expert(number, "")
        part.tensors, part.unknown = rename(part.tensors, ADAPTER_RULES)
        part.add(Part({"marker_embeds.weight": self._markers()}, {MARKERS_2}))
        return part

    def vae(self) -> Part:
        """The Wan VAE."""
        part = self._file(WAN_VAE_2)
        try:
            part.tensors, part.unknown = convert_wan_vae(part.tensors)
        except (KeyError, IndexError, ValueError) as error:
            raise CorruptCheckpointError(f"{self.root / WAN_VAE_2}: is not Wan's VAE ({error!r}).") from error
        return part

    def text_encoder(self) -> Part:
        """umT5."""
        part = self._file(TEXT_ENCODER_2)
        part.tensors, part.unknown = convert_umt5(part.tensors)
        return part

    def _expert(self, number: int, prefix: str) -> Part:
        """Weights under `prefix` in the file of an expert; with an empty prefix all but the decoder's."""
        part = self._file(self.decoders[number])
        part.tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in part.tensors.items()
            if name.startswith(DECODER_PREFIX) == bool(prefix)
        }
        return part

    def _file(self, name: str) -> Part:
        if not (self.root / name).is_file():
            raise CorruptCheckpointError(f"{self.root / name}: is missing from the checkpoint. Download it again.")
        return Part(read_weights(self.root / name), {name})

    def _markers(self) -> torch.Tensor:
        """Marker embeddings `[4, width]`, in the order of `OmniVideo2Adapter.marker_embeds`."""
        path = self.root / MARKERS_2
        markers = load_checkpoint(path)
        if not isinstance(markers, dict) or set(markers) != set(MARKER_NAMES_2):
            raise CorruptCheckpointError(f"{path}: must hold the tensors {some_names(MARKER_NAMES_2)} and no others.")
        rows = [markers[name] for name in MARKER_NAMES_2]
        for name, row in zip(MARKER_NAMES_2, rows, strict=True):
            if not is_marker_row(row) or row.shape != rows[0].shape:
                raise CorruptCheckpointError(f"{path}: {name!r} must be a tensor [1, width].")
        return torch.cat(rows)
