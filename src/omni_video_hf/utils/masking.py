"""Masking of Hub access tokens in printed, logged and written text."""

import logging
from typing import Any, TextIO

from .tokens import TOKEN_MASK as MASK
from .tokens import clean_token, mask_tokens


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
