"""Pictures of a model in training, drawn by the pipeline it will ship in."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from ...media.images import contact_sheet, save_image
from ...media.video_loading import open_media
from ...media.video_writer import save_video
from ...models.modeling_omni_video import OmniVideoForConditionalGeneration
from ...pipelines.pipeline_omni_video import OmniVideoPipeline
from ...tasks import TASKS
from ...utils.names import check_known

PREVIEW_SEED = 0


def bind_pipeline(pipeline: OmniVideoPipeline, model: OmniVideoForConditionalGeneration) -> None:
    """
    Make a pipeline draw with the parts of a model: shared, not copied.

    Raises:
        ValueError: when the model lacks adapter or decoder, as in the `align` stage.
    """
    _check_parts(model)
    pipeline.register_modules(adapter=model.adapter, transformer=model.decoder)
    pipeline.mllm.vision_head = model.vision_head
    if model.mllm is not None:
        pipeline.mllm.mllm = model.mllm


def load_preview_pipeline(folder: str | Path, model: OmniVideoForConditionalGeneration) -> OmniVideoPipeline:
    """
    A pipeline that draws with a model in training, and has what the model lacks from the repository `folder`.

    A stage may train without its MLLM; the pipeline then reads it for itself, in the format in which it is stored.

    Raises:
        ValueError: as [`bind_pipeline`].
    """
    _check_parts(model)
    pipeline = OmniVideoPipeline.from_pretrained(folder, adapter=model.adapter, transformer=model.decoder)
    bind_pipeline(pipeline, model)
    return pipeline


def _check_parts(model: OmniVideoForConditionalGeneration) -> None:
    missing = [name for name in ("adapter", "decoder") if getattr(model, name) is None]
    if missing:
        raise ValueError(
            f"Previews need the {' and the '.join(missing)}, which this stage does not load: set `preview_steps` to 0."
        )


def check_previews(previews: Sequence[Mapping[str, Any]]) -> None:
    """
    Look at the arguments of previews before anything is loaded.

    Raises:
        ValueError: for what the pipeline's call does not take, an unknown task, or a file that is not there.
    """
    known = set(inspect.signature(OmniVideoPipeline.__call__).parameters) - {"self", "generator", "return_dict"}
    for number, preview in enumerate(previews):
        where = f"previews[{number}]"
        if not isinstance(preview, Mapping):
            raise ValueError(f"`{where}` must be a mapping such as {{prompt: a fox, task: t2i}}, got {preview!r}.")
        check_known(where, preview, known)
        if preview.get("task") is not None:
            check_known(f"{where}.task", [preview["task"]], TASKS)
        for name in ("image", "video"):
            given = preview.get(name)
            if isinstance(given, (str, Path)) and "://" not in str(given) and not Path(given).is_file():
                raise ValueError(f"`{where}.{name}` {given}: no such file.")


@dataclass
class DrawnPreviews:
    """
    What previews gave, by their numbers.

    Args:
        sheet: file with all rows; `None` when every preview was an answer.
        rows: a row of frames of everything that was drawn.
        answers: texts.
    """

    sheet: Path | None = None
    rows: dict[int, Image.Image] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)


def log_previews(
    callbacks: Sequence[TrainerCallback], drawn: DrawnPreviews, previews: Sequence[Mapping[str, Any]], step: int
) -> None:
    """
    Show previews in TensorBoard and Weights & Biases, where the Trainer reports to them.

    Args:
        callbacks: of the Trainer; those that report bring their own writers.
        drawn: what was drawn.
        previews: arguments of the previews, for captions.
        step: of the training.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for number, row in drawn.rows.items():
                callback.tb_writer.add_image(f"previews/{number}", np.asarray(row), step, dataformats="HWC")
            for number, text in drawn.answers.items():
                callback.tb_writer.add_text(f"previews/{number}", text, step)
            callback.tb_writer.flush()
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            wandb = callback._wandb
            shown: dict[str, Any] = {
                f"previews/{number}": wandb.Image(row, caption=str(previews[number].get("prompt", "")))
                for number, row in drawn.rows.items()
            }
            shown |= {f"previews/{number}": text for number, text in drawn.answers.items()}
            wandb.log(shown | {"train/global_step": step})


def draw_previews(
    pipeline: OmniVideoPipeline, previews: Sequence[Mapping[str, Any]], folder: Path, step: int
) -> DrawnPreviews:
    """
    Run every preview and write what came out.

    Args:
        previews: arguments of the pipeline's call; `image` and `video` may be paths. The noise is the same at every
            step.
        folder: gets `step-N.png`, a row of frames per preview, `step-N-I.mp4` of every video and `step-N.txt` with
            the answers.

    Returns:
        What was drawn; `sheet` is the contact sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = DrawnPreviews()
    pipeline.set_progress_bar_config(leave=False, desc="preview")
    for number, preview in enumerate(previews):
        arguments = dict(preview)
        for name in ("image", "video"):
            if isinstance(arguments.get(name), (str, Path)):
                arguments[name] = open_media(arguments[name])[1]
        output = pipeline(**arguments, generator=torch.Generator().manual_seed(PREVIEW_SEED))
        if output.text is not None:
            drawn.answers[number] = output.text[0]
            continue
        drawn.rows[number] = contact_sheet(output.frames[0])
        if output.fps is not None:
            save_video(output.frames[0], folder / f"step-{step:06d}-{number}.mp4", fps=output.fps)
    if drawn.answers:
        text = "".join(f"{number}: {answer}\n" for number, answer in drawn.answers.items())
        (folder / f"step-{step:06d}.txt").write_text(text, encoding="utf-8")
    if drawn.rows:
        rows = drawn.rows.values()
        sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height
        drawn.sheet = folder / f"step-{step:06d}.png"
        save_image(sheet, drawn.sheet)
    return drawn
