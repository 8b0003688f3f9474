"""
Thread safety of pipeline calls: locks on shared components (`turn`), and a random generator per call.

A call changes its components while it runs: it replaces attention processors and step caches of the decoder, the VAE
stores features of earlier frames, tokenizers store their padding, offloading moves weights. Calls in several threads
that share a component therefore run one after the other, in the order of their start, even in different pipelines.
The locks are not stored in the components, which can still be saved, copied and pickled.
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
_WAITING: list[tuple[int, frozenset[int]]] = []  # waiting threads and their components, in order of arrival


def _forget() -> None:
    """Reset the locks in a forked process, which has one thread and none of the calls of its parent."""
    global _CONDITION  # noqa: PLW0603 - a condition that another thread held can never be acquired
    _CONDITION = threading.Condition()
    _OWNERS.clear()
    _WAITING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def turn(*components: Any, alone: Sequence[Any] = ()) -> Iterator[None]:
    """
    Lock components for this thread during the block.

    All components are locked at once, when they are free and no earlier thread waits for one of them. The pipeline
    locks its components in every call and every public step. To run a component directly while calls run in other
    threads, lock it too: `with turn(pipe.transformer): pipe.transformer(...)`.

    Args:
        components: models, processors and tokenizers; `None` is ignored. This thread may already hold their locks, as
            in a step within a call or a preview within a callback.
        alone: components whose locks this thread must not hold yet.

    Raises:
        RuntimeError: if this thread already holds a component of `alone`, or if two threads would wait for each other.
    """
    thread = threading.get_ident()
    parts = {id(part): part for part in map(_shared_part, (*components, *alone)) if part is not None}
    with _CONDITION:
        for part in alone:
            if _OWNERS.get(id(_shared_part(part))) == thread:
                raise RuntimeError(
                    f"A call on this {type(part).__name__} is still running in this thread, and a callback started "
                    "another call: start it after the first call, or use a pipeline with components of its own."
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
    """Whether this thread holds the lock of a component, see [`turn`]."""
    return _OWNERS.get(id(_shared_part(component))) == threading.get_ident()


def in_turn(*names: str) -> Callable[[Callable], Callable]:
    """
    Decorate a method of a pipeline: it runs without gradients and holds the locks of the named components.

    Args:
        names: names of components, which are attributes of the pipeline.
    """

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), turn(*(getattr(self, name) for name in names)):
                return method(self, *args, **kwargs)

        return run

    return decorate


def _wait_for(thread: int, wanted: frozenset[int]) -> None:
    """Wait until components are free. A thread that holds other locks goes first: others may wait for these locks."""
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
                    "Two calls in two threads would wait for each other without end: the callback of each started a "
                    "call on the components of the other. Start these calls after the first ones."
                )
            _CONDITION.wait()
    finally:
        _WAITING.remove(request)
        _CONDITION.notify_all()


def _waits_for(wanted: frozenset[int], thread: int) -> bool:
    """Whether `thread` holds one of the components, or one for which the holders of these components wait."""
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
    """The object that stands for a component: several objects with the same weights share one lock."""
    if isinstance(component, ProcessorMixin):
        return component.tokenizer  # it has all of the processor's state
    if not isinstance(component, torch.nn.Module):
        return component
    component = getattr(component, "_orig_mod", component)  # a compiled module wraps the original one
    inner = component._modules.get("mllm")  # the whole model and the pipeline's MLLM component share this module
    return component if inner is None else inner


class OwnRandomNumbers(TorchFunctionMode):
    """
    Sample tokens from a generator of this call instead of the global one, which all threads share.

    Args:
        seed: seed of the generator; the samples equal those after `torch.manual_seed(seed)`.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function; `torch.multinomial` gets the generator."""
        kwargs = dict(kwargs or {})
        if function in (torch.multinomial, torch.Tensor.multinomial) and kwargs.get("generator") is None:
            device = (args[0] if args else kwargs["input"]).device
            if device not in self.generators:
                self.generators[device] = torch.Generator(device).manual_seed(self.seed)
            kwargs["generator"] = self.generators[device]
        return function(*args, **kwargs)


__all__ = ["OwnRandomNumbers", "has_turn", "in_turn", "turn"]
