# omni_video_hf 0.1.0, model_card_omni_video.py, sha256 f25affc93042a625. Written when saving; edits get lost.
"""
Model cards: metadata that the Hub validates, and a text filled from what is known about a repository.

Texts are Jinja templates in `model_cards/`. A trainer leaves what it knows in `training_summary.json`; the rest is
read off the repository. A card that a person has written or edited is never replaced.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .remote_code_omni_video_b0934582 import __version__

SUMMARY_NAME = "training_summary.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
TAGS = ["omni-video", "text-to-video", "video-to-video", "text-to-image", "image-to-image", "image-text-to-text"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SEAL = "<!-- written by omni_video_hf {version}, sha256 {digest}: edit the card and it is yours -->"
_SEAL_PATTERN = re.compile(r"\n<!-- written by omni_video_hf \S+, sha256 ([0-9a-f]{64}): [^\n]*-->\n?\Z")
# For code that was loaded from a repository, where the templates are not.
_PLAIN_TEXT = "# {repo_id}\n\nAn [Omni-Video](https://arxiv.org/abs/2507.06119) model{from_base}.\n"


@dataclass
class TrainingSummary:
    """
    What a training run knows about its result; the content of `training_summary.json`.

    Args:
        stage: `align`, `connect`, `joint`, `decoder` or `lora`.
        description: one or two sentences on what it was trained for.
        base_model: Hub repository or folder that training began with.
        datasets: Hub names of the data, or descriptions of it.
        num_samples: samples in the data.
        steps: optimiser steps.
        batch_size: samples per optimiser step, over all devices.
        learning_rate: highest one, or one per group of parameters.
        losses: last value of every loss, by name.
        scores: of an evaluation, by name.
        dtype: number format of training.
        hardware: such as `1 x NVIDIA A100`.
        peak_memory: bytes on one device.
        seconds: duration.
        seed: of the run.
        license: identifier of the Hub, only where the weights' licence is known.
        limits: sentences on what it cannot do.
        samples: `{"prompt": ..., "file": ...}` with files of the repository.
    """

    stage: str | None = None
    description: str | None = None
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    num_samples: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | dict[str, float] | None = None
    losses: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    dtype: str | None = None
    hardware: str | None = None
    peak_memory: int | None = None
    seconds: float | None = None
    seed: int | None = None
    license: str | None = None
    limits: list[str] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> "TrainingSummary":
        """The summary in a folder; an empty one where there is none. Unknown entries are a `ValueError`."""
        path = directory / SUMMARY_NAME
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"{path}: unknown entries {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        return cls(**content)

    def save(self, directory: str | Path) -> None:
        """Write the summary where [`write_model_card`] looks for it."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        (Path(directory) / SUMMARY_NAME).write_text(text + "\n", encoding="utf-8")


def write_model_card(directory: str | Path, repo_id: str, base_model: str | Path | None = None) -> bool:
    """
    Write `README.md`, unless there is one that a person wrote or edited.

    Args:
        directory: a repository, or a folder with a LoRA.
        repo_id: what it is called on the Hub.
        base_model: what it was made from, where no training summary says so.

    Returns:
        Whether the card was written.
    """
    path, text = Path(directory) / "README.md", model_card(directory, repo_id, base_model)
    if not is_generated(text):
        return False
    path.write_text(text, encoding="utf-8")
    return True


def model_card(directory: str | Path, repo_id: str, base_model: str | Path | None = None) -> str:
    """The card in a folder where a person wrote or edited it, else a new one; nothing is written."""
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    if text is not None and not is_generated(text):
        return text
    return render_model_card(Path(directory), repo_id, base_model)


def is_generated(text: str) -> bool:
    """Whether a card is as [`write_model_card`] left it."""
    seal = _SEAL_PATTERN.search(text)
    return seal is not None and _digest(text[: seal.start()]) == seal[1]


def render_model_card(directory: Path, repo_id: str, base_model: str | Path | None = None) -> str:
    """The card of a repository as text, its seal included; see [`write_model_card`]."""
    summary = TrainingSummary.read(directory)
    base = _hub_id(summary.base_model or base_model)
    base = None if base == repo_id else base
    is_lora = (directory / LORA_NAME).is_file()
    data = _card_data(summary, base, is_lora, directory)
    template = _template("lora" if is_lora else "finetune")
    if template is None:
        from_base = f", made from [{base}](https://hf.co/{base})" if base else ""
        text = f"---\n{data.to_yaml()}\n---\n\n{_PLAIN_TEXT.format(repo_id=repo_id, from_base=from_base)}"
    else:
        index = directory / "model_index.json"
        facts = {
            "repo_id": repo_id,
            "base": base,
            "run": summary,
            "presets": json.loads(index.read_text(encoding="utf-8")).get("presets") if index.is_file() else None,
            "sizes": _sizes(directory),
            "version": __version__,
        }
        text = str(ModelCard.from_template(data, template_path=str(template), **facts))
    text = text.rstrip() + "\n"
    return text + "\n" + _SEAL.format(version=__version__, digest=_digest(text)) + "\n"


def _card_data(summary: TrainingSummary, base: str | None, is_lora: bool, directory: Path) -> ModelCardData:
    """Metadata in the words of the Hub; what is not known is left out."""
    samples = [sample for sample in summary.samples if (directory / sample["file"]).is_file()]
    widget = [{"text": sample["prompt"], "output": {"url": sample["file"]}} for sample in samples]
    values: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "any-to-any",
        "tags": [*TAGS, "lora"] if is_lora else [*TAGS, "custom_code"],
        "license": summary.license,
        "datasets": [name for name in summary.datasets if _hub_id(name)] or None,
        "base_model": base,
        "base_model_relation": ("adapter" if is_lora else "finetune") if base else None,
        "widget": widget or None,
    }
    return ModelCardData(**{name: value for name, value in values.items() if value is not None})


def _hub_id(name: str | Path | None) -> str | None:
    """The name, if it is one of the Hub's: a path means nothing to others."""
    if name is None or Path(name).exists() or not _REPO_ID.fullmatch(str(name)):
        return None
    return str(name)


def _sizes(directory: Path) -> dict[str, float]:
    """Gigabytes of the weights of every part."""
    sizes: dict[str, float] = {}
    for file in sorted(directory.rglob("*.safetensors")):
        part = file.relative_to(directory).parent.as_posix()
        if not part.startswith("checkpoint-"):
            sizes[part] = sizes.get(part, 0) + file.stat().st_size / 1e9
    return sizes


def _template(name: str) -> Path | None:
    """A template: in the installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "model_cards", here.parents[1] / "model_cards"):
        if (folder / f"{name}.md.jinja").is_file():
            return folder / f"{name}.md.jinja"
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


__all__ = ["TrainingSummary", "is_generated", "model_card", "render_model_card", "write_model_card"]
