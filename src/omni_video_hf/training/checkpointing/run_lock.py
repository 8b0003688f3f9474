"""One training at a time in one `output_dir`: two would write each other's checkpoints and remove them."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from accelerate.utils import gather_object
from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

from ..arguments import OmniVideoTrainingArguments

LOCK_NAME = ".train.lock"
_held: dict[Path, int] = {}  # folder -> thread of this process that trains there


@contextmanager
def only_training(args: OmniVideoTrainingArguments) -> Iterator[None]:
    """
    Keep other trainings out of `args.output_dir` for as long as the block runs; every process of a run must enter.

    The processes that write (one, or one per machine with `save_on_each_node`) hold the lock. The operating system
    gives it back when they die, however they die, so a killed run is resumed at once. The file of the lock may stay
    and means nothing by itself. Within the block the same thread may enter again.

    Raises:
        ValueError: on every process, when another training works in this folder.
    """
    folder = Path(args.output_dir).absolute()
    if _held.get(folder) == threading.get_ident():
        yield
        return
    problem: str | None = None
    lock: AbstractContextManager | None = None
    if args.should_save:
        try:
            lock = _acquire(folder)
        except ValueError as error:
            problem = str(error)
    try:
        problems = [found for found in gather_object([problem]) if found is not None]
        if problems:
            raise ValueError(problems[0])
        _held[folder] = threading.get_ident()
        try:
            yield
        finally:
            del _held[folder]
    finally:
        if lock is not None:
            lock.__exit__(None, None, None)


def _acquire(folder: Path) -> AbstractContextManager:
    folder.mkdir(parents=True, exist_ok=True)
    lock = WeakFileLock(folder / LOCK_NAME, timeout=0.1)
    try:
        lock.__enter__()
    except Timeout:
        raise ValueError(
            f"`output_dir` {folder}: another training works in this folder: wait for it, stop it, or choose another "
            "`output_dir`."
        ) from None
    return lock


__all__ = ["LOCK_NAME", "only_training"]
