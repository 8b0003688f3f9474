"""Data of a training run: load and check feature caches and questions, and create the batch sampler."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ...processing.processing_omni_video import OmniVideoProcessor
from ..features.cache import FeatureCache
from ..recipe import RunArguments
from .bad_data import BadDataError, count_problems, offenders_table
from .batch_sampler import OmniVideoBatchSampler
from .collator import BucketedDataset, MixedDataset
from .conversations import ConversationDataset
from .media_table import load_media_table


def load_training_data(run: RunArguments, processor: OmniVideoProcessor, console: Console) -> MixedDataset:
    """
    Load the feature caches and questions of a run as one dataset.

    Args:
        run: arguments of the run.
        processor: processor for the questions.
        console: console on which samples that cannot be used are listed.

    Raises:
        ValueError: if samples cannot be used and `on_bad_data` is `stop`.
    """
    return _load(run.data or [], run.questions, run, processor, console)


def load_evaluation_data(run: RunArguments, processor: OmniVideoProcessor, console: Console) -> MixedDataset | None:
    """Load the evaluation data of a run as one dataset; `None` without `eval_data`. See [`load_training_data`]."""
    return _load(run.eval_data, None, run, processor, console) if run.eval_data else None


def _load(
    caches: str | Sequence[str], questions: str | None, run: RunArguments, processor: OmniVideoProcessor, out: Console
) -> MixedDataset:
    folders = [caches] if isinstance(caches, str) else caches
    try:
        caches_read = [FeatureCache(folder) for folder in folders]
        if run.check_data:
            caches_read = [cache.check(run.on_bad_data) for cache in caches_read]
        datasets: list[BucketedDataset] = [*caches_read]
        if questions is not None:
            datasets.append(ConversationDataset(load_media_table(questions), processor, run.on_bad_data))
    except BadDataError as error:
        out.print(offenders_table(error.offenders, error.total))
        raise ValueError(
            f"{count_problems(error.offenders, error.total)}: repair or remove the samples, or pass "
            "`--on_bad_data skip`."
        ) from error
    return MixedDataset(datasets)


def is_precomputed(data: MixedDataset) -> bool:
    """Whether all samples of generation tasks have MLLM states, so that only text answers need the MLLM."""
    return all(dataset.is_precomputed for dataset in data.datasets if isinstance(dataset, FeatureCache))


def make_sampler(
    data: MixedDataset, run: RunArguments, batch_size: int, num_processes: int, seed: int
) -> OmniVideoBatchSampler:
    """
    Create the batch sampler, with tasks mixed by `run.task_weights`.

    Raises:
        ValueError: for weights that do not fit the data.
    """
    return OmniVideoBatchSampler(
        data.buckets,
        batch_size,
        num_processes,
        weights=run.task_weights,
        stopping_strategy=run.stopping_strategy,
        seed=seed,
    )


def names_of_data(run: RunArguments) -> list[str]:
    """Names of the data for the model card."""
    folders = [run.data] if isinstance(run.data, str) else list(run.data or [])
    return [Path(folder).name for folder in [*folders, *([run.questions] if run.questions else [])]]
