"""Runs every snippet of docs/data.md, in order, in a folder with the files it names."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
import training
from raw_data import datasets_cache, make_clip, make_image, write_pickle  # noqa: F401 - a fixture
from training_runs import write_samples
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from typer.testing import CliRunner

from omni_video_hf.cli.main import app
from omni_video_hf.training.data.media_table import COLUMNS, load_media_table
from omni_video_hf.training.features.cache import FeatureCache

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SNIPPETS = re.findall(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page speaks of."""
    for number, name in enumerate(("clips/fox", "clips/winter", "clips/barn", "folder/fox", "folder/winter")):
        make_clip(tmp_path / f"{name}.mp4", 17, (160, 96), 8, number)
    for name in ("barn", "blue"):
        make_image(tmp_path / "images" / f"{name}.png", (96, 96))
    tiny.pipeline(max_context_length=2560).save_pretrained(tmp_path / "omni-video")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**tiny.VISION | {"hidden_size": 24})).save_pretrained(tmp_path / "siglip")
    SiglipImageProcessorPil(size={"height": 42, "width": 42}).save_pretrained(tmp_path / "siglip")
    write_pickle(tmp_path / "upstream-features" / "t2v.pkl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_snippet_runs(folder):
    names, outputs = {}, []
    assert {kind for kind, _, _ in SNIPPETS} == {"json", "bash", "python"}
    for kind, title, text in SNIPPETS:
        if kind == "json":
            Path(title).write_text(text)
        elif kind == "python":
            exec(compile(text, "docs/data.md", "exec"), names)  # noqa: S102 - the page's own
        else:
            program, *arguments = shlex.split(text.replace("\\\n", " "))
            assert program == "omni-video"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            outputs.append(" ".join(result.stderr.split()))

    assert "7 computed, 0 computed again, 0 kept, 0 skipped" in outputs[0]
    assert "0 computed, 1 computed again, 6 kept, 0 skipped" in outputs[2]
    assert "Changed and computed again: 1" in outputs[2]
    assert re.search(r"t2i:images/barn.png │ text", outputs[2])
    assert names["trainer"].state.global_step == 2
    sample = FeatureCache("cache-joint")[0]
    assert {"input_ids", "labels", "latents", "target_features"} <= set(sample)
    assert [row.task for row in load_media_table("folder")] == ["t2v", "v2v"]


def test_the_page_names_every_column_and_file(tmp_path):
    rows = re.search(r"^\| column \|.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)[1].splitlines()
    columns = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(columns) == sorted(COLUMNS)

    listed = re.search(r"^```\ncache/\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1].splitlines()
    cache = write_samples(tmp_path / "cache", [training.sample("t2v")])
    files = [path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()]
    files = [re.sub(r"^index-[0-9a-f]+\.", "index-<hash>.", name) for name in files]
    files.append("files.parquet")  # of `precompute`, which also knows the files that samples come from
    assert sorted(line.split()[0] for line in listed) == sorted(files)
