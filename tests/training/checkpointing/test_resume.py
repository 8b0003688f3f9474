import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file

from omni_video_hf.training.checkpointing import checkpoints
from omni_video_hf.training.checkpointing.run_lock import LOCK_NAME

TESTS = Path(__file__).parents[2] / "support"
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained.safetensors", "ema.safetensors"])
def test_weights_and_average_are_bit_equal(runs, name):
    killed, whole = (load_file(folder / LAST / name) for folder in runs)
    assert set(killed) == set(whole)
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


@pytest.mark.slow
def test_optimiser_and_schedule_are_bit_equal(runs):
    killed, whole = (torch.load(folder / LAST / "optimizer.pt", weights_only=True) for folder in runs)
    assert killed["param_groups"] == whole["param_groups"]
    for number, state in whole["state"].items():
        assert all(torch.equal(killed["state"][number][key], value) for key, value in state.items())
    killed, whole = (torch.load(folder / LAST / "scheduler.pt", weights_only=True) for folder in runs)
    assert killed == whole


@pytest.mark.slow
def test_logs_are_equal(runs):
    killed, whole = (json.loads((folder / LAST / "trainer_state.json").read_text()) for folder in runs)
    assert killed["log_history"] == whole["log_history"]
    assert [entry["step"] for entry in whole["log_history"]] == [2, 3, 4, 6, 8, 9, 10]


@pytest.mark.slow
def test_nothing_unfinished_is_left(runs):
    for folder in runs:
        assert names(folder) - {LOCK_NAME} == {"checkpoint-6", "checkpoint-8", "checkpoint-10"}


def complete(folder, run="a", text="x"):
    """A folder that counts as a complete checkpoint."""
    folder.mkdir(parents=True)
    (folder / "trained.safetensors").write_text(text)
    (folder / "more").mkdir()
    (folder / "more" / "state.json").write_text(text)
    checkpoints.seal(folder, run)
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_an_incomplete_checkpoint_is_never_picked_and_reported(tmp_path, caplog):
    assert checkpoints.last_checkpoint(tmp_path / "none") is None
    (tmp_path / checkpoints.WRITING_FOLDER / "checkpoint-9").mkdir(parents=True)
    assert checkpoints.last_checkpoint(tmp_path) is None
    whole = complete(tmp_path / "checkpoint-3")
    cut, lost, empty, torn = (complete(tmp_path / f"checkpoint-{step}") for step in (10, 11, 12, 13))
    (cut / "more" / "state.json").write_text("")
    (lost / "trained.safetensors").unlink()
    shutil.rmtree(empty)
    empty.mkdir()
    (torn / checkpoints.MANIFEST_NAME).write_text("{")
    assert not caplog.text
    assert checkpoints.last_checkpoint(tmp_path) == str(whole)
    for said in (
        "checkpoint-10 is not complete, so it is not used to resume: more/state.json has 0 bytes instead of 1",
        "checkpoint-11 is not complete, so it is not used to resume: trained.safetensors is missing",
        "checkpoint-12 is not complete, so it is not used to resume: it has no checkpoint.json",
        "checkpoint-13 is not complete, so it is not used to resume: checkpoint.json is damaged",
    ):
        assert said in caplog.text
    with pytest.raises(
        ValueError, match=r"checkpoint-11 is not a complete checkpoint.*Complete are: .*checkpoint-3\."
    ):
        checkpoints.check_complete(lost)
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match=r"none of its checkpoints is complete \(checkpoint-10: more/state.json"):
        checkpoints.last_checkpoint(tmp_path)


