"""The command `eval shapes`: its flags, checks and output. The evaluation is imported when it runs."""

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

Count = Annotated[int, typer.Option(min=1, help="Number of examples for each line and split of the table.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the examples and of the noise.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of examples generated at once.")]
Lines = Annotated[list[str] | None, typer.Option("--line", help="Measure only this line of the table. Repeatable.")]


class Sources(StrEnum):
    """Renderer of the sources of edits."""

    renderer = "renderer"
    other_renderer = "other-renderer"


SourcesOption = Annotated[
    Sources,
    typer.Option(help="Renderer of the sources of edits: that of the training data, or another one."),
]
Folder = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the JSON file and the images.")]


def check(lines: list[str] | None, output: Path | None, sources: str) -> None:
    """
    Check the arguments before the evaluation.

    Raises:
        UsageProblem: for a line that is not measured (with such sources), and for a folder that cannot be written to.
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
            raise UsageProblem(
                f"`--output {output}`: no file can be written to this folder ({error.strerror}). Choose another."
            ) from error


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
    """Print the table of a checkpoint, and write JSON and images (see `shapes.evaluate.Evaluation`)."""
    module = import_module("..shapes.evaluate", __package__)
    pipe.set_progress_bar_config(disable=True)
    evaluation = module.Evaluation(pipe, count, seed, batch_size, steps, sources)
    report = evaluation.run(lines)
    Console().print(report.table())
    if output is not None:
        module.save_evaluation(report, evaluation.shown, output)


__all__ = ["BatchSize", "Count", "Folder", "Lines", "Seed", "Sources", "SourcesOption", "check", "evaluate"]
