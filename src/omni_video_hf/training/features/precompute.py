"""`precompute`: check and plan all rows of raw data, then compute missing and stale entries of a feature cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm

from ...tasks import get_task
from ..data.bad_data import Offender, stop_or_count
from ..data.framing import Framing, FramingRules
from ..data.media_table import MediaTable, Row, check_row, probe
from .cache_builder import BuildReport, build_cache
from .cache_files import check_output
from .encoder import FeatureEncoder


@dataclass(frozen=True)
class TableSample:
    """
    A row of raw data as a sample of a cache.

    Args:
        table: the data.
        number: number of the row.
        encoder: computes its features.
        framing: part of the target that is used; `None` for a question.
        source_framing: part of the source that is used; `None` without a source.
    """

    table: MediaTable
    number: int
    encoder: FeatureEncoder
    framing: Framing | None = None
    source_framing: Framing | None = None

    @property
    def key(self) -> str:
        """Name of the row."""
        return self.table.ids[self.number]

    def provenance(self) -> dict[str, Any]:
        """Fields of `features.PROVENANCE`. The files are read once, to be sure of what is in them."""
        row, framing = self.table[self.number], self.framing
        fields = {
            "task": row.task,
            "text": row.text,
            "answer": row.answer,
            "media_sha256": row.media.sha256() if row.media else None,
            "source_sha256": row.source.sha256() if row.source else None,
            **self.encoder.provenance_of(row.task),
        }
        if framing is not None:
            names = ("width", "height", "num_frames", "fps")
            fields |= {name: getattr(framing, name) for name in names} | {"crop": list(framing.crop)}
        if self.source_framing is not None:
            fields["source_crop"] = list(self.source_framing.crop)
        return fields

    def compute(self) -> dict[str, torch.Tensor]:
        """Decode the files and encode them."""
        return self.encoder.encode(self.table[self.number], self.framing, self.source_framing)


def plan_row(
    row: Row, rules: FramingRules, presets: Mapping[str, Mapping[str, Any]]
) -> tuple[Framing | None, Framing | None]:
    """
    Determine the parts of target and source that are used for a row.

    Args:
        row: a row without problems.
        rules: buckets and frame rate of the user.
        presets: size, frame number and rate of every task, for values that the rules do not set.

    Raises:
        ValueError: for a video that is too short, or an edit whose source and target differ in size.
    """
    if get_task(row.task).answers_in_text:
        return None, None
    if row.media is None:
        raise ValueError(f"{row.id}: task {row.task!r} needs a file.")
    info = probe(row.media)
    framing = rules.frame(info, presets[row.task])
    if row.source is None:
        return framing, None
    source_info = probe(row.source)
    if get_task(row.task).keeps_size and (source_info.width, source_info.height) != (info.width, info.height):
        raise ValueError(
            f"source and target of an edit must have one size, got {source_info.width}x{source_info.height} and "
            f"{info.width}x{info.height}: the crop would shift one against the other."
        )
    # The source of a video goes at the target's rate, or the two would run apart.
    alike = FramingRules([(framing.width, framing.height)], [framing.num_frames], framing.fps or "source")
    try:
        return framing, alike.frame(source_info, presets[row.task])
    except ValueError as error:
        raise ValueError(f"`source`: {error}") from error


def plan_table(
    table: MediaTable, encoder: FeatureEncoder, on_bad_data: str = "stop"
) -> tuple[list[TableSample], list[Offender]]:
    """
    Check every row before anything is computed; the processes share the rows.

    Returns:
        The samples, and those that were left out; the same on every process.

    Raises:
        BadDataError: for rows that cannot be used.
    """
    state = PartialState()
    plans: list[tuple[int, tuple[Framing | None, Framing | None]]] = []
    offenders: list[Offender] = []
    mine = range(state.process_index, len(table), state.num_processes)
    for number in tqdm(mine, desc="Checking data", unit="row"):
        row = table[number]
        problems = list(check_row(row, encoder.pipeline.processor))
        if not problems:
            try:
                plans.append((number, plan_row(row, encoder.settings.framing, encoder.pipeline.config.presets)))
            except ValueError as error:
                problems = [Offender(row.id, " ".join(str(error).split()))]
        offenders += problems
    offenders, plans = gather_object(offenders), gather_object(plans)
    stop_or_count(offenders, len(table), on_bad_data)
    return [TableSample(table, number, encoder, *plan) for number, plan in sorted(plans)], offenders


def precompute(
    table: MediaTable,
    encoder: FeatureEncoder,
    folder: str | Path,
    *,
    on_bad_data: str = "stop",
    shard_entries: int = 64,
) -> BuildReport:
    """
    Update a cache with the features of raw data.

    Args:
        table: table of the data.
        encoder: encoder of the features.
        folder: the cache.
        on_bad_data: `"stop"` or `"skip"`.
        shard_entries: maximum number of entries per shard; a kill loses at most one shard per process.

    Raises:
        BadDataError: for samples that cannot be used: before the computation those that a check of the files finds,
            after it those that only decoding all frames finds.
        ValueError: if `folder` contains anything but a cache.
    """
    check_output(folder)
    samples, left_out = plan_table(table, encoder, on_bad_data)
    report = build_cache(
        folder,
        samples,
        on_bad_data=on_bad_data,
        about={"made_by": "precompute", **encoder.provenance},
        shard_entries=shard_entries,
    )
    report.total, report.skipped = len(table), left_out + report.skipped
    return report


__all__ = ["TableSample", "plan_row", "plan_table", "precompute"]
