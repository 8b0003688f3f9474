"""`python -m benchmarks`: all that fits the machine, as one Markdown and one JSON file."""

import time
from pathlib import Path
from typing import Annotated

import diffusers
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import activations, data, folding, loading, media, operations, sampling, training
from .results import Results

MODULES = (operations, folding, sampling, training, loading, data, activations, media)
BENCHMARKS = {module.__name__.rpartition(".")[2]: module for module in MODULES}
TABLES = {name: (module.TITLE, module.COLUMNS) for name, module in BENCHMARKS.items()}
console = Console(stderr=True)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Any of {', '.join(BENCHMARKS)}; those not yet run by default.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for benchmarks.md and benchmarks.json.")] = Path(
        "build/benchmarks"
    ),
    threads: Annotated[int, typer.Option(min=1, help="Threads of the processor to use.")] = 1,
) -> None:
    """
    Measure against the plain path in the same run.

    Results are written after every benchmark; what the folder has from this machine is not run again unless it is
    named.
    """
    unknown = [name for name in names or () if name not in BENCHMARKS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}.")
    torch.set_num_threads(threads)
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    try:
        results = Results(output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    wanted = names or [name for name in BENCHMARKS if not results.has(name)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in progress.track(wanted, description="benchmarks"):
            start = time.perf_counter()
            rows = BENCHMARKS[name].measure(progress)
            results.add(name, rows, time.perf_counter() - start)
            results.write(TABLES)
    results.write(TABLES)
    typer.echo(results.markdown_file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
