"""Type checks of the settings in a recipe, before anything is loaded."""

from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..diffusion.losses import OmniVideoLossConfig
from ..utils.names import check_known

# Settings that are mappings, and the types of their entries.
NESTED: dict[str, dict[str, Any]] = {
    "losses": get_type_hints(OmniVideoLossConfig),
    "lora": {
        "r": int,
        "lora_alpha": float,
        "lora_dropout": float,
        "use_rslora": bool,
        "init_lora_weights": bool | str,
        "target_modules": str | list[str],
        "parts": list[str],
    },
}


def check_setting(name: str, value: Any, kind: Any) -> None:
    """
    Refuse a value that does not have the type of its setting.

    Args:
        name: name of the setting.
        value: value from the YAML file.
        kind: type annotation of the setting.

    Raises:
        ValueError: for a wrong type; the message names setting, value and type, and the nearest allowed word, if any.
    """
    if name in NESTED and isinstance(value, Mapping):
        check_known(name, value, NESTED[name])
        for inner, entry in value.items():
            check_setting(f"{name}.{inner}", entry, NESTED[name][inner])
        return
    if name in NESTED and isinstance(value, str) and not value.startswith("{"):
        raise ValueError(f"`{name}` must be a mapping such as {{name: value}}, got {value!r}.")
    words = _allowed_words(kind)
    if words and isinstance(value, str):
        check_known(name, [value], words)
    elif not _fits(value, kind):
        raise ValueError(f"`{name}` must be {describe(kind)}, got {value!r}.")


def describe(kind: Any) -> str:
    """Description of a type for messages."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [entry for entry in get_args(kind) if entry is not NoneType]
        return " or ".join(dict.fromkeys(describe(entry) for entry in kinds))
    if get_origin(kind) is Literal:
        return " or ".join(repr(entry) for entry in get_args(kind))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
    words |= {list: "a list"}
    origin = get_origin(kind) or kind
    if origin is list and get_args(kind) and get_args(kind)[0] is not Any:
        return f"a list (each {describe(get_args(kind)[0])})"
    return words.get(origin, getattr(origin, "__name__", str(origin)))


def _allowed_words(kind: Any) -> list[str]:
    """The allowed words of a `Literal` or enumeration; empty for other types."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for entry in kinds:
        if isinstance(entry, type) and issubclass(entry, Enum):
            return [str(member.value) for member in entry]
        if get_origin(entry) is Literal and all(isinstance(word, str) for word in get_args(entry)):
            return list(get_args(entry))
    return []


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, entry) for entry in inner)
    if origin is Literal:
        return any(value == entry and type(value) is type(entry) for entry in inner)
    if origin is list:
        return isinstance(value, list) and (not inner or all(_fits(entry, inner[0]) for entry in value))
    if origin is dict:
        return isinstance(value, Mapping) and (not inner or all(_fits(entry, inner[1]) for entry in value.values()))
    if origin in (int, float):
        allowed = int if origin is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


__all__ = ["check_setting", "describe"]
