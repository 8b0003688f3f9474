"""Check of names that users write: unknown names are refused with the nearest known one."""

from collections.abc import Iterable
from difflib import get_close_matches


def is_repository_name(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub, `owner/name`, and is no path in another way."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def check_known(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """
    Refuse unknown names.

    Args:
        where: argument or file that the error names.
        given: names to check.
        known: allowed names.

    Raises:
        ValueError: for unknown names; the message lists each with its nearest known name.
    """
    known = list(known)
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    words = []
    for name in unknown:
        near = get_close_matches(str(name), known, n=1, cutoff=0.5)
        words.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    some = f" Known: {', '.join(sorted(known))}." if len(known) <= 12 else ""
    raise ValueError(f"`{where}`: unknown {', '.join(words)}.{some}")
