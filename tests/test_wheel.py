"""The wheel, as people install it: without sources around it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_it_holds_the_package_and_nothing_of_the_training_of_shapes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if name.endswith(".py")}
    sources = ROOT / "src"
    modules.remove("omni_video_hf/spaces/omni-video/app.py")  # what `push-space` sends; no module of the package
    assert modules == {path.relative_to(sources).as_posix() for path in (sources / "omni_video_hf").rglob("*.py")}
    assert not [name for name in names if "examples" in name or "shapes/training" in name or "/muon" in name]
    assert "omni_video_hf/default_checkpoint/model_index.json" in names
    assert "omni_video_hf/model_cards/finetune.md.jinja" in names


@pytest.mark.slow
def test_it_generates_outside_of_the_checkout(wheel, tmp_path):
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    environment = os.environ | {"PYTHONPATH": str(installed)}
    where = "import omni_video_hf; print(omni_video_hf.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert Path(found.stdout.strip()).is_relative_to(installed)
    words = ["generate", "a large red circle moving left on a black background", "-o", "circle.mp4", "--frames", "5"]
    command = [sys.executable, "-m", "omni_video_hf", *words, "--steps", "2", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "circle.mp4").stat().st_size > 0
