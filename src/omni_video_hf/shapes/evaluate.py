"""Runs a checkpoint on examples of Omni-Video Shapes and judges what comes out: every line of the table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..media.sources import Source
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..utils.files import complete_or_absent, write_json
from .dataset import ShapesDataset
from .pictures import Shown, results_sheet
from .prompts import Kind
from .scene import FPS
from .scores import (
    LINES,
    SHOWN_SPLITS,
    Report,
    Score,
    check_answer,
    check_edit,
    check_generation,
    check_routing,
)

ROUTED = ("t2v", "t2i", "v2v", "i2i", "understand")
LONGEST_ANSWER = 32  # tokens; the longest right one takes about 16
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

    Attributes:
        shown: by line and split, the first results: not chosen, so that they show what the scores say.

    Raises:
        ValueError: unless `count` and `batch_size` are positive.
    """

    pipe: OmniVideoPipeline
    count: int = 200
    seed: int = 0
    batch_size: int = 20
    steps: int | None = None
    shown: dict[tuple[str, str], list[Shown]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def run(self, lines: Sequence[str] = tuple(LINES)) -> Report:
        """
        Measure the lines, on both splits where the table has both.

        Raises:
            ValueError: for a line that the table does not have.
        """
        unknown = sorted(set(lines) - set(LINES))
        if unknown:
            raise ValueError(f"`lines` must be among {', '.join(LINES)}, got {', '.join(unknown)}.")
        measure: dict[str, Callable[[str], list[dict[str, bool]]]] = {
            "understand": self._understand,
            "routing": self._routing,
        }
        scores = []
        for line in lines:
            for split in SHOWN_SPLITS if line != "routing" else SHOWN_SPLITS[:1]:
                verdicts = measure[line](split) if line in measure else self._draw(line, split)
                scores.append(Score.of(line, split, verdicts))
        settings = {"count": self.count, "seed": self.seed, "num_inference_steps": self.steps}
        return Report(tuple(scores), settings | {"checkpoint": self.pipe.config.get("_name_or_path")})

    def _draw(self, line: str, split: str) -> list[dict[str, bool]]:
        """Draw and judge the examples of a line that makes pictures."""
        task = line.partition("_")[0]
        dataset = ShapesDataset(task, split, self.count, self.seed)
        verdicts, shown = [], []
        for numbers in self._batches(range(self.count), f"{line}, {split}"):
            items = [dataset[number] for number in numbers]
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
            check = check_edit if "source" in items[0] else check_generation
            verdicts += [check(dataset.example(n), clip) for n, clip in zip(numbers, clips, strict=True)]
            shown += [Shown(i["prompt"], i.get("source"), clip) for i, clip in zip(items, clips, strict=True)][:SHOWN]
        self.shown[line, split] = shown[:SHOWN]
        return verdicts

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


__all__ = ["Evaluation", "media_of", "save_evaluation"]
