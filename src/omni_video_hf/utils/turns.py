"""
What keeps calls of different threads apart: turns on the components they share, and random numbers of their own.

A call changes its components while it runs: the decoder gets other attention processors and step caches, the VAE keeps
features of earlier frames, tokenizers keep their padding, offloading moves weights. Calls that share a component
therefore take turns, in the order in which they came, whichever pipelines they belong to. Nothing of this lies in the
components: they are saved, copied and pickled as before.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import ProcessorMixin

_CONDITION = threading.Condition()
_OWNERS: dict[int, int] = {}  # id of a component in use -> thread that uses it
_WAITING: list[tuple[int, frozenset[int]]] = []  # thread and components, in the order in which they came


def _forget() -> None:
    """A forked process has one thread, and no call of the parent's other threads runs in it."""
    global _CONDITION  # noqa: PLW0603 - a condition that another thread held can never be acquired
    _CONDITION = threading.Condition()
    _OWNERS.clear()
    _WAITING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def turn(*components: Any, alone: Sequence[Any] = ()) -> Iterator[None]:
    """
    Use components while no other thread does.

    All of them are taken at once, when they are free and nobody who came earlier waits for one of them. The pipeline
    does so for every call and every public step. Whoever runs a component directly while calls run in other threads
    does the same: `with turn(pipe.transformer): pipe.transformer(...)`.

    Args:
        components: models, processors and tokenizers; `None` is left out. The ones that this thread has already may
            come again: a step within a call, a preview within a callback.
        alone: those which must not come again in this thread.

    Raises:
        RuntimeError: when this thread has a component of `alone` already, or waits for a thread that waits for it.
    """
    thread = threading.get_ident()
    parts = {id(part): part for part in map(_shared_part, (*components, *alone)) if part is not None}
    with _CONDITION:
        for part in alone:
            if _OWNERS.get(id(_shared_part(part))) == thread:
                raise RuntimeError(
                    f"A call on this {type(part).__name__} is still running in this thread, and a callback began "
                    "another one: make the call after the first one, or use a pipeline over components of its own."
                )
        taken = frozenset(part for part in parts if _OWNERS.get(part) != thread)
        _wait_for(thread, taken)
        _OWNERS.update(dict.fromkeys(taken, thread))
    try:
        yield
    finally:
        with _CONDITION:
            for part in taken:
                _OWNERS.pop(part, None)
            _CONDITION.notify_all()


def has_turn(component: Any) -> bool:
    """Whether this thread uses a component at the moment, see [`turn`]."""
    return _OWNERS.get(id(_shared_part(component))) == threading.get_ident()


def in_turn(*names: str) -> Callable[[Callable], Callable]:
    """
    Run a method of a pipeline without gradients, and while no other thread uses its components of these names.

    Args:
        names: attributes of the pipeline.
    """

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), turn(*(getattr(self, name) for name in names)):
                return method(self, *args, **kwargs)

        return run

    return decorate


def _wait_for(thread: int, wanted: frozenset[int]) -> None:
    """Wait until components are free; a thread that holds others goes first, for those behind it may need them."""
    request = (thread, wanted)
    holds = thread in _OWNERS.values()
    _WAITING.append(request)
    try:
        while True:
            earlier = () if holds else _WAITING[: _WAITING.index(request)]
            if not wanted & _OWNERS.keys() and not any(wanted & others for _, others in earlier):
                return
            if _waits_for(wanted, thread):
                raise RuntimeError(
                    "Two calls in two threads began calls on each other's components in their callbacks, and would "
                    "wait for each other without end: make these calls after the first ones."
                )
            _CONDITION.wait()
    finally:
        _WAITING.remove(request)
        _CONDITION.notify_all()


def _waits_for(wanted: frozenset[int], thread: int) -> bool:
    """Whether a thread has one of the components, or what the threads that have them wait for."""
    requests = dict(_WAITING)
    seen: set[int] = set()
    ahead = {_OWNERS[part] for part in wanted if part in _OWNERS}
    while ahead:
        owner = ahead.pop()
        if owner == thread:
            return True
        seen.add(owner)
        ahead |= {_OWNERS[part] for part in requests.get(owner, ()) if part in _OWNERS} - seen
    return False


def _shared_part(component: Any) -> Any:
    """What several objects over the same weights have in common, so that they share their turn."""
    if isinstance(component, ProcessorMixin):
        return component.tokenizer  # which has all of its state
    if not isinstance(component, torch.nn.Module):
        return component
    component = getattr(component, "_orig_mod", component)  # of a compiled module
    inner = component._modules.get("mllm")  # the whole model and a pipeline's half of it share this part
    return component if inner is None else inner


class OwnRandomNumbers(TorchFunctionMode):
    """
    Sample tokens from a generator instead of from the one that all threads of the process share.

    Args:
        seed: the samples are those after `torch.manual_seed(seed)`.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As the function called; `torch.multinomial` gets the generator."""
        kwargs = dict(kwargs or {})
        if function in (torch.multinomial, torch.Tensor.multinomial) and kwargs.get("generator") is None:
            device = (args[0] if args else kwargs["input"]).device
            if device not in self.generators:
                self.generators[device] = torch.Generator(device).manual_seed(self.seed)
            kwargs["generator"] = self.generators[device]
        return function(*args, **kwargs)


__all__ = ["OwnRandomNumbers", "has_turn", "in_turn", "turn"]
