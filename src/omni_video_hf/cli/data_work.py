"""The work of `precompute` and `import-features`, and their reports."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..training.data.bad_data import SHOWN, BadDataError, count_problems, offenders_table
from ..training.data.framing import FramingRules
from ..training.data.media_table import MediaTable, load_media_table
from ..training.features.cache import FeatureCache
from ..training.features.cache_builder import BuildReport
from ..training.features.cache_files import check_output
from ..training.features.encoder import FeatureEncoder, PrecomputeSettings, load_encoders
from ..training.features.import_features import import_features
from ..training.features.precompute import precompute
from ..utils.modules import dtype_of
from .checks import width_and_height

console = Console(stderr=True)

LONGEST_WAIT = timedelta(days=7)  # processes wait for each other at the end; one may have had the longest videos


def compute(
    table: MediaTable,
    model: str,
    settings: PrecomputeSettings,
    output: Path,
    *,
    target_encoder: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    on_bad_data: str = "stop",
    shard_entries: int = 64,
) -> Path:
    """Load the encoders, update the cache and print a report; see [`precompute`] for the arguments."""
    start_processes()
    weights = None if dtype is None else dtype_of(dtype)
    pipeline = load_encoders(model, weights, revision=revision, token=token)
    encoder = FeatureEncoder(pipeline, settings, target_encoder)
    return _reported(
        lambda: precompute(table, encoder, output, on_bad_data=on_bad_data, shard_entries=shard_entries), output
    )


def bring_in(sources: Sequence[Path], output: Path, task: str | None, on_bad_data: str) -> Path:
    """Import feature files and print a report; see [`import_features`] for the arguments."""
    return _reported(lambda: import_features(sources, output, task=task, on_bad_data=on_bad_data), output)


def read_settings(
    sizes: Sequence[str], frames: Sequence[int], fps: str | None, instruction: str, mllm_frames: str | None
) -> PrecomputeSettings:
    """Parse the flags of `precompute` into its settings."""
    rules = FramingRules([width_and_height(text) for text in sizes], tuple(frames), _fps(fps))
    words: dict[str, Any] = {"instruction": instruction, "mllm_frames": mllm_frames}  # checked by the settings
    return PrecomputeSettings(rules, **words)


def check_cache(output: Path) -> None:
    """Refuse an output folder that contains anything but a cache, before data are read; see [`check_output`]."""
    check_output(output)


def read_table(data: str | Path, data_format: str | None, task: str | None, columns: Sequence[str]) -> MediaTable:
    """Load the table of the data; `columns` are texts of the form NAME=YOURS."""
    for pair in columns:
        if "=" not in pair:
            raise ValueError(f"`--column {pair}` must be NAME=YOURS, such as prompt=caption.")
    names = dict(pair.split("=", 1) for pair in columns)
    return load_media_table(data, data_format=data_format, task=task, columns=names)


def start_processes() -> PartialState:
    """Join the processes that a launcher has started; accelerate must be told when they run on CPUs."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)


def _reported(work: Callable[[], BuildReport], output: Path) -> Path:
    """Do the work and print its report; print bad samples as a table, so that the error message fits one line."""
    state = start_processes()
    try:
        report = work()
    except BadDataError as error:
        if state.is_main_process:
            console.print(offenders_table(error.offenders, error.total))
        raise ValueError(
            f"{count_problems(error.offenders, error.total)}: repair or remove the samples, or pass "
            "`--on-bad-data skip`."
        ) from error
    finally:
        state.destroy_process_group()  # a process that exits with an open group can crash
    if state.is_main_process:
        _show(report, output)
    return output


def _show(report: BuildReport, output: Path) -> None:
    """Print the samples that changed, those that were skipped, and the buckets of the cache."""
    if report.changed:
        title = f"Changed and computed again: {len(report.changed)}"
        table = Table("sample", "what differs", title=title, title_justify="left")
        for key, names in list(report.changed.items())[:SHOWN]:
            table.add_row(escape(key), ", ".join(names))
        if len(report.changed) > SHOWN:
            table.add_row("...", f"and {len(report.changed) - SHOWN} more")
        console.print(table)
    if report.skipped:
        console.print(offenders_table(report.skipped, report.total))
    buckets = FeatureCache(output).buckets
    table = Table("bucket", "samples", title=str(output), title_justify="left")
    for bucket, number in sorted(Counter(buckets).items(), key=lambda entry: (-entry[1], str(entry[0]))):
        table.add_row(escape(str(bucket)), str(number))
    console.print(table)
    skipped = len({offender.sample for offender in report.skipped})
    console.print(
        f"{len(report.computed)} computed, {len(report.changed)} computed again, {report.kept} kept, "
        f"{skipped} skipped",
        highlight=False,
    )


def _fps(text: str | None) -> float | Literal["source"] | None:
    if text is None:
        return None
    if text == "source":
        return "source"
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`--fps {text}` must be a number or `source`.") from None