def test_checkpoints_of_earlier_versions_are_looked_into(tmp_path):
    samples = [training.sample("t2v", number) for number in range(2)]
    training.trainer(tmp_path, samples, save_strategy="steps", save_steps=1, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    (folder / checkpoints.MANIFEST_NAME).unlink()
    assert checkpoints.last_checkpoint(tmp_path) == str(folder)
    file = folder / "optimizer.pt"
    os.truncate(file, file.stat().st_size // 2)
    assert checkpoints.problem_of(folder) == "optimizer.pt is missing or damaged"
    run = training.trainer(tmp_path, samples, save_strategy="steps", save_steps=1, max_steps=2)
    for wanted in (True, str(folder)):
        with pytest.raises(ValueError, match=r"optimizer\.pt is missing or damaged"):
            run.train(resume_from_checkpoint=wanted)


def test_a_checkpoint_of_the_same_name_is_replaced_whole_but_kept_if_it_is_of_another_run(tmp_path):
    for text in ("old", "newer"):
        checkpoints.promote(
            complete(tmp_path / checkpoints.WRITING_FOLDER / "checkpoint-3", "a", text), tmp_path / "checkpoint-3"
        )
    assert (tmp_path / "checkpoint-3" / "trained.safetensors").read_text() == "newer"
    assert names(tmp_path) == {"checkpoint-3"}
    checkpoints.promote(
        complete(tmp_path / checkpoints.WRITING_FOLDER / "checkpoint-3", "b", "b"), tmp_path / "checkpoint-3"
    )
    assert names(tmp_path) == {"checkpoint-3", "earlier-1-checkpoint-3"}
    assert (tmp_path / "earlier-1-checkpoint-3" / "trained.safetensors").read_text() == "newer"


def test_only_checkpoints_that_the_run_wrote_are_rotated(tmp_path):
    for step in (1, 2, 3, 4):
        complete(tmp_path / f"checkpoint-{step}", "a")
    complete(tmp_path / "checkpoint-5", "b")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-0-mine").mkdir()
    outside = complete(tmp_path.parent / f"{tmp_path.name}-outside", "a")
    (tmp_path / "checkpoint-0").symlink_to(outside)
    checkpoints.rotate(tmp_path, 2, "a", {tmp_path / "checkpoint-1"})
    mine = {"checkpoint-0", "checkpoint-0-mine", "checkpoint-5", "checkpoint-6"}
    assert names(tmp_path) == mine | {"checkpoint-1", "checkpoint-4"}
    assert checkpoints.problem_of(outside) is None
    checkpoints.rotate(tmp_path, None, "a", set())
    assert len(names(tmp_path)) == 6


def test_a_run_that_begins_anew_leaves_the_checkpoints_of_another(tmp_path):
    samples = [training.sample("t2v", number) for number in range(4)]
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    training.trainer(tmp_path, samples, max_steps=4, **saving).train()
    run = training.trainer(
        tmp_path,
        samples,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        eval_dataset=training.Samples(samples),
        **saving,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint).name
    assert {name for name in names(tmp_path) if name.startswith("checkpoint")} == {best, "checkpoint-4"}


def test_what_no_run_wrote_is_not_removed_with_unfinished_checkpoints(tmp_path):
    writing = tmp_path / checkpoints.WRITING_FOLDER
    (writing / "checkpoint-3").mkdir(parents=True)
    (writing / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"contains what this package does not write \(notes.txt\)"):
        checkpoints.clear(writing)
    (writing / "notes.txt").unlink()
    checkpoints.clear(writing)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "checkpoint-1").mkdir()
    writing.symlink_to(outside)
    with pytest.raises(ValueError, match="is a link"):
        checkpoints.clear(writing)
    assert names(outside) == {"checkpoint-1"}


def test_checkpoints_of_another_run_are_refused(tmp_path):
    parameters = {"a": torch.zeros(2), "b": torch.zeros(3)}
    file = tmp_path / "trained.safetensors"
    with pytest.raises(ValueError, match=r"no such file. `resume_from_checkpoint` must be"):
        checkpoints.load_trained(file, parameters, "joint")
    checkpoints.save_trained(file, parameters, {"stage": "joint"})
    checkpoints.load_trained(file, parameters, "joint")
    with pytest.raises(ValueError, match="1 are in only one of the two, such as b"):
        checkpoints.load_trained(file, {"a": torch.zeros(2)}, "joint")
    with pytest.raises(ValueError, match=r"b is \(3,\), but \(4,\) in the model"):
        checkpoints.load_trained(file, {"a": torch.zeros(2), "b": torch.zeros(4)}, "joint")
    samples = [training.sample("t2v", number) for number in range(2)]
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    training.trainer(tmp_path / "run", samples, **settings).train()
    with pytest.raises(ValueError, match=r"ema.safetensors: no such file, but `ema_decay` is set"):
        training.trainer(tmp_path / "run", samples, ema_decay=0.9, **settings).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_run_killed_while_it_writes_is_resumed_bit_equal(tmp_path):
    # Moments in a checkpoint, in a rotation, and in the final pipeline; more of them with a larger number.
    command = [sys.executable, str(TESTS / "train_kill_worker.py"), str(tmp_path), "4"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bit-equal") == 4
    assert "checkpoint-" in done.stdout
