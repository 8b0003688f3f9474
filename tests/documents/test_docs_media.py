"""docs/media.md against the code: formats, codecs, flags, and its Python."""

import re
from pathlib import Path

from typer.testing import CliRunner

from omni_video_hf.cli.main import app
from omni_video_hf.cli.output import VIDEO_SUFFIXES
from omni_video_hf.media.video_reader import probe_video
from omni_video_hf.media.writing.formats import CODECS, CONTAINERS, DEFAULT_QUALITY

PAGE = (Path(__file__).parents[2] / "docs" / "media.md").read_text()


def test_the_table_of_formats():
    rows = dict(re.findall(r"^\| (\.\w+) \| ([^|]+) \|", PAGE, flags=re.MULTILINE))
    assert rows.keys() == CONTAINERS.keys()
    for suffix, container in CONTAINERS.items():
        named = [name for name in re.findall(r"[a-z0-9]+", rows[suffix]) if name in CODECS]
        assert tuple(dict.fromkeys(named)) == container.codecs, suffix
    assert {*VIDEO_SUFFIXES, ".webp"} == CONTAINERS.keys()


def test_the_copied_sounds():
    for suffix in (".mp4", ".mov", ".webm"):
        (text,) = re.findall(rf"^\| \{suffix} \| [^|]+ \| ([^|]+) \|", PAGE, flags=re.MULTILINE)
        assert {name.partition("_")[0] for name in CONTAINERS[suffix].sounds} == set(text.strip().split(", "))


def test_the_scale_of_quality():
    assert f"{DEFAULT_QUALITY}, the default" in " ".join(PAGE.split())
    assert CODECS["h264"].options(DEFAULT_QUALITY)["crf"] == "18"
    assert [CODECS[name].top_crf for name in ("h264", "hevc", "vp9", "av1")] == [51, 51, 63, 63]


def test_the_flags():
    text = CliRunner().invoke(app, ["edit", "--help"], terminal_width=200).output
    for flag in set(re.findall(r"--[a-z][a-z-]+", PAGE)):
        assert flag in text, flag


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(code, {})  # noqa: S102 - what the page shows
    info = probe_video("grey.webm")
    assert (info.num_frames, info.width, info.height, info.fps) == (48, 96, 64, 24)
