"""What `omni-video eval shapes` takes and does; light until it runs."""

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .console import UsageProblem

if TYPE_CHECKING:
    from ..pipelines.pipeline_omni_video import OmniVideoPipeline

Count = Annotated[int, typer.Option(min=1, help="Examples of each line and split.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of examples and noise.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples drawn at once.")]
Lines = Annotated[list[str] | None, typer.Option("--line", help="Only this line of the table. Repeatable.")]


class Sources(StrEnum):
    """What draws the sources of edits."""

    renderer = "renderer"
    other_renderer = "other-renderer"


SourcesOption = Annotated[
    Sources,
    typer.Option(help="What draws the sources of edits: that of the training data, or another."),
]
Folder = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for JSON and contact sheets.")]


def check(lines: list[str] | None, output: Path | None, sources: str) -> None:
    """
    Refuse what would fail after the work.

    Raises:
        UsageProblem: for a line that is not measured (with such sources), and a folder that cannot be written.
    """
    try:
        import_module("..shapes.evaluate", __package__).checked_lines(lines, sources)
    except ValueError as error:
        raise UsageProblem(f"`--line`: {error}") from error
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=output):
                pass
        except OSError as error:
            raise UsageProblem(f"`--output {output}`: is no folder that takes files ({error.strerror}).") from error


def evaluate(
    pipe: "OmniVideoPipeline",
    count: int,
    seed: int,
    batch_size: int,
    steps: int | None,
    lines: list[str] | None,
    output: Path | None,
    sources: str,
) -> None:
    """Print the table of a checkpoint, and write JSON and pictures (see `shapes.evaluate.Evaluation`)."""
    module = import_module("..shapes.evaluate", __package__)
    pipe.set_progress_bar_config(disable=True)
    evaluation = module.Evaluation(pipe, count, seed, batch_size, steps, sources)
    report = evaluation.run(lines)
    Console().print(report.table())
    if output is not None:
        module.save_evaluation(report, evaluation.shown, output)


__all__ = ["BatchSize", "Count", "Folder", "Lines", "Seed", "Sources", "SourcesOption", "check", "evaluate"]
