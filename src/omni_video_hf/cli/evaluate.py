"""What `omni-video eval shapes` takes and does; light until it runs."""

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
Folder = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for JSON and contact sheets.")]


def check(lines: list[str] | None, output: Path | None) -> None:
    """
    Refuse what would fail after the work.

    Raises:
        UsageProblem: for a line that the table does not have, and a folder that cannot be written.
    """
    known = import_module("..shapes.evaluate", __package__).LINES
    unknown = sorted(set(lines or ()) - set(known))
    if unknown:
        raise UsageProblem(f"`--line`: `lines` must be among {', '.join(known)}, got {', '.join(unknown)}.")
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
) -> None:
    """Print the table of a checkpoint, and write JSON and pictures (see `shapes.evaluate.Evaluation`)."""
    module = import_module("..shapes.evaluate", __package__)
    pipe.set_progress_bar_config(disable=True)
    evaluation = module.Evaluation(pipe, count, seed, batch_size, steps)
    report = evaluation.run(lines) if lines else evaluation.run()
    Console().print(report.table())
    if output is not None:
        module.save_evaluation(report, evaluation.shown, output)


__all__ = ["BatchSize", "Count", "Folder", "Lines", "Seed", "check", "evaluate"]
