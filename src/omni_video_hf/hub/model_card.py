"""
Model cards: metadata for the Hub and a text, generated from a repository and its training summary.

The texts are Jinja templates in `model_cards/`. A trainer writes its facts to `training_summary.json`; all others come
from the files of the repository. A card that a person wrote or edited is never replaced.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from .remote_code import PIPELINE_CLASS, __version__, pipeline_class
from .repository import read_header

SUMMARY_NAME = "training_summary.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
TAGS = ["omni-video", "text-to-video", "video-to-video", "text-to-image", "image-to-image", "image-text-to-text"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SEAL = "<!-- written by omni_video_hf {version}, sha256 {digest}: edit the card and it is yours -->"
_SEAL_PATTERN = re.compile(r"\n<!-- written by omni_video_hf \S+, sha256 ([0-9a-f]{64}): [^\n]*-->\n?\Z")
# For code that was loaded from a repository, which does not contain the templates.
_PLAIN_TEXT = "# {repo_id}\n\nAn [Omni-Video](https://arxiv.org/abs/2507.06119) model{from_base}.\n"


@dataclass
class TrainingSummary:
    """
    Facts about a training run for its model card; the content of `training_summary.json`.

    Args:
        stage: name of the training stage: `align`, `connect`, `joint`, `decoder` or `lora`.
        description: one or two sentences on the purpose of the training.
        base_model: Hub repository or folder of the model before the training.
        datasets: Hub names or descriptions of the data.
        num_samples: number of samples in the data.
        steps: number of optimiser steps.
        batch_size: samples per optimiser step, over all devices.
        learning_rate: highest learning rate, or one per group of parameters.
        losses: last value of every loss, by name.
        scores: scores of an evaluation, by name.
        dtype: dtype of the training.
        hardware: devices, such as `1 x NVIDIA A100`.
        peak_memory: peak memory on one device, in bytes.
        seconds: duration of all steps in seconds, including those before a run was resumed.
        seed: seed of the training run.
        license: licence identifier of the Hub, only if the licence of the weights is known.
        limits: sentences about the limits of the model.
        samples: examples `{"prompt": ..., "file": ...}` with files of the repository.
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
        """
        Read the summary in a folder; without a file, all fields are empty.

        Raises:
            ValueError: for a damaged file, unknown entries, and values of a wrong type.
        """
        path = directory / SUMMARY_NAME
        content = _read_table(path) if path.is_file() else {}
        kinds = get_type_hints(cls)
        if unknown := sorted(content.keys() - kinds.keys()):
            raise ValueError(f"{path}: unknown entries {', '.join(unknown)}; allowed are {', '.join(sorted(kinds))}.")
        for name, value in content.items():
            if not _fits(value, kinds[name]):
                raise ValueError(f"{path}: `{name}` must be {cls.__annotations__[name]}, got {str(value)[:80]!r}.")
        return cls(**content)

    def save(self, directory: str | Path) -> None:
        """Write `training_summary.json`, which [`write_model_card`] reads."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        (Path(directory) / SUMMARY_NAME).write_text(text + "\n", encoding="utf-8")


def write_model_card(directory: str | Path, repo_id: str, base_model: str | Path | None = None) -> bool:
    """
    Write the model card `README.md`, unless a person wrote or edited the existing one.

    Args:
        directory: folder of a model or of a LoRA.
        repo_id: its name on the Hub, `owner/name`.
        base_model: Hub repository of the base model. Default: that of the training summary.

    Returns:
        Whether the card was written.

    Raises:
        ValueError: for a `base_model` that is not a Hub name, or a damaged summary.
    """
    if base_model is not None and not _REPO_ID.fullmatch(str(base_model)):
        raise ValueError(f"`base_model` must be a Hub repository, `owner/name`, got {str(base_model)!r}.")
    path, text = Path(directory) / "README.md", model_card(directory, repo_id, base_model)
    if not is_generated(text):
        return False
    path.write_text(text, encoding="utf-8")
    return True


def model_card(directory: str | Path, repo_id: str, base_model: str | Path | None = None) -> str:
    """The text of the card: the existing one if a person wrote or edited it, else a new one. Writes no file."""
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    if text is not None and not is_generated(text):
        return text
    return render_model_card(Path(directory), repo_id, base_model)


def is_generated(text: str) -> bool:
    """Whether a card is unchanged since [`write_model_card`] wrote it."""
    seal = _SEAL_PATTERN.search(text)
    return seal is not None and _digest(text[: seal.start()]) == seal[1]


def render_model_card(directory: Path, repo_id: str, base_model: str | Path | None = None) -> str:
    """Generate the card of a repository, with the checksum line by which [`is_generated`] recognises it."""
    summary = TrainingSummary.read(directory)
    base = _hub_id(base_model) or _hub_id(summary.base_model)
    base = None if base == repo_id else base
    summary = replace(summary, samples=[sample for sample in summary.samples if _is_inside(directory, sample)])
    is_lora = (directory / LORA_NAME).is_file()
    data = _card_data(summary, base, is_lora)
    template = _template("lora" if is_lora else "finetune")
    if template is None:
        from_base = f", made from [{base}](https://hf.co/{base})" if base else ""
        text = f"---\n{data.to_yaml()}\n---\n\n{_PLAIN_TEXT.format(repo_id=plain(repo_id), from_base=from_base)}"
    else:
        sizes = _sizes(directory)
        facts: dict[str, Any] = {
            "repo_id": plain(repo_id),
            "name": json.dumps(repo_id, ensure_ascii=False),  # also valid as a string of Python
            "base": base,
            "base_name": json.dumps(base or "owner/base-model"),
            "run": _in_markdown(summary),
            "presets": _presets(directory / "model_index.json"),
            "sizes": {plain(part): size for part, size in sizes.items()},
            "is_whole": (directory / "model_index.json").is_file() and "mllm" in sizes,
            "is_version_2": pipeline_class(directory) != PIPELINE_CLASS,
            "version": __version__,
        }
        text = str(ModelCard.from_template(data, template_path=str(template), **facts))
    text = text.rstrip() + "\n"
    return text + "\n" + _SEAL.format(version=__version__, digest=_digest(text)) + "\n"


def _card_data(summary: TrainingSummary, base: str | None, is_lora: bool) -> ModelCardData:
    """The metadata block of the card; unknown values are omitted."""
    widget = [{"text": sample["prompt"], "output": {"url": sample["file"]}} for sample in summary.samples]
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
    """The name if it can be a Hub repository, else `None`: a local path is useless to other people."""
    if name is None or Path(name).exists() or not _REPO_ID.fullmatch(str(name)):
        return None
    return str(name)


def _sizes(directory: Path) -> dict[str, float]:
    """
    Size of the weights of every component in gigabytes.

    Some files contain several components, such as MLLM and vision head in the folder `mllm`; the first word of a
    weight's name identifies its component.
    """
    sizes: dict[str, float] = {}
    for file in sorted(directory.rglob("*.safetensors")):
        folder = file.relative_to(directory).parent.as_posix()
        if folder.startswith("checkpoint-"):
            continue
        for name, (_, _, num_bytes) in read_header(file).items():
            is_shared = folder in (".", "mllm") and file.name != LORA_NAME
            if folder == "mllm" and not name.startswith(("mllm.", "vision_head.")):  # a stock MLLM
                is_shared = False
            part = name.partition(".")[0] if is_shared else folder
            sizes[part] = sizes.get(part, 0) + num_bytes / 1e9
    return sizes


# --- values from files as Markdown ----------------------------------------------------------------------------------


def plain(text: Any) -> str:
    """Escape `text` to one line of Markdown, so that markup, HTML and tables in it have no effect."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*{}\[\]|~$!#])|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], line)
    return re.sub(r"^(\d+)([.)])|^([-+=])", lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", line)


def _in_markdown(summary: TrainingSummary) -> TrainingSummary:
    """The summary with every text escaped by [`plain`], and samples with the address of their file."""
    values: dict[str, Any] = {}
    for name, value in vars(summary).items():
        if isinstance(value, str):
            values[name] = plain(value)
        elif isinstance(value, list):
            values[name] = [plain(entry) if isinstance(entry, str) else entry for entry in value]
        elif isinstance(value, dict):
            values[name] = {plain(key): entry for key, entry in value.items()}
    if isinstance(summary.learning_rate, dict):
        values["learning_rate"] = ", ".join(f"{part} {rate:g}" for part, rate in values["learning_rate"].items())
    values["samples"] = [
        {"prompt": plain(sample["prompt"]), "file": plain(sample["file"]), "url": quote(sample["file"])}
        for sample in summary.samples
    ]
    return replace(summary, **values)


def _presets(index: Path) -> dict[str, dict[str, str]] | None:
    """The presets in `model_index.json`, with every value as escaped text."""
    presets = _read_table(index).get("presets") if index.is_file() else None
    if presets is None:
        return None
    if not isinstance(presets, dict) or not all(isinstance(preset, dict) for preset in presets.values()):
        raise ValueError(f"{index}: `presets` must be an object of objects, got {str(presets)[:80]!r}.")
    return {
        plain(task): {str(name): plain(value) for name, value in preset.items() if value is not None}
        for task, preset in presets.items()
    }


def _read_table(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; a `ValueError` names a file that contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must contain a JSON object, got a {type(content).__name__}.")
    return content


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type of an annotation."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, inner[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, inner[1]) for entry in value.values())
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_inside(directory: Path, sample: dict[str, str]) -> bool:
    """Whether a sample is complete and its file is in the folder."""
    if not {"prompt", "file"} <= sample.keys():
        return False
    path = directory / sample["file"]
    return path.is_file() and path.resolve().is_relative_to(directory.resolve())


def _template(name: str) -> Path | None:
    """Path of a template, in the installed package or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "model_cards", package.parents[1] / "model_cards"):
        if (folder / f"{name}.md.jinja").is_file():
            return folder / f"{name}.md.jinja"
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


__all__ = ["TrainingSummary", "is_generated", "model_card", "render_model_card", "write_model_card"]
