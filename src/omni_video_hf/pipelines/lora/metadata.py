"""Limits for the regular expressions in a LoRA file, which are the keys of `rank_pattern` and `alpha_pattern`."""

from collections.abc import Mapping
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from re import error as pattern_error
from typing import Any

from ...utils.read_budget import current_budget, how_to_raise

NAME_LENGTH = 64  # assumed length of a layer's name: one `.*` can end at each character
PATTERNS = ("rank_pattern", "alpha_pattern")
_SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT, codes.CATEGORY)
_REPEATS = tuple(
    getattr(codes, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if hasattr(codes, name)
)


def check_lora_metadata(metadata: Any, source: str) -> None:
    """
    Refuse patterns in the settings of a LoRA file whose matching could be endless.

    Args:
        metadata: `LoraConfig` arguments by component, such as `{"transformer.r": 8}`, or `None`.
        source: name of the file for messages.

    Raises:
        ValueError: for such a setting, with its name and value.
    """
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{source}: its LoRA settings must be a JSON object, got a {type(metadata).__name__}.")
    budget, cost = current_budget().max_steps, 0
    for key, value in metadata.items():
        name = str(key).rpartition(".")[2]
        if name not in PATTERNS:
            continue
        for pattern in map(str, value if isinstance(value, Mapping) else ()):
            try:
                cost += NAME_LENGTH * _cost(parser.parse(pattern))  # tried after every dot of a name
            except (pattern_error, RecursionError, OverflowError, ValueError) as error:
                raise ValueError(
                    f"{source}: the LoRA setting {key!r} has the pattern {pattern[:80]!r}: {error}."
                ) from None
            if cost > budget:
                raise ValueError(
                    f"{source}: the patterns of the LoRA setting {key!r}, such as {pattern[:80]!r}, may take more "
                    f"than {budget:,} steps for one layer. Write the names of the layers. {how_to_raise('max_steps')}"
                )


def _cost(pattern: Any) -> int:
    """
    Upper bound of the ways in which a pattern can match one name.

    Raises:
        ValueError: for a pattern without such a bound, with a repeated group or a reference.
    """
    cost = 1
    for code, argument in pattern:
        if code in _REPEATS:
            low, high, inner = argument
            single = len(inner) == 1 and inner[0][0] in _SINGLE
            if not single and high != 1:
                raise ValueError("repeats a group; only single characters may be repeated")
            cost *= min(int(high) - int(low) + 1, NAME_LENGTH) if single else 1 + _cost(inner)
        elif code is codes.SUBPATTERN:
            cost *= _cost(argument[-1])
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            cost *= 1 + _cost(argument[1])
        elif code is codes.BRANCH:
            cost *= sum(_cost(branch) for branch in argument[1])
        elif code not in _SINGLE:
            raise ValueError(f"uses {str(code).lower()}; only names, '.', '*', classes and alternatives are allowed")
        cost = min(cost, 2**62)
    return cost


__all__ = ["check_lora_metadata"]
