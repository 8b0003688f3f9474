"""Samples that cannot be used: all of them listed at once, or skipped and counted where the user asked for that."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from ...utils.names import check_known

logger = logging.getLogger(__name__)

ON_BAD_DATA = ("stop", "skip")
SHOWN = 50  # of a list that may be as long as the data


@dataclass(frozen=True)
class Offender:
    """
    A sample that cannot be used.

    Args:
        sample: where it is, in the user's words: a file, or a row of a table.
        problem: what is wrong and what to do, one line.
    """

    sample: str
    problem: str


class BadDataError(ValueError):
    """
    Some samples cannot be used; `offenders` has all of them, the message the first 50.

    Args:
        offenders: all there are.
        total: number of samples that were looked at.
    """

    def __init__(self, offenders: Sequence[Offender], total: int) -> None:
        self.offenders, self.total = list(offenders), total
        lines = [f"{entry.sample}: {entry.problem}" for entry in self.offenders[:SHOWN]]
        if len(self.offenders) > SHOWN:
            lines.append(f"and {len(self.offenders) - SHOWN} more")
        super().__init__(
            f"{count_problems(self.offenders, total)}. Repair or remove them, or pass "
            f"`on_bad_data='skip'` to go on without.\n" + "\n".join(lines)
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.offenders, self.total)


def stop_or_count(offenders: Sequence[Offender], total: int, on_bad_data: str) -> set[str]:
    """
    Do with bad samples what the user asked for.

    Args:
        offenders: samples that cannot be used.
        total: number of samples that were looked at.
        on_bad_data: `"stop"`, or `"skip"` to leave them out with a warning that counts them.

    Returns:
        The names of the samples to leave out.

    Raises:
        BadDataError: with all of them, unless they are to be skipped, or when none would remain.
    """
    check_known("on_bad_data", [on_bad_data], ON_BAD_DATA)
    names = {offender.sample for offender in offenders}
    if offenders and (on_bad_data == "stop" or len(names) >= total):
        raise BadDataError(offenders, total)
    if offenders:
        listed = "; ".join(f"{entry.sample}: {entry.problem}" for entry in offenders[:3])
        logger.warning("Left out %d of %d samples that cannot be used, such as %s", len(names), total, listed)
    return names


def count_problems(offenders: Sequence[Offender], total: int) -> str:
    """How many problems there are in how many samples, in words."""
    problems = f"{len(offenders)} problem{'' if len(offenders) == 1 else 's'}"
    return f"{problems} in {total} sample{'' if total == 1 else 's'}"


def offenders_table(offenders: Sequence[Offender], total: int) -> Table:
    """The first 50 offenders for the terminal, and how many there are."""
    table = Table(title=count_problems(offenders, total), title_justify="left", show_lines=False)
    table.add_column("sample", overflow="fold")
    table.add_column("problem", overflow="fold")
    for entry in offenders[:SHOWN]:
        table.add_row(escape(entry.sample), escape(entry.problem))
    if len(offenders) > SHOWN:
        table.add_row("...", f"and {len(offenders) - SHOWN} more")
    return table


__all__ = ["ON_BAD_DATA", "BadDataError", "Offender", "count_problems", "offenders_table", "stop_or_count"]
