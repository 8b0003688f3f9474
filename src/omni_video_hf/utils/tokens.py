"""Access tokens of the Hub: cleaned where they come in, and kept out of what is said about a call."""

import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from inspect import signature
from json import decoder
from pathlib import Path
from typing import Any

TOKEN_MASK = "hf_***"  # what stands in the place of a token
_TOKEN_PATTERN = re.compile(r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{16,}|hf_(?:oauth|jwt)_[\w.-]{16,})")
_WHOLE_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[\w.-]{16,}")
_LONGEST_NAME = 255  # characters of a file
_SHORTEST_SECRET = 8  # characters; a shorter text is part of ordinary words


def mask_tokens(text: str) -> str:
    """`text` with every access token (`hf_...`, `api_org_...`) replaced by `hf_***`."""
    return _TOKEN_PATTERN.sub(TOKEN_MASK, text)


def clean_token(token: str | bool | None, name: str = "`--token` (or HF_TOKEN)") -> str | bool | None:
    """
    A token without the white space around it, such as the line end of the file that it was read from.

    Args:
        token: a text; `True`, `False` and `None` are what huggingface_hub takes them for, and stay.
        name: what the message of an error calls it.

    Raises:
        ValueError: for a token with white space or other characters that no HTTP header takes. It is not repeated.
    """
    if token is None or isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise ValueError(f"{name} must be a text, True, False or None, got {type(token).__name__}.")
    token = token.strip()
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(
            f"{name} must be one word of letters and digits, `hf_...`; the given one has spaces, line "
            "ends or other characters in it. Copy it again from huggingface.co/settings/tokens."
        )
    return token or None


def hub_call(function: Callable) -> Callable:
    """
    Decorate a function that asks the Hub: its argument `token` is cleaned, and no error that it raises shows a token.

    A token in the place of another argument is refused before anything is sent: as the name of a repository it would
    be published, or stand in logs of servers.
    """
    names = [name for name, one in signature(function).parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {names[i] if i < len(names) else f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs
        secret = given.get("token")
        try:
            check_no_tokens(given)
            if "token" in kwargs:
                kwargs["token"] = clean_token(secret, "`token`")
            elif "token" in given:
                index = names.index("token")
                args = (*args[:index], clean_token(secret, "`token`"), *args[index + 1 :])
            return function(*args, **kwargs)
        except BaseException as error:
            unreadable = _unreadable(error)
            if unreadable is not None:
                place = next((value for value in given.values() if isinstance(value, (str, os.PathLike))), "")
                raise ValueError(mask_tokens(f"{place}: {unreadable}")) from None
            masked = _mask_error(error, secret if isinstance(secret, str) else "")
            if masked is not None:
                raise masked from None
            raise

    marked: Any = call
    marked.is_hub_call = True
    return marked


def _unreadable(error: BaseException) -> str | None:
    """What to say of errors of the libraries that name neither file nor reason, `None` for all others."""
    frames = traceback.extract_tb(error.__traceback__)
    if any("tokeniz" in Path(frame.filename).name for frame in frames[-3:]):
        is_of_rust = type(error) is Exception or type(error).__name__ == "PanicException"
        if is_of_rust or isinstance(error, (KeyError, TypeError, AttributeError, IndexError)):
            return f"its tokenizer cannot be read ({type(error).__name__}: {error}). Download it again."
    if isinstance(error, RecursionError) and frames[-1].filename == decoder.__file__:
        return "a JSON file of it is nested too deeply to be read. Download it again, from somebody you trust."
    return None


def check_no_tokens(given: Mapping[str, Any]) -> None:
    """
    Refuse a token in the place of another argument.

    Raises:
        ValueError: names the argument, and not its value.
    """
    for name, value in given.items():
        if name == "token" or not isinstance(value, (str, os.PathLike)):
            continue
        text = str(value).strip()
        if _WHOLE_TOKEN.fullmatch(text) and not (len(text) < _LONGEST_NAME and Path(text).exists()):
            raise ValueError(
                f"`{name}` is an access token ({TOKEN_MASK}). A token goes into `token`; are the arguments in another "
                "order than they should be?"
            )


def _mask_error(error: BaseException, secret: str) -> Exception | None:
    """
    Mask tokens in an error and in those that it came from.

    Args:
        error: is changed.
        secret: the token of the call, whatever it looks like.

    Returns:
        `None`, or an error to raise in its place, when it composes its text of what cannot be changed.
    """
    secret = secret.strip()

    def mask(text: str) -> str:
        return mask_tokens(text.replace(secret, TOKEN_MASK) if len(secret) >= _SHORTEST_SECRET else text)

    for found in _chain(error):
        found.args = tuple(_mask_value(value, mask) for value in found.args)
        # Attributes that messages are made of: those of OSError have no entry in `__dict__`.
        for name in ("filename", "filename2", "strerror", "msg", "doc", "reason", "name", "path", *vars(found)):
            value = getattr(found, name, None)
            if isinstance(value, (str, list)) and (masked := _mask_value(value, mask)) != value:
                with suppress(AttributeError, TypeError):  # one that cannot be changed
                    setattr(found, name, masked)
    if all(mask(str(found)) == str(found) for found in _chain(error)):
        return None
    return ValueError(f"{type(error).__name__}: {mask(str(error))}")


def _mask_value(value: Any, mask: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):  # notes
        return [mask(entry) for entry in value]
    text = str(value)
    return value if mask(text) == text else mask(text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, what was being handled when it was raised, and the members of a group."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        found = todo.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            todo += [found.__cause__, found.__context__, *getattr(found, "exceptions", ())]
            yield found


__all__ = ["TOKEN_MASK", "check_no_tokens", "clean_token", "hub_call", "mask_tokens"]
