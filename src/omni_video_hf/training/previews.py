"""Pictures of a model in training, drawn by the pipeline it will ship in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..media_omni_video import contact_sheet, open_media, save_image, save_video
from ..modeling_omni_video import OmniVideoForConditionalGeneration
from ..pipeline_omni_video import OmniVideoPipeline

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


def draw_previews(
    pipeline: OmniVideoPipeline, previews: Sequence[Mapping[str, Any]], folder: Path, step: int
) -> Path | None:
    """
    Run every preview and write what came out.

    Args:
        previews: arguments of the pipeline's call; `image` and `video` may be paths. The noise is the same at every
            step.
        folder: gets `step-N.png`, a row of frames per preview, `step-N-I.mp4` of every video and `step-N.txt` with
            the answers.

    Returns:
        The contact sheet; `None` when every preview was an answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, answers = [], []
    pipeline.set_progress_bar_config(leave=False, desc="preview")
    for number, preview in enumerate(previews):
        arguments = dict(preview)
        for name in ("image", "video"):
            if isinstance(arguments.get(name), (str, Path)):
                arguments[name] = open_media(arguments[name])[1]
        output = pipeline(**arguments, generator=torch.Generator().manual_seed(PREVIEW_SEED))
        if output.text is not None:
            answers.append(f"{number}: {output.text[0]}\n")
            continue
        rows.append(contact_sheet(output.frames[0]))
        if output.fps is not None:
            save_video(output.frames[0], folder / f"step-{step:06d}-{number}.mp4", fps=output.fps)
    if answers:
        (folder / f"step-{step:06d}.txt").write_text("".join(answers))
    if not rows:
        return None
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    path = folder / f"step-{step:06d}.png"
    save_image(sheet, path)
    return path
