"""`python -m benchmarks`: count operations at full size and write a Markdown and a JSON table."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .operations import CASES, count_operations


def main(
    output: Annotated[Path, typer.Option(help="Folder for operations.md and operations.json.")] = Path(
        "build/benchmarks"
    ),
) -> None:
    """Count operations per denoising step at full size, on the meta device."""
    rows = {case.name: count_operations(case) for case in CASES}
    lines = [
        "| TFLOP per step, branch | context tokens | upstream: bridges | + decoder | ours: first | later | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        counts = " | ".join(f"{row[key] / 1e12:.2f}" for key in ("bridges", "decoder", "first", "later"))
        lines.append(f"| {name} | {row['context']} | {counts} | {row['ratio']:.3f} |")
    output.mkdir(parents=True, exist_ok=True)
    (output / "operations.md").write_text("\n".join(lines) + "\n")
    (output / "operations.json").write_text(json.dumps(rows, indent=2) + "\n")
    typer.echo("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
