"""What `omni-video eval shapes` takes and does; light until it runs."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..pipeline_omni_video import OmniVideoPipeline

Count = Annotated[int, typer.Option(min=1, help="Examples of each line and split.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of examples and noise.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples drawn at once.")]
Lines = Annotated[list[str] | None, typer.Option("--line", help="Only this line of the table; may come often.")]
Folder = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for JSON and contact sheets.")]


def evaluate(
    pipe: "OmniVideoPipeline",
    count: int,
    seed: int,
    batch_size: int,
    steps: int | None,
    lines: list[str] | None,
    output: Path | None,
) -> None:
    """Print the table of a checkpoint, and write JSON and pictures (see `evaluate.Evaluation`)."""
    module = import_module(".evaluate", __package__)
    pipe.set_progress_bar_config(disable=True)
    evaluation = module.Evaluation(pipe, count, seed, batch_size, steps)
    report = evaluation.run(lines) if lines else evaluation.run()
    Console().print(report.table())
    if output is not None:
        module.save_evaluation(report, evaluation.shown, output)


__all__ = ["BatchSize", "Count", "Folder", "Lines", "Seed", "evaluate"]
