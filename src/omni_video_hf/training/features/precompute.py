"""`precompute`: check and plan all rows of raw data, then compute missing and stale entries of a feature cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm

from ...media.clip import VideoClip
from ...tasks import get_task
from ..data.bad_data import Offender, stop_or_count
from ..data.framing import Framing, FramingRules
from ..data.media_table import Media, MediaInfo, MediaTable, Row, check_row, probe
from .cache_builder import BuildReport, build_cache
from .cache_files import check_output
from .encoder import FeatureEncoder
from .known_files import KnownFiles


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
        files: what is known of the files. Default: they are read.
        encoded_by: what [`FeatureEncoder.provenance_of`] says of its task. Default: the encoder is asked.
    """

    table: MediaTable
    number: int
    encoder: FeatureEncoder
    framing: Framing | None = None
    source_framing: Framing | None = None
    files: KnownFiles = field(default_factory=KnownFiles)
    encoded_by: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """Name of the row."""
        return self.table.ids[self.number]

    def provenance(self) -> dict[str, Any]:
        """Fields of `features.PROVENANCE`. A file that is not known is read, to be sure of what is in it."""
        row, framing = self.table[self.number], self.framing
        fields = {
            "task": row.task,
            "text": row.text,
            "answer": row.answer,
            "media_sha256": self.files.sha256(row.media) if row.media else None,
            "source_sha256": self.files.sha256(row.source) if row.source else None,
            **(self.encoded_by or self.encoder.provenance_of(row.task)),
        }
        if framing is not None:
            names = ("width", "height", "num_frames", "fps")
            fields |= {name: getattr(framing, name) for name in names} | {"crop": list(framing.crop)}
        if self.source_framing is not None:
            fields["source_crop"] = list(self.source_framing.crop)
        return fields

    def load(self) -> tuple[VideoClip, VideoClip | None] | None:
        """Decode the files."""
        return self.encoder.decode(self.table[self.number], self.framing, self.source_framing)

    def compute(self, loaded: tuple[VideoClip, VideoClip | None] | None) -> dict[str, torch.Tensor]:
        """Encode texts and decoded files."""
        row = self.table[self.number]
        features = self.encoder.encode(row, self.framing, self.source_framing, loaded)
        for media in (row.media, row.source):
            self.files.check_unchanged(media)
        return features


def plan_row(
    row: Row,
    rules: FramingRules,
    presets: Mapping[str, Mapping[str, Any]],
    look: Callable[[Media], MediaInfo] = probe,
) -> tuple[Framing | None, Framing | None]:
    """
    Determine the parts of target and source that are used for a row.

    Args:
        row: a row without problems.
        rules: buckets and frame rate of the user.
        presets: size, frame number and rate of every task, for values that the rules do not set.
        look: returns the properties of a file.

    Raises:
        ValueError: for a video that is too short, or an edit whose source and target differ in size.
    """
    if get_task(row.task).answers_in_text:
        return None, None
    if row.media is None:
        raise ValueError(f"{row.id}: task {row.task!r} needs a file.")
    info = look(row.media)
    framing = rules.frame(info, presets[row.task])
    if row.source is None:
        return framing, None
    source_info = look(row.source)
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
    table: MediaTable, encoder: FeatureEncoder, on_bad_data: str = "stop", files: KnownFiles | None = None
) -> tuple[list[TableSample], list[Offender]]:
    """
    Check every row before anything is computed; the processes share the rows.

    Returns:
        The samples, and those that were left out; the same on every process.

    Raises:
        BadDataError: for rows that cannot be used.
    """
    state, files = PartialState(), files or KnownFiles()
    rules, presets = encoder.settings.framing, encoder.pipeline.config.presets
    plans: list[tuple[int, str, tuple[Framing | None, Framing | None]]] = []
    offenders: list[Offender] = []
    mine = range(state.process_index, len(table), state.num_processes)
    for number in tqdm(mine, desc="Checking data", unit="row"):
        row = table[number]
        problems = list(check_row(row, encoder.pipeline.processor, files.info))
        if not problems:
            try:
                plans.append((number, row.task, plan_row(row, rules, presets, files.info)))
            except ValueError as error:
                problems = [Offender(row.id, " ".join(str(error).split()))]
        offenders += problems
    offenders, plans = gather_object(offenders), gather_object(plans)
    stop_or_count(offenders, len(table), on_bad_data)
    # Once a task: the hash of a template goes over whole tokenizers.
    encoded_by = {task: encoder.provenance_of(task) for task in sorted({task for _, task, _ in plans})}
    samples = [
        TableSample(table, number, encoder, *plan, files, encoded_by[task])
        for number, task, plan in sorted(plans, key=lambda plan: plan[0])
    ]
    return samples, offenders


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
    files = KnownFiles(folder)
    samples, left_out = plan_table(table, encoder, on_bad_data, files)
    report = build_cache(
        folder,
        samples,
        on_bad_data=on_bad_data,
        about={"made_by": "precompute", **encoder.provenance},
        shard_entries=shard_entries,
    )
    found = gather_object(files.found())
    if PartialState().is_main_process:
        files.save(found)
    report.total, report.skipped = len(table), left_out + report.skipped
    return report


__all__ = ["TableSample", "plan_row", "plan_table", "precompute"]
