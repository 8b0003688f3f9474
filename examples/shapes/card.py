"""Writes the card of Omni-Video Shapes from what its training left: `python -m examples.shapes.card`."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import ModelCard, ModelCardData
from transformers.trainer_utils import get_last_checkpoint

from omni_video_hf.hub.model_card import TAGS
from omni_video_hf.shapes.scores import LINES, SHOWN_SPLITS, place_title
from omni_video_hf.training.recipe import overridden

from .training.train_text_to_video import PHASES

TEMPLATE = "omni-video-shapes.md.jinja"
STRIP = "strip.png"
# What was trained, by the folder of its checkpoints, in order; what the batch of a phase is called in the settings.
RUNS = {
    "vae/images": "VAE, images",
    "vae/clips": "VAE, clips",
    "vae/noisy": "VAE, noisy latents",
    "vae_decoder/clips": "VAE's decoder",
    "mllm/vision": "SigLIP",
    "mllm/answers": "SigLIP and Llama, answers",
    "text_encoder/meaning": "umT5",
    **{f"text_to_video/{name}": f"Wan transformer, {name}" for name in PHASES},
    "align": "stage `align`",
    "align_texts": "stage `align_texts`",
    "connect": "stage `connect`",
    "joint": "stage `joint`",
    "compose": "stage `compose`",
    "refine": "stage `refine`",
    "polish": "stage `polish`",
    "finish": "stage `finish`",
    "settle": "stage `settle`",
}
BATCHES = {
    "vae/images": "image_batch_size",
    "mllm/vision": "vision_batch_size",
    "text_to_video/images": "image_batch_size",
}


def write_card(build: Path, model: Path, template: Path) -> None:
    """
    Write `README.md`, and the strip of pictures it shows, into a repository.

    Args:
        build: what `make shapes` wrote: the folders of `RUNS`, and `scores`.
        model: the repository.
        template: of the card.
    """
    report = _read(build / "scores" / "scores.json")
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="any-to-any", tags=[*TAGS, "custom_code"], license="apache-2.0"
    )
    files = sorted(model.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    strip = build / "scores" / STRIP
    if strip.is_file():
        shutil.copyfile(strip, model / STRIP)
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        parameters=f"{size / 2 / 1e6:.1f}",  # two bytes each
        megabytes=f"{size / 1e6:.1f}",
        strip=STRIP if strip.is_file() else None,
        settings=report["settings"],
        scores=score_rows(report),
        training=[training_row(build, folder) for folder in RUNS],
        reconstructions=", ".join(_percent(score) for score in _read(build / "vae_decoder" / "vae.json")["scores"]),
    )
    (model / "README.md").write_text(str(card).rstrip() + "\n", encoding="utf-8")


def score_rows(report: dict[str, Any]) -> list[list[str]]:
    """Title, and rate and bar of each split, of every line that was measured."""
    found = {(score["line"], score["split"]): score for score in report["scores"]}
    rows = []
    for key, line in LINES.items():
        scores = [found.get((key, split)) for split in SHOWN_SPLITS]
        if any(scores):
            cells = [(_with_interval(score), _bar(score)) if score else ("", "") for score in scores]
            rows.append([line.title, *(text for cell in cells for text in cell)])
        places = [(score or {}).get("place") for score in scores]
        if any(places):
            cells = [_place(place) for place in places]
            rows.append([place_title(key), *(text for cell in cells for text in cell)])
    return rows


def _place(place: dict[str, Any] | None) -> tuple[str, str]:
    """Median distance and share of the frames that are near, and what is wanted of both."""
    if place is None:
        return "", ""
    median = "no shape" if place["median_pixels"] is None else f"{place['median_pixels']:.1f} px"
    wanted = f"{place['bar_median_pixels']:g} px, {100 * place['bar_share_within']:.0f} %"
    return f"{median}, {100 * place['share_within']:.1f} %", wanted


def training_row(build: Path, folder: str) -> list[str]:
    """What was trained, steps, batch size, learning rate, seed and last loss, from the log of a run."""
    log = training_log(build, folder)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    name, _, phase = folder.partition("/")
    settings = _read(build / name / "settings.json")
    if not phase:
        settings = overridden(settings["recipe"], settings["command"])
    settings |= settings.get("phases", {}).get(phase, {})
    batch = settings[BATCHES.get(folder, "batch_size" if phase else "per_device_train_batch_size")]
    rate = float(settings["vision_learning_rate" if phase == "vision" else "learning_rate"])
    values = [log[-1]["step"], batch, rate, settings["seed"], f"{float(losses[-1]):.4f}"]
    return [RUNS[folder], *map(str, values)]


def training_log(build: Path, folder: str) -> list[dict[str, Any]]:
    """What a run logged: of a stage when it was done, of a phase of another script by its last checkpoint."""
    done = build / folder / "stage.json"
    if done.is_file():
        return _read(done)["log"]
    checkpoint = get_last_checkpoint(build / folder) if (build / folder).is_dir() else None
    if checkpoint is None or "/" not in folder:
        raise ValueError(f"{build / folder}: {RUNS[folder]} is not done: run `make shapes`.")
    return _read(Path(checkpoint) / "trainer_state.json")["log_history"]


def _with_interval(score: dict[str, Any]) -> str:
    low, high = score["counts"]["all"]["interval"]
    return f"{_percent(score)} ({100 * low:.1f} to {100 * high:.1f})"


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['counts']['all']['rate']:.1f} %"


def _bar(score: dict[str, Any]) -> str:
    return "" if score["bar"] is None else f"{100 * score['bar']:.0f} %"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def main(
    build: Annotated[Path, typer.Option(help="What `make shapes` wrote.")],
    model: Annotated[Path, typer.Option(help="The repository that gets the card.")],
    template: Annotated[Path, typer.Option(help="Of the card.")] = Path("model_cards") / TEMPLATE,
) -> None:
    """Write the card."""
    write_card(build, model, template)


__all__ = ["score_rows", "training_log", "training_row", "write_card"]


if __name__ == "__main__":
    typer.run(main)
