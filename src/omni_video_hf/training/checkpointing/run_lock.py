"""Lock of `output_dir`: two runs in the same folder would overwrite and remove each other's checkpoints."""

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
    Lock `args.output_dir` during the block. Every process of a run must call this.

    The processes that write files (one, or one per machine with `save_on_each_node`) hold the lock. The operating
    system releases it when they end or are killed, so that a killed run can be resumed immediately. The lock file may
    remain and has no meaning without the lock. The same thread may lock the folder again within the block.

    Raises:
        ValueError: on every process, if another run uses this folder.
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
            f"`output_dir` {folder}: another training uses this folder: wait for its end, stop it, or choose another "
            "`output_dir`."
        ) from None
    return lock


__all__ = ["LOCK_NAME", "only_training"]
