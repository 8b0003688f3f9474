"""Masking of Hub access tokens in printed, logged and written text."""

import logging
import re
from typing import Any, TextIO

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")
MASK = "hf_***"


def mask_tokens(text: str) -> str:
    """`text` with every access token (`hf_...`, `api_org_...`) replaced by `hf_***`."""
    return _TOKEN.sub(MASK, text)


def clean_token(token: str | None) -> str | None:
    """
    Strip white space around a token, such as the line end of the file that contained it.

    Raises:
        ValueError: for a token with white space or other characters that are not allowed in an HTTP header. The
            message does not contain the token.
    """
    if token is None:
        return None
    token = token.strip()
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(
            "`--token` (or HF_TOKEN) must be one word of letters and digits, `hf_...`; the given one has spaces, line "
            "ends or other characters in it. Copy it again from huggingface.co/settings/tokens."
        )
    return token or None


class MaskedStream:
    """A text stream that masks access tokens in everything written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` with tokens masked; return the length of `text`, as `write` of a stream does."""
        self._stream.write(mask_tokens(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class MaskingFilter(logging.Filter):
    """A filter for logging handlers that masks access tokens in the message and its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Mask the record; it is always logged."""
        record.msg, record.args = mask_tokens(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = mask_tokens(record.exc_text)
        return True


def mask_logging() -> None:
    """Add the filter to every handler of every existing logger."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if not any(isinstance(found, MaskingFilter) for found in handler.filters):
                handler.addFilter(MaskingFilter())


__all__ = ["MASK", "MaskedStream", "MaskingFilter", "clean_token", "mask_logging", "mask_tokens"]
