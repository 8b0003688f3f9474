"""The data set of Omni-Video Shapes: examples of every task, drawn on the fly from a seed."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..tasks import get_task
from .prompts import Kind, edit_prompt, generation_prompt, question_and_answer
from .scene import ATTRIBUTES, HELD_OUT, MOTIONS, NUM_FRAMES, Scene, render, room

# Tasks and splits number the random streams: append only, or every example changes.
TASKS = ("t2i", "t2v", "i2i", "v2v", "understand")
SPLITS = ("train", "seen", "composition")

_PAIRS = [(color, shape) for color in ATTRIBUTES["color"] for shape in ATTRIBUTES["shape"]]
_POOLS = {False: [pair for pair in _PAIRS if pair not in HELD_OUT], True: sorted(HELD_OUT)}


@dataclass(frozen=True)
class Example:
    """
    One example in words and scenes; [`ShapesDataset`] draws it.

    Args:
        task: `t2i`, `t2v`, `i2i`, `v2v` or `understand`.
        kind: whether it is about an image or a video.
        prompt: what to draw, how to edit, or the question.
        source: the scene to edit or ask about; `None` for generation.
        target: the scene to draw; `None` for questions.
        answer: the exact answer to a question, else `None`.
        attribute: what an edit changes or a question is on (or `"describe"`); `None` for generation.

    Example:
        >>> from omni_video_hf.shapes import ShapesDataset
        >>> ShapesDataset("t2i", "train", length=8).example(0).kind
        'image'
    """

    task: str
    kind: Kind
    prompt: str
    source: Scene | None = None
    target: Scene | None = None
    answer: str | None = None
    attribute: str | None = None

    @property
    def num_frames(self) -> int:
        """Frames of its clips; 1 for images."""
        return NUM_FRAMES if self.kind == "video" else 1


class ShapesDataset(Dataset):
    """
    A map-style data set of one task whose example `index` is a function of task, split, seed and `index` alone.

    Splits draw from separate random streams, so that no seed brings an example of one into another:
    `"train"` and `"seen"` hold every colour and shape but the pairs in `HELD_OUT`; `"composition"` holds exactly
    those: as the result of generation and edits, and as what questions are about. Sources of edits that change colour
    or shape are seen pairs there. An edit always changes its source.

    Args:
        task: one of `TASKS`.
        split: one of `SPLITS`.
        length: number of examples; a longer data set begins with the same ones.
        seed: not negative.
        kind: `"image"` or `"video"`, needed by `understand` only; the other tasks have theirs.

    Items hold what the task has, so that default collation works: `prompt`, `source` and `target` (uint8
    `[frames, 64, 64, 3]`, one frame for images) and `answer`.

    Raises:
        ValueError: for an unknown name, a `kind` that is not the task's, or a negative number.

    Example:
        >>> from omni_video_hf.shapes import ShapesDataset
        >>> sorted(ShapesDataset("i2i", "train", length=8)[0])
        ['prompt', 'source', 'target']
    """

    def __init__(self, task: str, split: str, length: int, seed: int = 0, kind: Kind | None = None) -> None:
        for name, value, values in (("task", task, TASKS), ("split", split, SPLITS)):
            if value not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {value!r}.")
        for name, number in (("length", length), ("seed", seed)):
            if number < 0:
                raise ValueError(f"`{name}` must not be negative, got {number}.")
        row = get_task(task)
        kinds: Any = ("image", "video") if row.answers_in_text else (row.output,)
        if kind is None and len(kinds) == 1:
            kind = kinds[0]
        if kind not in kinds:
            raise ValueError(f"`kind` must be {' or '.join(map(repr, kinds))} for task {task!r}, got {kind!r}.")
        self.task, self.split, self.length, self.seed = task, split, length, seed
        self.kind: Any = kind

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.example(index)
        item: dict[str, Any] = {"prompt": example.prompt}
        for name in ("source", "target"):
            scene = getattr(example, name)
            if scene is not None:
                item[name] = render(scene, example.num_frames)
        if example.answer is not None:
            item["answer"] = example.answer
        return item

    def example(self, index: int) -> Example:
        """
        Example `index` as scenes and words, without drawing it; negative numbers count from the end.

        Example:
            >>> from omni_video_hf.shapes import ShapesDataset
            >>> ShapesDataset("v2v", "train", length=8).example(-1).task
            'v2v'
        """
        index = range(self.length)[index]
        stream = (TASKS.index(self.task), SPLITS.index(self.split), int(self.kind == "video"), self.seed, index)
        rng = np.random.default_rng(stream)
        row = get_task(self.task)
        if row.answers_in_text:
            return self._question(rng)
        if row.source is None:
            scene = _place(rng, self._attributes(rng))
            return Example(self.task, self.kind, generation_prompt(rng, scene, self.kind), target=scene)
        return self._edit(rng)

    def _question(self, rng: np.random.Generator) -> Example:
        scene = _place(rng, self._attributes(rng))
        topics = [*self._changeable(), "describe"]
        topic = topics[rng.integers(len(topics))]
        question, answer = question_and_answer(rng, scene, topic, self.kind)
        return Example(self.task, self.kind, question, source=scene, answer=answer, attribute=topic)

    def _edit(self, rng: np.random.Generator) -> Example:
        """The result is drawn first, then what it was before."""
        result = self._attributes(rng)
        attribute = self._changeable()[rng.integers(len(self._changeable()))]
        before = [{**result, attribute: value} for value in ATTRIBUTES[attribute] if value != result[attribute]]
        if self.split != "composition":
            before = [values for values in before if (values["color"], values["shape"]) not in HELD_OUT]
        source = _place(rng, before[rng.integers(len(before))], result)
        prompt = edit_prompt(rng, source, attribute, result[attribute])
        change: dict[str, Any] = {attribute: result[attribute]}
        target = replace(source, **change)
        return Example(self.task, self.kind, prompt, source=source, target=target, attribute=attribute)

    def _changeable(self) -> list[str]:
        return [name for name in ATTRIBUTES if self.kind == "video" or name != "motion"]

    def _attributes(self, rng: np.random.Generator) -> dict[str, str]:
        pairs = _POOLS[self.split == "composition"]
        color, shape = pairs[rng.integers(len(pairs))]
        values = {"color": color, "shape": shape}
        for name in ("size", "background"):
            values[name] = ATTRIBUTES[name][rng.integers(len(ATTRIBUTES[name]))]
        values["motion"] = ATTRIBUTES["motion"][rng.integers(len(MOTIONS))] if self.kind == "video" else "still"
        return values


def as_media(kind: Kind, frames: np.ndarray) -> np.ndarray:
    """`[frames, 64, 64, 3]` of a scene as images and videos are passed around: an image is its one frame."""
    return frames[0] if kind == "image" else frames


def _place(rng: np.random.Generator, *versions: dict[str, str]) -> Scene:
    """The first version at a place where all of them stay inside the frame."""
    rooms = np.array([room(values["size"], values["motion"]) for values in versions])  # [versions, axis, low and high]
    low, high = rooms[..., 0].max(axis=0), rooms[..., 1].min(axis=0)
    x, y = (low + rng.random(2) * (high - low)).tolist()
    return Scene(**versions[0], center=(x, y))


__all__ = ["SPLITS", "TASKS", "Example", "ShapesDataset", "as_media"]
