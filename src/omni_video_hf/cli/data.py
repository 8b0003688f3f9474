"""The commands `precompute` and `import-features`: their flags. The code behind them is imported when they run."""

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from .checks import check_repository, place_of
from .console import as_usage, one_line_errors
from .options import Dtype, Revision, Token, Verbose


class DataFormat(StrEnum):
    """Format of the training data, as in `datasets`."""

    videofolder = "videofolder"
    imagefolder = "imagefolder"
    captions = "captions"
    json = "json"
    csv = "csv"
    parquet = "parquet"
    webdataset = "webdataset"


class OnBadData(StrEnum):
    """Choices for samples that cannot be used: stop with an error, or skip them."""

    stop = "stop"
    skip = "skip"


class Instruction(StrEnum):
    """Form in which the cache stores an instruction: MLLM hidden states, or token ids."""

    states = "states"
    tokens = "tokens"


class MllmFrames(StrEnum):
    """Frames of a v2v source that the MLLM gets."""

    first = "first"
    all = "all"


Cache = Annotated[Path, typer.Option("--output", "-o", help="Folder of the feature cache; updated if it exists.")]
BadData = Annotated[OnBadData, typer.Option(help="List all samples that cannot be used, then stop or skip them.")]


def precompute_command(
    data: Annotated[
        str, typer.Argument(help="JSONL, CSV, parquet or .tar file, or folder with videos, images, parquet or .tar.")
    ],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder of a model, or its Hub repository.", envvar="OMNI_VIDEO_MODEL"),
    ],
    output: Cache,
    size: Annotated[
        list[str] | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size of a bucket in pixels. Repeatable.")
    ] = None,
    frames: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of frames of a bucket, 4n+1. Repeatable.")
    ] = None,
    fps: Annotated[
        str | None, typer.Option(help="Frame rate to resample to; `source` keeps the rate of each video.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of all samples, for data without the column `task`.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=YOURS", help="Name of a column in your data, e.g. prompt=caption. Repeatable."),
    ] = None,
    data_format: Annotated[
        DataFormat | None, typer.Option("--format", help="Format of the data. Default: found by the files.")
    ] = None,
    instruction: Annotated[
        Instruction, typer.Option(help="Store MLLM states, or tokens for stages that train the MLLM.")
    ] = Instruction.states,
    mllm_frames: Annotated[
        MllmFrames | None, typer.Option(help="Frames of a v2v source for the MLLM. Default: the model's setting.")
    ] = None,
    target_encoder: Annotated[
        str | None, typer.Option(help="SigLIP folder or repository that computes the targets of the alignment loss.")
    ] = None,
    on_bad_data: BadData = OnBadData.stop,
    shard_entries: Annotated[
        int, typer.Option(min=1, help="Samples per shard; a kill loses the work of at most one shard per process.")
    ] = 64,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Dtype of MLLM and text encoder. Default: as stored. The VAE always uses float32."),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Compute the features of images, videos and texts once, for training.

    After an interruption or a change of the data run the same command again: only missing and stale features are
    computed. `accelerate launch -m omni_video_hf precompute ...` shares the work between processes or GPUs.
    """
    with one_line_errors(verbose):
        check_repository(model)
        work = _work()
        work.check_cache(output)
        with as_usage():
            settings = work.read_settings(size or (), frames or (), fps, instruction, mllm_frames)
            table = work.read_table(data, data_format, task, column or ())
        folder = work.compute(
            table,
            place_of(model),
            settings,
            output,
            target_encoder=target_encoder,
            dtype=dtype,
            revision=revision,
            token=token,
            on_bad_data=on_bad_data,
            shard_entries=shard_entries,
        )
        print(folder)  # noqa: T201 - for scripts


def import_features_command(
    sources: Annotated[list[Path], typer.Argument(help="Feature files of the authors' code, or folders with them.")],
    output: Cache,
    task: Annotated[
        str | None, typer.Option(help="Task of all files, where the latents do not determine it, such as i2v.")
    ] = None,
    on_bad_data: BadData = OnBadData.stop,
    verbose: Verbose = False,
) -> None:
    """Import feature pickles of the authors' code into a cache. No code in the pickles is run."""
    with one_line_errors(verbose):
        print(_work().bring_in(sources, output, task, on_bad_data))  # noqa: T201


def _work() -> ModuleType:
    """Import and return the module behind the commands; an `ImportError` says how to install what is missing."""
    try:
        return import_module(".data_work", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__.partition(".")[0]):
            raise
        raise ImportError(
            f"The package {error.name} is not installed: run `pip install 'omni-video-hf[train]'` to prepare data."
        ) from error
