"""Samples that cannot be used: an error that lists all of them, or a warning that counts the skipped ones."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from ...utils.names import check_known

logger = logging.getLogger(__name__)

ON_BAD_DATA = ("stop", "skip")
SHOWN = 50  # maximum number of listed samples


@dataclass(frozen=True)
class Offender:
    """
    A sample that cannot be used.

    Args:
        sample: the sample for messages: a file, or a row of a table.
        problem: one line that says what is wrong and what to do.
    """

    sample: str
    problem: str


class BadDataError(ValueError):
    """
    Some samples cannot be used; `offenders` has all of them, the message lists the first 50.

    Args:
        offenders: all samples that cannot be used.
        total: number of samples that were checked.
    """

    def __init__(self, offenders: Sequence[Offender], total: int) -> None:
        self.offenders, self.total = list(offenders), total
        lines = [f"{entry.sample}: {entry.problem}" for entry in self.offenders[:SHOWN]]
        if len(self.offenders) > SHOWN:
            lines.append(f"and {len(self.offenders) - SHOWN} more")
        super().__init__(
            f"{count_problems(self.offenders, total)}. Repair or remove them, or pass "
            f"`on_bad_data='skip'` to leave them out.\n" + "\n".join(lines)
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.offenders, self.total)


def stop_or_count(offenders: Sequence[Offender], total: int, on_bad_data: str) -> set[str]:
    """
    Stop because of bad samples, or warn and return them, depending on `on_bad_data`.

    Args:
        offenders: samples that cannot be used.
        total: number of samples that were checked.
        on_bad_data: `"stop"`, or `"skip"` to leave them out with a warning that counts them.

    Returns:
        The names of the samples to leave out.

    Raises:
        BadDataError: for `"stop"`, or if no sample would remain.
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
    """A phrase with the number of problems and of samples."""
    problems = f"{len(offenders)} problem{'' if len(offenders) == 1 else 's'}"
    return f"{problems} in {total} sample{'' if total == 1 else 's'}"


def offenders_table(offenders: Sequence[Offender], total: int) -> Table:
    """A table of the first 50 samples that cannot be used, with their total number, for the terminal."""
    table = Table(title=count_problems(offenders, total), title_justify="left", show_lines=False)
    table.add_column("sample", overflow="fold")
    table.add_column("problem", overflow="fold")
    for entry in offenders[:SHOWN]:
        table.add_row(escape(entry.sample), escape(entry.problem))
    if len(offenders) > SHOWN:
        table.add_row("...", f"and {len(offenders) - SHOWN} more")
    return table


__all__ = ["ON_BAD_DATA", "BadDataError", "Offender", "count_problems", "offenders_table", "stop_or_count"]
