"""`build_cache`: compute missing and stale entries of a feature cache, with several processes, resumable."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm

from ..data.bad_data import BadDataError, Offender, stop_or_count
from .cache import (
    PROVENANCE,
    Record,
    ShardWriter,
    commit,
    next_shard,
    read_records,
    tensor_problems,
    unequal_widths,
)
from .cache_files import begin, check_output, only_run

READERS = 3  # threads that read and decode files; so many samples are in memory beside the one that is computed


class Sample(Protocol):
    """Protocol of a sample whose features are computed."""

    @property
    def key(self) -> str:
        """Its name, unique."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Fields of `PROVENANCE`: everything the features depend on; runs in a thread. Cheap next to [`compute`]."""
        ...

    def load(self) -> Any:
        """What [`compute`] needs of the files; it runs in a thread, while another sample is computed."""
        ...

    def compute(self, loaded: Any) -> dict[str, torch.Tensor]:
        """The features, by name of `TENSORS`, from what [`load`] returned."""
        ...


@dataclass
class BuildReport:
    """
    Report of a run that updated a cache.

    Args:
        total: number of requested samples.
        computed: keys that were not in the cache.
        changed: keys that were there with other provenance, and the fields that differ.
        kept: number of entries that were there already.
        skipped: samples that were left out.
    """

    total: int
    computed: list[str] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=dict)
    kept: int = 0
    skipped: list[Offender] = field(default_factory=list)


@dataclass
class _Share:
    """Results of one process: computed entries and bad samples."""

    report: BuildReport
    offenders: list[Offender]


def build_cache(
    folder: str | Path,
    samples: Sequence[Sample],
    *,
    on_bad_data: str = "stop",
    about: Mapping[str, Any] | None = None,
    shard_entries: int = 64,
    description: str = "Computing features",
) -> BuildReport:
    """
    Update a cache to contain exactly `samples`: compute missing and stale entries, remove all others.

    With `accelerate launch` several processes share the work. A killed run is resumed from its last shards.

    Args:
        folder: the cache; created if it does not exist. A folder with anything else in it is refused.
        samples: all samples of the cache.
        on_bad_data: `"stop"` or `"skip"`, see [`stop_or_count`]. Samples that fail while they are computed do not stop
            the others: what was computed is kept for the next run.
        about: further entries of the manifest.
        shard_entries: most entries of a shard; what a kill costs at most, per process.
        description: text of the progress bar.

    Raises:
        BadDataError: with all samples that cannot be used.
        ValueError: if another run uses this cache, or if `folder` is not a cache.
    """
    state, folder = PartialState(), Path(folder)
    with _only_run(folder, state):
        known = read_records(folder)
        writer = ShardWriter(folder, state.process_index, next_shard(folder), shard_entries=shard_entries)
        state.wait_for_everyone()  # all have seen the same shards before the first one is added
        share = _compute_share(samples, known, writer, state, description)
        shares = gather_object([share])
        report = _joined(shares, len(samples))
        offenders = [offender for other in shares for offender in other.offenders]
        records: list[Record] = []
        if state.is_main_process:
            computed = read_records(folder)
            bad = {offender.sample for offender in offenders}
            records = [computed[sample.key] for sample in samples if sample.key not in bad]
            offenders += unequal_widths(records)
        offenders = gather_object(offenders if state.is_main_process else [])
        left_out = stop_or_count(offenders, len(samples), on_bad_data)
        report.skipped = offenders
        if state.is_main_process:
            commit(folder, [record for record in records if record["key"] not in left_out], about or {})
        state.wait_for_everyone()
    return report


def _compute_share(
    samples: Sequence[Sample], known: Mapping[str, Record], writer: ShardWriter, state: PartialState, description: str
) -> _Share:
    """Every `num_processes`-th sample, so that neighbours of one size spread over the processes."""
    share = _Share(BuildReport(0), [])
    mine = range(state.process_index, len(samples), state.num_processes)
    for sample, prepared in tqdm(_prepared(samples, mine, known), desc=description, unit="sample", total=len(mine)):
        record = known.get(sample.key)
        try:
            provenance, changed, loaded = prepared.result()
            if record is not None and not changed:
                share.report.kept += 1
                continue
            tensors = sample.compute(loaded)
        except ValueError as error:  # of the data; anything else is a fault and stops the run
            share.offenders += _offenders_of(sample.key, error)
            continue
        problems = list(tensor_problems(provenance["task"], tensors))
        if problems:
            share.offenders += [Offender(sample.key, problem) for problem in problems]
            continue
        writer.add(sample.key, provenance, tensors)
        if record is None:
            share.report.computed.append(sample.key)
        else:
            share.report.changed[sample.key] = changed
    writer.flush()
    return share


def _prepared(
    samples: Sequence[Sample], numbers: Iterable[int], known: Mapping[str, Record]
) -> Iterator[tuple[Sample, Future]]:
    """Samples in order, whose provenance and files threads read ahead, beside the computation."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[tuple[Sample, Future]] = deque()
        try:
            for number in numbers:
                waiting.append((samples[number], pool.submit(_prepare, samples[number], known)))
                if len(waiting) > READERS:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:  # after an error, nothing more is read
            for _, future in waiting:
                future.cancel()


def _prepare(sample: Sample, known: Mapping[str, Record]) -> tuple[dict[str, Any], list[str], Any]:
    """Provenance of a sample, the fields that changed, and the content of its files if it must be computed."""
    provenance, record = sample.provenance(), known.get(sample.key)
    changed = [] if record is None else changed_fields(record, provenance)
    return provenance, changed, sample.load() if record is None or changed else None


def changed_fields(record: Record, provenance: Mapping[str, Any]) -> list[str]:
    """Names of the fields in which the provenance of an entry differs from the requested one: the entry is stale."""
    return [name for name in PROVENANCE if record[name] != provenance.get(name)]


def _offenders_of(key: str, error: ValueError) -> list[Offender]:
    if isinstance(error, BadDataError):
        return error.offenders
    return [Offender(key, " ".join(str(error).split()))]


def _joined(shares: Sequence[_Share], total: int) -> BuildReport:
    report = BuildReport(total)
    for share in shares:
        report.computed += share.report.computed
        report.changed |= share.report.changed
        report.kept += share.report.kept
    return report


@contextmanager
def _only_run(folder: Path, state: PartialState) -> Iterator[None]:
    """Refuse a cache that another run uses; the lock is released when its process ends."""
    with ExitStack() as stack:
        problem = []
        if state.is_main_process:
            try:
                check_output(folder)
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_run(folder))
                check_output(folder)  # once more: another run may just have ended
                begin(folder)
            except (ValueError, OSError) as error:
                problem = [str(error)]
        problem = gather_object(problem)
        if problem:
            raise ValueError(problem[0])
        yield


__all__ = ["BuildReport", "Sample", "build_cache", "changed_fields"]
