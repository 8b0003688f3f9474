"""
Limits for chat templates, which are programs that a repository contains.

transformers runs them in the sandbox of Jinja, which protects files and code, but does not stop endless loops or texts
that grow without end. Some faults are found when a template is read; everything else is counted while it runs.
A filter or method that makes a large text does so in one step of C code: its arguments are checked before it begins.
"""

import inspect
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, filters, nodes, sandbox, utils
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from ..utils.read_budget import ReadBudget, current_budget, how_to_raise

TEMPLATE_FILE = "<template>"  # file name that Jinja gives to a template from a string
TEXT_SHARE = 64  # a text or list in a template may take `max_bytes / TEXT_SHARE`


_JINJA_FILES = {module.__file__ for module in (filters, sandbox, utils)}  # filters, methods, `lipsum`


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
            if isinstance(node, nodes.Mul) and not _is_small_product(node):
                raise ValueError(
                    f"`chat_template`, line {node.lineno}: multiplies values of which more than one is only known "
                    f"when it runs, or one by more than {TEXT_SHARE}: texts could grow without bounds. Write the "
                    "numbers out."
                )
            product = 1
            for constant in [node] if isinstance(node, nodes.Const) else node.find_all(nodes.Const):
                product *= max(1, abs(constant.value)) if isinstance(constant.value, int) else 1
            if product > limit:
                raise ValueError(
                    f"`chat_template`, line {node.lineno}: its numbers multiply to {product:,}, more than {limit:,}. "
                    f"{how_to_raise('max_steps')}"
                )


def _is_small_product(node: nodes.Mul) -> bool:
    """Whether a product has constant factors alone, or one other factor and a small number of times."""
    factors: list[nodes.Expr] = []
    todo: list[nodes.Expr] = [node]
    while todo:
        part = todo.pop()
        if isinstance(part, nodes.Mul):
            todo += [part.left, part.right]
        else:
            factors.append(part)
    unknown = [part for part in factors if not isinstance(part, nodes.Const)]
    known = [part.value for part in factors if isinstance(part, nodes.Const)]
    if any(isinstance(value, str) for value in known):  # by a number that only `loop` is known to keep small
        return all(isinstance(part, nodes.Getattr) and part.node == nodes.Name("loop", "load") for part in unknown)
    small = math.prod(abs(value) for value in known if isinstance(value, int)) <= TEXT_SHARE
    return not unknown or (len(unknown) == 1 and small)


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
        if frame.f_code.co_filename == TEMPLATE_FILE:
            return self.line
        if frame.f_code.co_filename in _JINJA_FILES:
            self.check_call(frame)
        return None

    def check_call(self, frame: FrameType) -> None:
        """Refuse a filter or method whose result may be as large as its arguments multiplied, and too large."""
        code, values = frame.f_code, frame.f_locals
        number = code.co_argcount + code.co_kwonlyargcount
        number += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        given = [values[name] for name in code.co_varnames[:number] if name in values]
        called = next((value for value in given if callable(value)), None)
        given.append(getattr(called, "__self__", None))  # the text whose method is called
        if "replace" in (code.co_name.removeprefix("do_"), getattr(called, "__name__", None)):
            given = [value for value in _flat(given) if not isinstance(value, int)]  # texts: whole, old, new
            cost = math.prod(max(1, _weight(value)) for value in given)
            cost //= min((max(1, _weight(value)) for value in given if isinstance(value, str)), default=1)
        else:
            cost = math.prod(max(1, _weight(value)) for value in _flat(given))
        most = self.budget.max_bytes // TEXT_SHARE
        if cost > most:
            name = getattr(called, "__name__", None) or code.co_name.removeprefix("do_")
            raise ValueError(
                f"The chat template calls `{name}` with values that may make a text of {cost:,} bytes, more than "
                f"{most:,}. {how_to_raise('max_bytes')}"
            )

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


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments one by one, those of `*args` and `**kwargs` too."""
    for value in values:
        if isinstance(value, tuple):
            yield from value
        elif isinstance(value, dict) and all(isinstance(key, str) for key in value) and len(value) < 8:
            yield from value.values()
        else:
            yield value


def _weight(value: Any) -> int:
    """How much an argument may multiply a result: a number by itself, a text by its length, a list by its texts."""
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, list):
        return max(len(value), sum(len(entry) for entry in value if isinstance(entry, str)))
    return len(value) if isinstance(value, (str, dict)) else 1


def _size(value: Any) -> int:
    """Bytes of a text, or of the largest text in a namespace; containers count by their number of entries."""
    if isinstance(value, (str, list, tuple, dict)):
        return len(value) * (1 if isinstance(value, str) else 8)
    attributes = getattr(value, "_Namespace__attrs", None)
    return max(map(_size, attributes.values()), default=0) if isinstance(attributes, dict) else 0


__all__ = ["bounded_rendering", "check_chat_template"]
