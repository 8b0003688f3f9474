"""One Markdown and one JSON file of what was measured, rewritten whole after every benchmark."""

import json
import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import omni_video_hf
from omni_video_hf.utils.files import write_text

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], object]]  # title -> what stands in a row


def machine() -> dict[str, Any]:
    """What numbers depend on: processor, accelerator, threads and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "omni_video_hf": omni_video_hf.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def markdown_table(rows: list[Row], columns: Columns) -> str:
    """Rows as a Markdown table; all columns but the first hold numbers."""
    lines = [
        "| " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
        *("| " + " | ".join(str(value(row)) for value in columns.values()) + " |" for row in rows),
    ]
    return "\n".join(lines)


class Results:
    """
    Rows of benchmarks in `benchmarks.json`, and as tables in `benchmarks.md`.

    Args:
        folder: made if need be; results already in it are kept.

    Raises:
        ValueError: when the JSON file in it is not one of these.
    """

    def __init__(self, folder: Path) -> None:
        self.json_file, self.markdown_file = folder / "benchmarks.json", folder / "benchmarks.md"
        self.entries: dict[str, dict[str, Any]] = {}
        if self.json_file.is_file():
            try:
                self.entries = json.loads(self.json_file.read_text(encoding="utf-8"))
                _ = [(entry["machine"], entry["rows"]) for entry in self.entries.values()]
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.json_file}: holds no benchmarks' results ({error!r}). Remove it or choose another folder."
                ) from error

    def has(self, name: str) -> bool:
        """Whether a benchmark was run on this machine with these versions."""
        return name in self.entries and self.entries[name]["machine"] == machine()

    def add(self, name: str, rows: list[Row], seconds: float) -> None:
        """Take in the rows of a benchmark, in the place of earlier ones."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.entries[name] = {"date": date, "seconds": round(seconds, 1), "machine": machine(), "rows": rows}

    def write(self, tables: Mapping[str, tuple[str, Columns]]) -> None:
        """Write both files; `tables` gives every benchmark's title and columns, in their order."""
        sections = []
        for name, (title, columns) in tables.items():
            if name in self.entries:
                entry = self.entries[name]
                setup = ", ".join(f"{key} {value}" for key, value in entry["machine"].items() if value is not None)
                table = markdown_table(entry["rows"], columns)
                sections.append(f"## {title}\n\n{table}\n\n{entry['date']}, {entry['seconds']} s; {setup}\n")
        self.json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.json_file, json.dumps(self.entries, indent=2) + "\n")
        write_text(self.markdown_file, "\n".join(sections))
