"""Runs the commands of docs/editing.md, in order, on a tiny repository."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
from raw_data import datasets_cache, make_clip  # noqa: F401 - a fixture
from typer.testing import CliRunner

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.cli.main import app
from omni_video_hf.models.configuration_omni_video import SOURCE_CONDITIONINGS
from omni_video_hf.training.recipe import shipped_recipes

PAGE = (Path(__file__).parents[2] / "docs" / "editing.md").read_text()
SNIPPETS = re.findall(r"^```(json|bash)(?: title=(\S+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHORT = "--use_cpu --bf16 false --warmup_steps 0 --max_steps 1 --gradient_accumulation_steps 1 --report_to none"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page speaks of."""
    for number, name in enumerate(("fox", "winter")):
        make_clip(tmp_path / f"{name}.mp4", 17, (320, 192), 8, number)
    tiny.pipeline(max_context_length=2560).save_pretrained(tmp_path / "REPO")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(folder):
    for kind, title, text in SNIPPETS:
        if kind == "json":
            Path(title).write_text(text)
            continue
        for line in text.splitlines():
            words = shlex.split(line)[1:]
            if words[0] == "train":
                words += shlex.split(SHORT)
            if words[0] == "edit":
                words += ["--steps", "1", "--frames", "5", "--size", "64x32"]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, (line, result.output)
    trained = OmniVideoPipeline.from_pretrained(folder / "run" / "pipeline")
    assert trained.adapter.config.source_conditioning == "both"
    assert trained.transformer.patch_embedding.weight[:, 16:].abs().sum() > 0


def test_the_page_names_every_setting_and_recipe():
    assert all(f"| `{name}` |" in PAGE for name in SOURCE_CONDITIONINGS)
    assert all(f"| `{name}` |" in PAGE for name in shipped_recipes() if name.startswith("edit"))
