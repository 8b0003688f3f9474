"""
Saves, completions, caches and conversions that are killed at every place where they change a folder.

A program of its own: `kill_worker.py FOLDER POINTS`, with names of scenarios behind it for only these. `POINTS` is how
many of the places of each scenario are tried, spread evenly; 0 stands for all. Each attempt is a forked process that
dies by SIGKILL before its N-th change: a file that is opened for writing, a rename, a removal, a folder made or
removed. What it leaves is checked, the work is done again, and the outcome is compared with that of an uninterrupted
run. The last line printed is JSON: for every scenario how many changes there are, how many were tried, and what was
wrong.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import tiny
import torch
from golden import CORE
from raw_data import write_pickle
from transformers.utils import logging

from conversion.convert_omni_video import convert
from omni_video_hf.hub.repository import check_finished, complete_repository, finish_saving
from omni_video_hf.training.features.cache import FeatureCache
from omni_video_hf.training.features.import_features import import_features

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
MINE = "notes of mine.txt"


def attempt(folder: Path, work: Callable[[], object], point: int) -> int:
    """Do `work` in a process that dies before its change number `point`; returns the number of changes it came to."""
    counted = folder.parent / "changes"
    counted.write_text("")
    pid = os.fork()
    if pid == 0:
        log = os.open(counted, os.O_WRONLY)
        number = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal number
            is_change = event in CHANGES or (event == "open" and _writes(arguments))
            if (
                is_change
                and isinstance(arguments[0], (str, os.PathLike))
                and str(arguments[0]).startswith(str(folder))
            ):
                number += 1
                os.pwrite(log, str(number).encode(), 0)
                if number == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the work failed by itself at the point {point}")
    return int(counted.read_text() or 0)


def _writes(arguments: tuple) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) and not isinstance(arguments[0], int)


def tree(folder: Path, hidden: bool = True) -> dict[str, bytes]:
    """Every file of a folder; empty folders count as well."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if hidden or not any(part.startswith(".") for part in Path(name).parts):
            found[name] = path.read_bytes() if path.is_file() else b""
    return found


def age(folder: Path) -> None:
    """Let time pass for what a kill left."""
    for path in folder.rglob(".*"):
        if path.is_dir():
            os.utime(path, (time.time() - 120,) * 2)


