"""
Limits for chat templates, which are programs that a repository contains.

transformers runs them in the sandbox of Jinja, which protects files and code, but does not stop endless loops or texts
that grow without end. Some faults are found when a template is read; everything else is counted while it runs.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from ..utils.read_budget import ReadBudget, current_budget, how_to_raise

TEMPLATE_FILE = "<template>"  # file name that Jinja gives to a template from a string
TEXT_SHARE = 64  # a text or list in a template may take `max_bytes / TEXT_SHARE`


class _Generation(Extension):
    """The `generation` block of transformers, which marks messages of the assistant."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def check_chat_template(template: Any) -> None:
    """
    Refuse a chat template that computes giant numbers or texts, before Jinja compiles it and computes constants.

    Args:
        template: source of a template, or a dict of sources by name.

    Raises:
        ValueError: for such a template; the message names the line.
    """
    sources = template.values() if isinstance(template, dict) else [template]
    limit = current_budget().max_steps
    for source in sources:
        try:
            tree = Environment(extensions=[_Generation, loopcontrols]).parse(source)  # noqa: S701 - only read
        except (TemplateSyntaxError, RecursionError) as error:
            raise ValueError(f"`chat_template` is not a valid Jinja template ({error}).") from None
        for node in tree.find_all((nodes.Pow, nodes.Mul, nodes.Const)):
            if isinstance(node, nodes.Pow):
                raise ValueError(f"`chat_template`, line {node.lineno}: `**` is not allowed; write the number.")
            product = 1
            for constant in [node] if isinstance(node, nodes.Const) else node.find_all(nodes.Const):
                product *= max(1, abs(constant.value)) if isinstance(constant.value, int) else 1
            if product > limit:
                raise ValueError(
                    f"`chat_template`, line {node.lineno}: its numbers multiply to {product:,}, more than {limit:,}. "
                    f"{how_to_raise('max_steps')}"
                )


@contextmanager
def bounded_rendering() -> Iterator[None]:
    """
    Limit the chat templates that are rendered in the block.

    Raises:
        ValueError: if a template runs more lines, takes more seconds or creates more text than the read budget allows.
    """
    count = _Count(current_budget())
    before = sys.gettrace()
    sys.settrace(count.enter)
    try:
        yield
    finally:
        sys.settrace(before)


class _Count:
    """A trace function that counts lines in the frames of templates."""

    def __init__(self, budget: ReadBudget) -> None:
        self.budget, self.lines, self.start = budget, 0, time.monotonic()

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG002
        return self.line if frame.f_code.co_filename == TEMPLATE_FILE else None

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG002
        self.lines += 1
        if self.lines > self.budget.max_steps:
            raise ValueError(
                f"The chat template runs more than {self.budget.max_steps:,} lines. {how_to_raise('max_steps')}"
            )
        if time.monotonic() - self.start > self.budget.max_seconds:
            raise ValueError(
                f"The chat template takes longer than {self.budget.max_seconds:g} seconds. "
                f"{how_to_raise('max_seconds')}"
            )
        most = self.budget.max_bytes // TEXT_SHARE
        if any(_size(value) > most for value in frame.f_locals.values()):
            raise ValueError(
                f"The chat template creates a text of more than {most:,} bytes. {how_to_raise('max_bytes')}"
            )
        return self.line


def _size(value: Any) -> int:
    """Bytes of a text, or of the largest text in a namespace; containers count by their number of entries."""
    if isinstance(value, (str, list, tuple, dict)):
        return len(value) * (1 if isinstance(value, str) else 8)
    attributes = getattr(value, "_Namespace__attrs", None)
    return max(map(_size, attributes.values()), default=0) if isinstance(attributes, dict) else 0


__all__ = ["bounded_rendering", "check_chat_template"]
