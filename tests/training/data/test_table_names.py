import os
import pickle
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from omni_video_hf.training.data import table_files, table_names
from omni_video_hf.training.data.media_table import MediaTable, load_media_table
from omni_video_hf.training.data.table_names import Places, media_names, repeated


def test_names_of_media():
    assert media_names(pa.chunked_array([["a.mp4", None], ["b/c.png"]])) == ["a.mp4", None, "b/c.png"]
    values = [
        {"path": "a.mp4", "bytes": None},
        {"path": "b.mp4", "bytes": b"x"},
        {"path": None, "bytes": b"x"},
        {"path": None, "bytes": b""},
        {"path": "", "bytes": None},
        None,
    ]
    kind = pa.struct({"path": pa.string(), "bytes": pa.binary()})
    assert media_names(pa.chunked_array([pa.array(values, kind)])) == ["a.mp4", "b.mp4", "bytes", None, None, None]
    alone = pa.chunked_array([pa.array([{"bytes": b"x"}], pa.struct({"bytes": pa.binary()}))])
    assert media_names(alone) == ["bytes"]


def test_real_paths_are_those_of_the_system(tmp_path, monkeypatch):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "file").symlink_to("/etc/hostname")
    calls = []
    realpath = os.path.realpath
    monkeypatch.setattr(
        table_names.os.path, "realpath", lambda path, **options: calls.append(path) or realpath(path, **options)
    )
    places = Places()
    for name in ("real/a", "link/a", "link/deep/a", "real/file", "link/", "link/..", "link/../a", "none/a"):
        path = f"{tmp_path}/{name}"
        assert places.real_path(path) == str(Path(path).resolve()), name
    calls.clear()
    for number in range(100):
        places.real_path(f"{tmp_path}/link/{number}")
    assert not calls  # the folder is known
    assert pickle.loads(pickle.dumps(places)).real_path("/none") == "/none"  # noqa: S301 - our own


def test_repeated_names_are_found_also_among_equal_hashes(monkeypatch):
    names = ["a", "b", "a", "c", "b", "a"]
    assert list(repeated(names)) == [0, 1, 2, 4, 5]
    monkeypatch.setattr(table_names, "hash", len, raising=False)
    assert list(repeated(names)) == [0, 1, 2, 4, 5]
    assert list(repeated(["a", "b"])) == list(repeated([])) == []


def test_names_over_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("omni_video_hf.training.data.media_table.NAMED_AT_ONCE", 3)
    monkeypatch.setattr(table_files, "CSV_ROWS", 2)
    media = ["x.mp4", f"{tmp_path}/in/y.mp4", "/elsewhere/z.mp4", "", "x.mp4", "x.mp4", f"{tmp_path}/in/y.mp4"]
    wanted = [
        "t2v:x.mp4", "t2v:in/y.mp4", "t2v:/elsewhere/z.mp4", "t2v:-", "t2v:x.mp4#2", "t2v:x.mp4#3", "t2v:in/y.mp4#2",
    ]  # fmt: skip
    (tmp_path / "data.csv").write_text("media,prompt\n" + "".join(f"{name},{n}\n" for n, name in enumerate(media)))
    table = load_media_table(tmp_path / "data.csv", task="t2v")
    assert table.ids == wanted
    assert [row.text for row in table] == [str(number) for number in range(7)]
    rows = Dataset.from_dict({"prompt": ["a", "b"]})
    assert MediaTable(rows, tmp_path, task="t2v").ids == ["t2v:-", "t2v:-#2"]


def test_a_name_does_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    """A relative path starts at the table, wherever the command runs."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "data.csv").write_text("media,prompt\na.mp4,x\n")
    for folder in (tmp_path, tmp_path / "sub", tmp_path.parent):
        monkeypatch.chdir(folder)
        assert load_media_table(tmp_path / "data.csv", task="t2v").ids == ["t2v:a.mp4"]
