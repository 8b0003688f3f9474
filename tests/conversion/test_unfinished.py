import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion import unfinished
from conversion.unfinished import Unfinished, alone, check_disk_space, fingerprint

ROOT = Path(unfinished.__file__).parents[1]


def write(folder, name, value, made_from="a"):
    with Unfinished(folder, made_from) as work:
        file = folder / "part" / name
        new = not work.has(file)
        if new:
            work.write(file, {"x": torch.full((2,), value)})
        return new


def test_a_shard_is_written_once_for_the_same_sources(tmp_path):
    folder = tmp_path / "x.incomplete"
    assert write(folder, "a.safetensors", 1.0)
    assert not write(folder, "a.safetensors", 2.0)
    assert write(folder, "b.safetensors", 2.0)
    assert float(load_file(folder / "part" / "a.safetensors")["x"][0]) == 1.0
    assert write(folder, "a.safetensors", 3.0, made_from="b")
    assert not (folder / "part" / "b.safetensors").exists()


@pytest.mark.parametrize(
    "state",
    [
        "", "{", "[]", "{}", '{"made_from": "a"}', '{"made_from": "a", "shards": 3, "files": []}',
        '{"made_from": "a", "shards": {}, "files": ["../mine.txt"]}',
    ],
)  # fmt: skip
def test_a_damaged_record_proves_nothing_so_that_nothing_is_removed(tmp_path, state):
    folder = tmp_path / "x.incomplete"
    write(folder, "a.safetensors", 1.0)
    (tmp_path / "mine.txt").write_text("mine")
    (folder / "conversion.json").write_text(state)
    with pytest.raises(ValueError, match=r"conversion\.json: is damaged, or of another version"):
        write(folder, "a.safetensors", 2.0)
    assert float(load_file(folder / "part" / "a.safetensors")["x"][0]) == 1.0
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("place", ["thesis.txt", "part/thesis.txt", "mine/thesis.txt"])
@pytest.mark.parametrize("made_from", [None, "a", "b"])
def test_files_of_others_are_left_alone(tmp_path, place, made_from):
    folder = tmp_path / "x.incomplete"
    if made_from is not None:
        write(folder, "a.safetensors", 1.0)
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"holds files that no conversion left there \({place}\): move them away"):
        write(folder, "a.safetensors", 1.0, made_from=made_from or "a")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("link", ["x.incomplete", "x.incomplete/part", "x.incomplete/.writing"])
def test_nothing_is_written_or_removed_through_a_link(tmp_path, link):
    folder, mine = tmp_path / "x.incomplete", tmp_path / "mine"
    mine.mkdir()
    (mine / "a.safetensors").write_text("mine")
    if link != "x.incomplete":
        folder.mkdir()
        (folder / "conversion.json").write_text('{"made_from": "b", "shards": {"part/a.safetensors": 4}, "files": []}')
    (tmp_path / link).symlink_to(mine)
    with pytest.raises(ValueError, match=r"must be a folder, not a link|no conversion left there"):
        write(folder, "a.safetensors", 1.0)
    assert (mine / "a.safetensors").read_text() == "mine"


def test_a_lock_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "out.lock").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.lock: is in the place of a lock file"), alone(tmp_path / "out"):
        pass
    assert (tmp_path / "out.lock").read_text() == "mine"


def test_a_shard_that_was_changed_or_not_recorded_is_written_again(tmp_path):
    folder = tmp_path / "x.incomplete"
    write(folder, "a.safetensors", 1.0)
    file = folder / "part" / "a.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    assert write(folder, "a.safetensors", 2.0)
    state = json.loads((folder / "conversion.json").read_text())
    state["shards"] = {"part/other": 1}
    assert state["files"] == ["part/a.safetensors"]
    (folder / "conversion.json").write_text(json.dumps(state))
    assert write(folder, "a.safetensors", 3.0)


def test_halves_of_files_do_not_stay(tmp_path):
    folder = tmp_path / "x.incomplete"
    write(folder, "a.safetensors", 1.0)
    for name in (".writing/.tmpAbC123", ".writing/b.safetensors", ".writing/new/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    with Unfinished(folder, "a"):
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"conversion.json", "part/a.safetensors"}


def test_nothing_is_left_when_nothing_was_written(tmp_path):
    with pytest.raises(RuntimeError), Unfinished(tmp_path / "x.incomplete", "a"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_copies_are_recorded(tmp_path):
    (tmp_path / "source.json").write_text("first")
    for _ in range(2):
        with Unfinished(tmp_path / "x.incomplete", "a") as work:
            work.copy(tmp_path / "source.json", tmp_path / "x.incomplete" / "vae" / "source.json")
        (tmp_path / "source.json").write_text("later")
    assert (tmp_path / "x.incomplete" / "vae" / "source.json").read_text() == "first"


def test_fingerprint_follows_sources_and_options(tmp_path):
    (tmp_path / "a.pt").write_text("a")
    first = fingerprint(tmp_path, {"dtype": "float32"})
    assert fingerprint(tmp_path, {"dtype": "float32"}) == first
    assert fingerprint(tmp_path, {"dtype": "float16"}) != first
    (tmp_path / "a.pt").write_text("ab")
    assert fingerprint(tmp_path, {"dtype": "float32"}) != first


def test_another_process_is_kept_out(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from conversion.unfinished import alone
try:
    with alone(Path({str(tmp_path / "out")!r})):
        print("in")
except ValueError as error:
    print(error)
"""

    def other():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    with alone(tmp_path / "out"):
        assert "another conversion" in other()
    assert other() == "in\n"
    assert list(tmp_path.iterdir()) == []


def test_disk_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(unfinished.shutil, "disk_usage", lambda _: usage(1000))
    folder = tmp_path / "x.incomplete"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(bytes(500))  # from an earlier run
    check_disk_space(1500, folder)
    with pytest.raises(ValueError, match=r"GB are needed"):
        check_disk_space(1501, folder)
