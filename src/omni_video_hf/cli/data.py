"""The `omni-video` commands that make feature caches, `precompute` and `import-features`; light until they run."""

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
    """What `datasets` is to read the data with."""

    videofolder = "videofolder"
    imagefolder = "imagefolder"
    captions = "captions"
    json = "json"
    csv = "csv"
    parquet = "parquet"
    webdataset = "webdataset"


class OnBadData(StrEnum):
    """What to do with samples that cannot be used."""

    stop = "stop"
    skip = "skip"


class Instruction(StrEnum):
    """What the cache holds of instructions."""

    states = "states"
    tokens = "tokens"


class MllmFrames(StrEnum):
    """Frames of a v2v source that the MLLM sees."""

    first = "first"
    all = "all"


Cache = Annotated[Path, typer.Option("--output", "-o", help="Folder of the cache; brought up to date if it is there.")]
BadData = Annotated[OnBadData, typer.Option(help="List all samples that cannot be used and stop, or leave them out.")]


def precompute_command(
    data: Annotated[
        str, typer.Argument(help="JSONL, CSV, parquet or .tar file, or folder of videos, images, parquet or .tar.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub repository.", envvar="OMNI_VIDEO_MODEL")],
    output: Cache,
    size: Annotated[
        list[str] | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size of a bucket. Repeatable.")
    ] = None,
    frames: Annotated[list[int] | None, typer.Option(min=1, help="Frames of a bucket, 4n+1. Repeatable.")] = None,
    fps: Annotated[str | None, typer.Option(help="Rate to resample to, or `source` to keep each video's own.")] = None,
    task: Annotated[str | None, typer.Option(help="For data without the column `task`.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="NAME=YOURS", help="Your name of a column, e.g. prompt=caption.")
    ] = None,
    data_format: Annotated[
        DataFormat | None, typer.Option("--format", help="What the data look like by default.")
    ] = None,
    instruction: Annotated[Instruction, typer.Option(help="MLLM states, or tokens for stages that train it.")] = (
        Instruction.states
    ),
    mllm_frames: Annotated[
        MllmFrames | None, typer.Option(help="What the MLLM sees of a v2v source, by default what the model says.")
    ] = None,
    target_encoder: Annotated[
        str | None, typer.Option(help="SigLIP folder or repository for the features that visual tokens align with.")
    ] = None,
    on_bad_data: BadData = OnBadData.stop,
    shard_entries: Annotated[int, typer.Option(min=1, help="Most samples of a shard: what a kill costs.")] = 64,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of MLLM and text encoder, as stored by default; the VAE stays in float32.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Compute the features of images, videos and texts once, for training.

    Run it again after an interruption or a change: only what is missing or stale is computed. Under `accelerate
    launch -m omni_video_hf precompute ...` several processes or GPUs share the work.
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
    sources: Annotated[list[Path], typer.Argument(help="Upstream's feature files, or folders of them.")],
    output: Cache,
    task: Annotated[str | None, typer.Option(help="Of all of them, where latents do not tell, such as i2v.")] = None,
    on_bad_data: BadData = OnBadData.stop,
    verbose: Verbose = False,
) -> None:
    """Bring upstream's feature pickles into a cache. Nothing that is in them is run."""
    with one_line_errors(verbose):
        print(_work().bring_in(sources, output, task, on_bad_data))  # noqa: T201


def _work() -> ModuleType:
    """What the commands do, with the packages that it needs."""
    try:
        return import_module(".data_work", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__.partition(".")[0]):
            raise
        raise ImportError(f"Preparing data needs {error.name}: `pip install 'omni-video-hf[train]'`.") from error
