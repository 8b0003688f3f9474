"""
Scores of Omni-Video Shapes: what a model made of examples, judged, counted and shown. No model is run in here.

    verdicts = [check_generation(example, frames) for example, frames in ...]
    report = Report((Score.of("t2v", "seen", verdicts), ...))  # of edits also their distances, see [`read_edit`]
    report.table(), report.to_dict()
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from statistics import NormalDist, median
from typing import Any

from rich.table import Table

from ..media.video_loading import load_video
from .dataset import Example
from .edits import MAX_DISTANCE, read_edit
from .judge import read_scene

CONFIDENCE = 0.95
SHOWN_SPLITS = ("seen", "composition")
ALL = "all"  # the verdict that a bar is on


@dataclass(frozen=True)
class Line:
    """A line of the table: its title, and the rate that is wanted on each split (`None`: it is only reported)."""

    title: str
    seen: float | None = None
    composition: float | None = None


LINES = {
    "t2v": Line("t2v, all of colour, shape, size, background, motion right", 0.95, 0.80),
    "t2i": Line("t2i, all right", 0.97, 0.85),
    "v2v": Line("v2v, asked attribute changed and all others kept", 0.95, 0.85),
    "i2i": Line("i2i, asked attribute changed and all others kept", 0.95, 0.90),
    "understand": Line("understanding, exact answers", 0.98, 0.90),
    "routing": Line("routing without `task`", 0.99),
    "t2v_visual_only": Line("t2v, umT5 text nulled", 0.80),
    "t2v_text_only": Line("t2v, visual tokens nulled"),
}
# Of each split: the median distance in pixels, and the share of frames within `MAX_DISTANCE`, that edits must reach.
PLACE_BARS = {"seen": (0.7, 0.97), "composition": (0.8, 0.95)}


# --- one example ----------------------------------------------------------------------------------------------------


def check_generation(example: Example, frames: Any) -> dict[str, bool]:
    """
    Whether a clip or image shows what a `t2v` or `t2i` example asks for.

    Args:
        example: with a target.
        frames: as in [`read_scene`].

    Returns:
        A verdict for each attribute (motion in videos only), and `"all"`.
    """
    found = _right_attributes(example, frames)
    return {**found, ALL: all(found.values())}


def check_edit(example: Example, frames: Any) -> dict[str, bool]:
    """
    Whether an edit changed what was asked for and kept everything else, place and surroundings too.

    Returns:
        The verdicts of [`EditReading`]; `"all"` is everything together.
    """
    return read_edit(example, frames).verdicts


def check_answer(example: Example, answer: str) -> dict[str, bool]:
    """Whether an answer is exact but for white space around it, under what the question is on and under `"all"`."""
    if example.answer is None:
        raise ValueError(f"`example` must be a question, got one of task {example.task!r}.")
    right = answer.strip() == example.answer
    return {str(example.attribute): right, ALL: right}


def check_routing(example: Example, task: str) -> dict[str, bool]:
    """Whether a model that was given no task chose the example's."""
    return {example.task: task == example.task, ALL: task == example.task}


def _right_attributes(example: Example, frames: Any) -> dict[str, bool]:
    if example.target is None:
        raise ValueError(f"`example` must have something to draw, got one of task {example.task!r}.")
    pictures = load_video([frames] if getattr(frames, "ndim", 4) == 3 else frames).frames
    if (len(pictures) > 1) != (example.kind == "video"):
        raise ValueError(
            f"`frames` must be {'a clip' if example.kind == 'video' else 'one image'}, got {len(pictures)}."
        )
    found = read_scene(pictures).right(example.target)
    return {name: right for name, right in found.items() if example.kind == "video" or name != "motion"}


