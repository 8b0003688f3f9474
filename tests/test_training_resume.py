import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file

from omni_video_hf.training import checkpoints
from omni_video_hf.training.run_lock import LOCK_NAME

TESTS = Path(__file__).parent
LAST = "checkpoint-10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An uninterrupted run, and two that were killed again and again."""
    folder = tmp_path_factory.mktemp("resume")
    command = [sys.executable, str(TESTS / "resume_worker.py"), str(folder)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(params=["killed", "timed"])
def runs(folder, request):
    return folder / request.param, folder / "whole"


@pytest.mark.parametrize("name", ["trained.safetensors", "ema.safetensors"])
def test_weights_and_average_are_bit_equal(runs, name):
    killed, whole = (load_file(folder / LAST / name) for folder in runs)
    assert set(killed) == set(whole)
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


def test_optimiser_and_schedule_are_bit_equal(runs):
    killed, whole = (torch.load(folder / LAST / "optimizer.pt", weights_only=True) for folder in runs)
    assert killed["param_groups"] == whole["param_groups"]
    for number, state in whole["state"].items():
        assert all(torch.equal(killed["state"][number][key], value) for key, value in state.items())
    killed, whole = (torch.load(folder / LAST / "scheduler.pt", weights_only=True) for folder in runs)
    assert killed == whole


def test_logs_are_equal(runs):
    killed, whole = (json.loads((folder / LAST / "trainer_state.json").read_text()) for folder in runs)
    assert killed["log_history"] == whole["log_history"]
    assert [entry["step"] for entry in whole["log_history"]] == [2, 3, 4, 6, 8, 9, 10]


def test_nothing_unfinished_is_left(runs):
    for folder in runs:
        names = {path.name for path in folder.iterdir()} - {LOCK_NAME}
        assert names == {"checkpoint-6", "checkpoint-8", "checkpoint-10"}


def test_an_unfinished_checkpoint_is_never_picked(tmp_path):
    assert checkpoints.last_checkpoint(tmp_path / "none") is None
    (tmp_path / checkpoints.WRITING_FOLDER / "checkpoint-9").mkdir(parents=True)
    assert checkpoints.last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    assert checkpoints.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_checkpoint_of_the_same_name_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        writing = tmp_path / checkpoints.WRITING_FOLDER / "checkpoint-3"
        writing.mkdir(parents=True)
        (writing / text).write_text(text)
        checkpoints.promote(writing, tmp_path / "checkpoint-3")
    assert [path.name for path in (tmp_path / "checkpoint-3").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_checkpoints_of_another_run_are_refused(tmp_path):
    parameters = {"a": torch.zeros(2), "b": torch.zeros(3)}
    file = tmp_path / "trained.safetensors"
    with pytest.raises(ValueError, match=r"no such file. `resume_from_checkpoint` must be"):
        checkpoints.load_trained(file, parameters, "joint")
    checkpoints.save_trained(file, parameters, {"stage": "joint"})
    checkpoints.load_trained(file, parameters, "joint")
    with pytest.raises(ValueError, match="1 are in one only, first b"):
        checkpoints.load_trained(file, {"a": torch.zeros(2)}, "joint")
    with pytest.raises(ValueError, match=r"b is \(3,\), the model's is \(4,\)"):
        checkpoints.load_trained(file, {"a": torch.zeros(2), "b": torch.zeros(4)}, "joint")
    samples = [training.sample("t2v", number) for number in range(2)]
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    training.trainer(tmp_path / "run", samples, **settings).train()
    with pytest.raises(ValueError, match=r"ema.safetensors: no such file, but `ema_decay` is set"):
        training.trainer(tmp_path / "run", samples, ema_decay=0.9, **settings).train(resume_from_checkpoint=True)