@dataclass
class Outcome:
    """What was seen of one scenario."""

    changes: int = 0
    tried: int = 0
    states: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def sweep(name: str, place: Path, points: int) -> Outcome:
    """Kill one scenario at its points."""
    prepare, work, state_of, equal = SCENARIOS[name](place)
    folder = place / "work"
    outcome = Outcome()
    _fresh(folder, prepare)
    outcome.changes = attempt(folder, lambda: work(folder), 0)
    whole = place / "whole"
    folder.rename(whole)
    every = range(1, outcome.changes + 1)
    for point in (
        every if not points else sorted({1 + i * (outcome.changes - 1) // (points - 1) for i in range(points)})
    ):
        _fresh(folder, prepare)
        attempt(folder, lambda: work(folder), point)
        outcome.tried += 1
        state = state_of(folder, whole)
        outcome.states[state] = outcome.states.get(state, 0) + 1
        if state == "mixture":
            outcome.wrong.append(f"{point}: a mixture is accepted")
        age(folder)
        if name == "save" and point % 2 and state == "unfinished":
            finish_saving(folder / "repository")  # all of the new one is still there
        else:
            work(folder)
        problem = equal(folder, whole)
        if problem:
            outcome.wrong.append(f"{point} ({state}): {problem}")
    return outcome


def _fresh(folder: Path, prepare: Callable[[Path], object]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    prepare(folder)
    (folder / MINE).write_text("mine")


def same_tree(folder: Path, whole: Path) -> str | None:
    """How two folders differ."""
    found, wanted = tree(folder), tree(whole)
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return f"{len(names)} differ, first {names[:3]}" if names else None


def repository_state(old: dict[str, bytes]) -> Callable[[Path, Path], str]:
    """Whether a repository is the old one, the new one, refused, or a mixture."""

    def state(folder: Path, whole: Path) -> str:
        try:
            check_finished(folder / "repository")
        except ValueError as error:
            assert "is unfinished" in str(error)
            return "unfinished"
        found = tree(folder / "repository", hidden=False)
        new = tree(whole / "repository", hidden=False)
        return "new" if found == new else "old" if found == old else "mixture"

    return state


def saving(place: Path) -> tuple:
    """A pipeline over another one, with more shards and files of the user's beside."""
    old, new = tiny.pipeline(seed=0), tiny.pipeline(seed=1)
    old.save_pretrained(place / "old", max_shard_size="100KB")
    (place / "old" / "mllm" / MINE).write_text("mine")
    before = tree(place / "old")
    return (
        lambda folder: shutil.copytree(place / "old", folder / "repository"),
        lambda folder: new.save_pretrained(folder / "repository"),
        repository_state(before),
        same_tree,
    )


def completing(place: Path) -> tuple:
    """A model that was trained without its MLLM."""
    pipe = tiny.pipeline()
    pipe.save_pretrained(place / "base")
    head = tiny.VISION_HEAD | {"hidden_size": 24}
    adapter = tiny.ADAPTER | {"vision_hidden_size": 24}
    tiny.model(seed=5, enable_mllm=False, vision_head_config=head, adapter_config=adapter).save_pretrained(
        place / "model"
    )
    before = tree(place / "model")
    return (
        lambda folder: shutil.copytree(place / "model", folder / "repository"),
        lambda folder: complete_repository(folder / "repository", place / "base"),
        repository_state(before),
        same_tree,
    )


def caching(place: Path) -> tuple:
    """A cache that is brought up to date: an entry changed, one gone, one new, and files of the user's in it."""
    for number in range(3):
        write_pickle(place / "before" / f"{number}.pkl", number)
        write_pickle(place / "after" / f"{number + 1}.pkl", number + (number > 1))
    import_features([place / "before"], place / "old")
    for name in (MINE, f"shards/{MINE}", "shards/train-00000.tar", f"parts/{MINE}", "index-mine.parquet"):
        (place / "old" / name).write_text("mine")
    before = contents(place / "old")

    def state(folder: Path, whole: Path) -> str:
        try:
            found = contents(folder / "cache")
        except ValueError:
            return "unfinished"
        return "new" if found == contents(whole / "cache") else "old" if found == before else "mixture"

    def equal(folder: Path, whole: Path) -> str | None:
        found, wanted = tree(folder), tree(whole)
        for name in found.keys() ^ wanted.keys():
            if not name.endswith((".safetensors", ".parquet")):  # whose names count the runs
                return f"{name} is in one only"
        lost = [name for name, data in wanted.items() if data == b"mine" and found.get(name) != data]
        if lost:
            return f"lost {lost}"
        return None if contents(folder / "cache") == contents(whole / "cache") else "other features"

    return (
        lambda folder: shutil.copytree(place / "old", folder / "cache"),
        lambda folder: import_features([place / "after"], folder / "cache"),
        state,
        equal,
    )


def computing(place: Path) -> tuple:
    """A cache from nothing."""
    _, _, state, equal = caching(place / "other")
    return (
        lambda folder: None,
        lambda folder: import_features([place / "other" / "after"], folder / "cache"),
        state,
        equal,
    )


def contents(cache: Path) -> list:
    """Everything that training sees of a cache."""
    data = FeatureCache(cache)
    keys = [record["key"] for record in data.records]
    samples = [{name: (str(t.dtype), t.float().tolist()) for name, t in s.items() if name != "task"} for s in data]
    return list(zip(keys, samples, strict=True))


def converting(place: Path) -> tuple:
    """Upstream's checkpoint, small shards."""

    def state(folder: Path, whole: Path) -> str:
        output = folder / "output"
        if not output.exists():
            return "absent"
        names = tree(output).keys() - {"conversion.json"}
        return "new" if names == tree(whole / "output").keys() else "mixture"

    def work(folder: Path) -> None:
        try:
            convert(CORE / "omni_ckpts", folder / "output", max_shard_size="200KB", max_context_length=64)
        except ValueError as error:
            if "exists already" not in str(error):
                raise

    return lambda folder: None, work, state, same_tree_but_lock


def same_tree_but_lock(folder: Path, whole: Path) -> str | None:
    """The empty lock file of a killed conversion may stay."""
    lock = folder / "output.lock"
    if lock.exists() and not lock.stat().st_size:
        lock.unlink()
    return same_tree(folder, whole)


SCENARIOS = {
    "save": saving,
    "complete": completing,
    "update_cache": caching,
    "new_cache": computing,
    "convert": converting,
}


def main() -> None:
    """Run what the command line asks for."""
    place, points, *names = sys.argv[1:]
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes = {}
    for name in names or SCENARIOS:
        folder = Path(place).resolve() / name
        folder.mkdir(parents=True)
        outcomes[name] = vars(sweep(name, folder, int(points)))
        print(name, outcomes[name], file=sys.stderr, flush=True)  # noqa: T201
    print(json.dumps(outcomes))  # noqa: T201


if __name__ == "__main__":
    main()
