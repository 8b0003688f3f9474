"""Checks the settings in a LoRA file before peft sees them: it runs some as regular expressions and imports others."""

from collections.abc import Iterator, Mapping
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from re import error as pattern_error
from typing import Any

from ...utils.read_budget import current_budget, how_to_raise

NAME_LENGTH = 64  # characters of a layer's name that one `.*` can end at
# Settings that peft takes as regular expressions; of `rank_pattern` and `alpha_pattern` the keys are.
PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
LITERAL_LISTS = ("target_modules", "exclude_modules")  # one pattern for the whole name, or a list of plain names
IMPORTS = ("megatron_config", "megatron_core", "auto_mapping")  # name code that would be imported
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")  # the others change the base model's weights
_SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT, codes.CATEGORY)
_REPEATS = tuple(
    getattr(codes, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if hasattr(codes, name)
)


def check_lora_metadata(metadata: Any, source: str) -> None:
    """
    Refuse settings of a LoRA file that would run for ever, import code or change the base model's weights.

    Args:
        metadata: `LoraConfig` arguments by component, such as `{"transformer.r": 8}`, or `None`.
        source: the file, for the error.

    Raises:
        ValueError: for such a setting, with its name and value.
    """
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{source}: its LoRA settings must be a table, got a {type(metadata).__name__}.")
    budget, cost = current_budget().max_steps, 0
    for key, value in metadata.items():
        name = str(key).rpartition(".")[2]
        if name in IMPORTS and value is not None:
            raise ValueError(f"{source}: the LoRA setting {key!r} names code to import; remove it from the metadata.")
        if name == "init_lora_weights" and not any(value is one or value == one for one in INITIALISATIONS):
            raise ValueError(
                f"{source}: the LoRA setting {key!r} is {str(value)[:40]!r}, which changes the base model; only "
                "initialisations without effect on trained layers are read: set it to true."
            )
        if name not in PATTERNS:
            continue
        for pattern in _patterns(name, value):
            try:
                # All but the patterns of whole names are tried behind every dot of a name.
                cost += (1 if name in LITERAL_LISTS else NAME_LENGTH) * _cost(parser.parse(pattern))
            except (pattern_error, RecursionError, OverflowError, ValueError) as error:
                raise ValueError(
                    f"{source}: the LoRA setting {key!r} has the pattern {pattern[:80]!r}: {error}."
                ) from None
            if cost > budget:
                raise ValueError(
                    f"{source}: the patterns of the LoRA setting {key!r}, such as {pattern[:80]!r}, may take more "
                    f"than {budget:,} steps for one layer. Write the layers' names out. {how_to_raise('max_steps')}"
                )


def _patterns(name: str, value: Any) -> Iterator[str]:
    """The regular expressions in a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, Mapping)) and name not in LITERAL_LISTS:
        yield from map(str, value)


def _cost(pattern: Any) -> int:
    """
    Upper bound of the ways in which a pattern can match one name.

    Raises:
        ValueError: for what has no such bound: a repeated group, a reference.
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
            raise ValueError(f"uses {str(code).lower()}; only names, '.', '*', classes and alternatives are read")
        cost = min(cost, 2**62)
    return cost


__all__ = ["check_lora_metadata"]
