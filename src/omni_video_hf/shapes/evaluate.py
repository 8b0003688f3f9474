"""Runs a checkpoint on examples of Omni-Video Shapes and judges what comes out: every line of the table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..media.sources import Source
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..utils.files import complete_or_absent, write_json
from .dataset import Example, ShapesDataset
from .edits import EditReading, read_edit
from .other_renderer import WIDER, render_otherwise
from .pictures import Shown, results_sheet
from .prompts import Kind
from .scene import FPS, Scene
from .scores import (
    LINES,
    SHOWN_SPLITS,
    Report,
    Score,
    check_answer,
    check_generation,
    check_routing,
)

ROUTED = ("t2v", "t2i", "v2v", "i2i", "understand")
LONGEST_ANSWER = 32  # tokens; the longest right one takes about 16
EDITS = ("v2v", "i2i")
SOURCES = ("renderer", "other-renderer")  # what draws the sources of edits: the training data's renderer, or another
SHOWN = 4  # results of each line and split on its contact sheet
STRIP = ("t2v", "v2v", "t2i", "i2i", "understand")  # whose first results, of seen combinations, are on the strip


@dataclass
class Evaluation:
    """
    The scores of one checkpoint.

    Args:
        pipe: the checkpoint.
        count: examples of each line and split.
        seed: of the examples and of the noise. Splits draw from other streams than training, so any seed is unseen.
        batch_size: examples drawn at once.
        steps: denoising steps; by default those of the checkpoint.
        sources: `"other-renderer"`: of edits only; their sources, and the targets that they are compared with, come
            from [`render_otherwise`].

    Attributes:
        shown: by line and split, the first results: not chosen, so that they show what the scores say.

    Raises:
        ValueError: unless `count` and `batch_size` are positive, and `sources` one of `SOURCES`.
    """

    pipe: OmniVideoPipeline
    count: int = 200
    seed: int = 0
    batch_size: int = 20
    steps: int | None = None
    sources: str = SOURCES[0]
    shown: dict[tuple[str, str], list[Shown]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        checked_lines(None, self.sources)

    def run(self, lines: Sequence[str] | None = None) -> Report:
        """
        Measure the lines, on both splits where the table has both.

        Args:
            lines: of the table; by default all, with sources of another renderer those of edits.

        Raises:
            ValueError: for a line that the table does not have, or that has no such sources.
        """
        lines = checked_lines(lines, self.sources)
        scores = [
            self._score(line, split)
            for line in lines
            for split in (SHOWN_SPLITS if line != "routing" else SHOWN_SPLITS[:1])
        ]
        settings = {"count": self.count, "seed": self.seed, "num_inference_steps": self.steps, "sources": self.sources}
        return Report(tuple(scores), settings | {"checkpoint": self.pipe.config.get("_name_or_path")})

    def _score(self, line: str, split: str) -> Score:
        if line in EDITS:
            edits = [self._read_edit(example, clip) for example, clip in self._draw(line, split)]
            distances = [distance for edit in edits for distance in edit.distances]
            return Score.of(line, split, [edit.verdicts for edit in edits], distances)
        if line == "understand":
            return Score.of(line, split, self._understand(split))
        if line == "routing":
            return Score.of(line, split, self._routing(split))
        return Score.of(line, split, [check_generation(*result) for result in self._draw(line, split)])

    def _read_edit(self, example: Example, clip: np.ndarray) -> EditReading:
        """Compare with what the renderer of the source makes of the target."""
        if self.sources == SOURCES[0]:
            return read_edit(example, clip)
        return read_edit(example, clip, render_otherwise(cast("Scene", example.target), example.num_frames), WIDER)

    def _draw(self, line: str, split: str) -> list[tuple[Example, np.ndarray]]:
        """Draw the examples of a line that makes pictures: each with its clip, uint8 `[frames, 64, 64, 3]`."""
        task = line.partition("_")[0]
        dataset = ShapesDataset(task, split, self.count, self.seed)
        results: list[tuple[Example, np.ndarray]] = []
        shown: list[Shown] = []
        for numbers in self._batches(range(self.count), f"{line}, {split}"):
            examples, items = zip(*((dataset.example(number), dataset[number]) for number in numbers), strict=True)
            if self.sources != SOURCES[0]:
                for example, item in zip(examples, items, strict=True):
                    item["source"] = render_otherwise(example.source, example.num_frames)
            prompts = [item["prompt"] for item in items]
            frames = self.pipe(
                prompts,
                task=task,
                generator=[torch.Generator().manual_seed(self.seed * self.count + number) for number in numbers],
                num_inference_steps=self.steps,
                output_type="np",
                **media_of(dataset, items),
                **self._nulled(line, len(prompts)),
            ).frames
            clips = (np.asarray(frames) * 255).round().astype(np.uint8)
            results += zip(examples, clips, strict=True)
            shown += [Shown(i["prompt"], i.get("source"), clip) for i, clip in zip(items, clips, strict=True)][:SHOWN]
        self.shown[line, split] = shown[:SHOWN]
        return results

    def _nulled(self, line: str, count: int) -> dict[str, Any]:
        """What stands in place of the text or of the MLLM's states: the stored null ones."""
        if line == "t2v_visual_only":
            return {"prompt_embeds": [self.pipe.adapter.null_prompt_embeds()] * count}
        if line == "t2v_text_only":
            return {"mllm_hidden_states": [self.pipe.mllm.vision_head.null_hidden_states()] * count}
        return {}

    def _understand(self, split: str) -> list[dict[str, bool]]:
        """Ask the questions of a split, half of them on clips."""
        verdicts, shown = [], []
        halves: tuple[tuple[Kind, int], ...] = (("video", (self.count + 1) // 2), ("image", self.count // 2))
        for kind, count in halves:
            dataset = ShapesDataset("understand", split, count, self.seed, kind)
            for numbers in self._batches(range(count), f"understand, {kind}s, {split}"):
                items = [dataset[number] for number in numbers]
                prompts = [item["prompt"] for item in items]
                media = media_of(dataset, items)
                media.pop("fps", None)
                answers = self.pipe(prompts, task="understand", max_new_tokens=LONGEST_ANSWER, **media).text
                verdicts += [check_answer(dataset.example(n), a) for n, a in zip(numbers, answers, strict=True)]
                shown += [Shown(f"{i['prompt']}  -  {a}", i["source"]) for i, a in zip(items, answers, strict=True)]
        self.shown["understand", split] = shown[:SHOWN]
        return verdicts

    def _routing(self, split: str) -> list[dict[str, bool]]:
        """Which task the MLLM takes, asked one by one as a user does."""
        verdicts = []
        datasets = [
            ShapesDataset(
                task, split, -(-self.count // len(ROUTED)), self.seed, "image" if task == "understand" else None
            )
            for task in ROUTED
        ]
        for (number,) in self._batches(range(self.count), f"routing, {split}", size=1):
            dataset = datasets[number % len(datasets)]
            item = dataset[number // len(datasets)]
            media = media_of(dataset, [item])
            source = Source.of(media.get("video"), media.get("image"), 1)
            task, _ = self.pipe.answer([item["prompt"]], source, None, LONGEST_ANSWER)
            verdicts.append(check_routing(dataset.example(number // len(datasets)), task))
        return verdicts

    def _batches(self, numbers: range, title: str, size: int | None = None) -> Iterator[range]:
        starts = range(0, len(numbers), size or self.batch_size)
        for start in track(starts, title, console=Console(stderr=True), transient=True):
            yield numbers[start : start + (size or self.batch_size)]


def checked_lines(lines: Sequence[str] | None, sources: str) -> tuple[str, ...]:
    """
    The lines to measure: by default all that have such sources.

    Raises:
        ValueError: as [`Evaluation.run`], and for unknown `sources`.
    """
    if sources not in SOURCES:
        raise ValueError(f"`sources` must be one of {', '.join(SOURCES)}, got {sources!r}.")
    known = tuple(LINES) if sources == SOURCES[0] else EDITS
    unknown = sorted(set(lines or ()) - set(known))
    if unknown:
        of = "" if known != EDITS else f" with `sources={sources!r}`"
        raise ValueError(f"`lines` must be among {', '.join(known)}{of}, got {', '.join(unknown)}.")
    return tuple(lines or known)


def media_of(dataset: ShapesDataset, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sources of examples as the pipeline takes them."""
    if "source" not in items[0]:
        return {}
    if dataset.kind == "video":
        return {"video": [item["source"] for item in items], "fps": FPS}
    return {"image": [Image.fromarray(item["source"][0]) for item in items]}


def save_evaluation(report: Report, shown: dict[tuple[str, str], list[Shown]], folder: Path) -> None:
    """
    Write `scores.json`, a contact sheet for each line and split, and `strip.png`, a row of each task.

    Each comes to its name when it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheets = {f"{line}_{split}": rows for (line, split), rows in shown.items()}
    first = [shown[line, SHOWN_SPLITS[0]][0] for line in STRIP if (line, SHOWN_SPLITS[0]) in shown]
    for name, rows in (sheets | ({"strip": first} if first else {})).items():
        with complete_or_absent(folder / f"{name}.png") as partial:
            results_sheet(rows).save(partial)
    write_json(folder / "scores.json", report.to_dict())


__all__ = ["EDITS", "SOURCES", "Evaluation", "checked_lines", "media_of", "save_evaluation"]