# --- many examples --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """How many of how many were right."""

    right: int
    total: int

    @property
    def rate(self) -> float:
        """Share that was right."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true rate lies at 95 % confidence, see [`wilson_interval`]."""
        return wilson_interval(self.right, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Counts, rate and interval as plain values."""
        return {"right": self.right, "total": self.total, "rate": self.rate, "interval": list(self.interval)}


@dataclass(frozen=True)
class Place:
    """
    How far the shapes of edits lie from their targets.

    Args:
        split: `"seen"` or `"composition"`, which decides the bars.
        distances: pixels, one for every frame of every example; infinite where no shape is found.
    """

    split: str
    distances: tuple[float, ...]

    @property
    def median(self) -> float:
        """Pixels; infinite where most frames have no shape."""
        return median(self.distances)

    @property
    def within(self) -> Count:
        """Frames whose shape lies within `MAX_DISTANCE`."""
        return Count(sum(distance <= MAX_DISTANCE for distance in self.distances), len(self.distances))

    @property
    def passed(self) -> bool:
        """Whether median and share reach their bars."""
        farthest, share = PLACE_BARS[self.split]
        return self.median <= farthest and self.within.rate >= share

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite median is `None`. Frames of a clip depend on each other: there is no interval."""
        farthest, share = PLACE_BARS[self.split]
        return {
            "frames": len(self.distances),
            "frames_without_shape": self.distances.count(inf),
            "median_pixels": self.median if isfinite(self.median) else None,
            "within_pixels": MAX_DISTANCE,
            "share_within": self.within.rate,
            "bar_median_pixels": farthest,
            "bar_share_within": share,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Score:
    """
    What was counted for one line of the table on one split.

    Args:
        line: key of `LINES`.
        split: `"seen"` or `"composition"`.
        counts: of every kind of verdict; `"all"` is the score.
        place: of edits, where their shapes lie.
    """

    line: str
    split: str
    counts: Mapping[str, Count]
    place: Place | None = None

    def __post_init__(self) -> None:
        for name, value, values in (("line", self.line, LINES), ("split", self.split, SHOWN_SPLITS)):
            if value not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {value!r}.")

    @classmethod
    def of(
        cls, line: str, split: str, verdicts: Iterable[Mapping[str, bool]], distances: Iterable[float] = ()
    ) -> "Score":
        """
        Count the verdicts of the `check_` functions, or of [`EditReading`], whose distances belong to it.

        Raises:
            ValueError: without any verdict, or for an unknown line or split.
        """
        counts: dict[str, list[int]] = {}
        for verdict in verdicts:
            for name, right in verdict.items():
                count = counts.setdefault(name, [0, 0])
                count[0] += bool(right)
                count[1] += 1
        if ALL not in counts:
            raise ValueError(f"`verdicts` of line {line!r} must hold at least one example, got none.")
        place = Place(split, tuple(distances))
        counted = {name: Count(*count) for name, count in counts.items()}
        return cls(line, split, counted, place if place.distances else None)

    @property
    def bar(self) -> float | None:
        """The rate that is wanted; `None` where it is only reported."""
        return getattr(LINES[self.line], self.split)

    @property
    def passed(self) -> bool | None:
        """Whether the rate reaches the bar; `None` without a bar."""
        return None if self.bar is None else self.counts[ALL].rate >= self.bar

    def to_dict(self) -> dict[str, Any]:
        """The score as plain values."""
        counts = {name: count.to_dict() for name, count in self.counts.items()}
        score = {"line": self.line, "split": self.split, "bar": self.bar, "passed": self.passed, "counts": counts}
        return score | ({"place": self.place.to_dict()} if self.place else {})


@dataclass(frozen=True)
class Report:
    """
    Scores of one checkpoint.

    Args:
        scores: at most one per line and split.
        settings: what they were measured with, such as checkpoint, seed and steps; plain values.
    """

    scores: tuple[Score, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [(score.line, score.split) for score in self.scores]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"`scores` must hold one score per line and split, got several of {twice}.")

    @property
    def passed(self) -> bool:
        """Whether no score misses its bar, and no place those of places."""
        places = [score.place for score in self.scores if score.place]
        return all(score.passed is not False for score in self.scores) and all(place.passed for place in places)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        scores = [score.to_dict() for score in self.scores]
        return {"settings": dict(self.settings), "passed": self.passed, "confidence": CONFIDENCE, "scores": scores}

    def table(self) -> Table:
        """Rates in percent with their intervals, number of examples and bars; one row a line."""
        table = Table(title="Omni-Video Shapes")
        for header in ("", "seen combinations", "never-trained combinations"):
            table.add_column(header, justify="left")
        found = {(score.line, score.split): score for score in self.scores}
        for key, line in LINES.items():
            cells = [found.get((key, split)) for split in SHOWN_SPLITS]
            if any(cells):
                table.add_row(line.title, *map(_cell, cells))
        for key in LINES:
            cells = [found.get((key, split)) for split in SHOWN_SPLITS]
            places = [score.place if score else None for score in cells]
            if any(places):
                table.add_row(place_title(key), *map(_place_cell, places))
        return table


def score_table(scores: Sequence[Score], title: str) -> Table:
    """Percentages of every kind of verdict, the score itself last; one row a line and split."""
    names = sorted(dict.fromkeys(name for score in scores for name in score.counts), key=ALL.__eq__)
    table = Table("", "split", *names, "of", title=title)
    for score in scores:
        rates = [f"{100 * score.counts[name].rate:.1f}" if name in score.counts else "-" for name in names]
        table.add_row(score.line, score.split, *rates, str(score.counts[ALL].total))
    return table


def wilson_interval(right: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """
    Wilson's score interval of a rate (Wilson 1927), which stays within 0..1 and is of use near both.

    Raises:
        ValueError: unless 0 <= right <= total, total > 0.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"`right` must be in 0..`total` and `total` positive, got {right} of {total}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = right / total, z * z / total
    center = (rate + spread / 2) / (1 + spread)
    half = (z / (1 + spread)) * (rate * (1 - rate) / total + spread / (4 * total)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def place_title(line: str) -> str:
    """What the table's row on the place of the shape is called."""
    return f"{line}, place kept: median distance, frames within {MAX_DISTANCE:g} px"


def _place_cell(place: Place | None) -> str:
    if place is None:
        return "-"
    farthest, share = PLACE_BARS[place.split]
    text = f"{place.median:.1f} px, {100 * place.within.rate:.1f} % of {place.within.total}"
    color = "green" if place.passed else "red"
    return f"[{color}]{text}[/{color}], wanted {farthest:g} px, {100 * share:.0f} %"


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    count = score.counts[ALL]
    low, high = count.interval
    text = f"{100 * count.rate:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of {count.total}"
    if score.bar is None:
        return text
    color = "green" if score.passed else "red"
    return f"[{color}]{text}[/{color}], wanted {100 * score.bar:.0f} %"


__all__ = [
    "LINES",
    "PLACE_BARS",
    "Count",
    "Line",
    "Place",
    "Report",
    "Score",
    "check_answer",
    "check_edit",
    "check_generation",
    "check_routing",
    "place_title",
    "score_table",
    "wilson_interval",
]
