"""Tables of the memory that every profile needs, for `omni-video info --memory`."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ...hub.inspection import Header

if TYPE_CHECKING:
    from .profiles import MemoryProfile


def memory_table(headers: Mapping[str, Header], title: str) -> Table:
    """The memory that every profile needs, as a table for the terminal."""
    memory = import_module(".profiles", __package__)
    table = Table(title=escape(title), caption="GB; activations are the released model's for a video of 832x480x81")
    table.add_column("memory=")
    table.add_column("switches on")
    for column in (*memory.estimate_memory(headers, None).accelerator, "peak", "main memory"):
        table.add_column(column, justify="right")
    for profile in (None, *memory.profiles_for(headers).values()):
        estimate = memory.estimate_memory(headers, profile)
        needs = [f"{need / 1e9:.1f}" for need in estimate.accelerator.values()]
        peak, main = f"{estimate.peak / 1e9:.1f}", f"{estimate.main / 1e9:.1f}"
        table.add_row(profile.name if profile else "none", _switches(profile), *needs, peak, main)
    return table


def memory_rows(headers: Mapping[str, Header]) -> list[dict[str, Any]]:
    """The memory that every profile needs, as plain values in bytes."""
    memory, rows = import_module(".profiles", __package__), []
    for profile in (None, *memory.profiles_for(headers).values()):
        estimate = memory.estimate_memory(headers, profile)
        row = {"memory": profile.name if profile else None, "switches_on": _switches(profile), "peak": estimate.peak}
        rows.append(row | {"main": estimate.main, "accelerator": dict(estimate.accelerator)})
    return rows


def _switches(profile: "MemoryProfile | None") -> str:
    if profile is None:
        return "as stored, everything on the accelerator"
    parts = [f"{profile.offload} offload"]
    parts += [f"8-bit {name}" for name in profile.quantized]
    return ", ".join(parts + (["VAE tiling"] if profile.tile_vae else []))


__all__ = ["memory_rows", "memory_table"]
