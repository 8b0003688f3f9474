import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

import omni_video_hf.training

WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"
LAUNCH_CONFIGS = Path(omni_video_hf.training.__file__).parent / "recipes" / "accelerate"
SETTINGS = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2}


def launch(folder, processes, tasks=("v2v",), fsdp=False, resume=None, **settings):
    """Run the worker; its losses by step and its weights, or the error it died of."""
    backend = {"ddp_backend": "gloo"} if processes > 1 else {}
    case = {"settings": SETTINGS | backend | settings, "tasks": tasks, "fsdp": fsdp, "resume": resume}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [str(WORKER), str(folder), json.dumps(case)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        return done.stderr
    log = [entry for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
    return log, load_file(folder / "weights.safetensors")


def assert_equal(result, expected):
    assert not isinstance(result, str), result
    (log, weights), (expected_log, expected_weights) = result, expected
    for entry, other in zip(log, expected_log, strict=True):
        losses = {key for key in other if "loss" in key}
        assert losses == {key for key in entry if "loss" in key}
        assert all(entry[key] == pytest.approx(other[key], rel=1e-4) for key in losses)
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert set(weights) == set(expected_weights)
    for name, value in expected_weights.items():
        # AdamW's first steps have the size of the learning rate whatever the gradient's: its rounding shows where the
        # gradient is almost 0.
        assert (weights[name] - value).abs().mean() < 1e-5, name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), 1, per_device_train_batch_size=4)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(one_process, tmp_path):
    assert_equal(launch(tmp_path, 2), one_process)


@pytest.mark.slow
def test_two_processes_with_different_tasks_equal_one_that_takes_both(tmp_path):
    tasks = ("t2v", "understand")
    together = launch(tmp_path / "two", 2, tasks, logging_steps=2)
    assert_equal(together, launch(tmp_path / "one", 1, tasks, gradient_accumulation_steps=2, logging_steps=2))


@pytest.mark.slow
def test_sharded_processes_equal_one_and_resume(one_process, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    assert_equal(launch(tmp_path, 2, fsdp=True, **saving), one_process)
    resumed = launch(tmp_path, 2, fsdp=True, resume=str(tmp_path / "checkpoint-1"), **saving)
    assert_equal(resumed, one_process)


@pytest.mark.slow
def test_sharded_processes_with_different_tasks_are_refused_instead_of_waiting_for_each_other(tmp_path):
    error = launch(tmp_path, 2, ("t2v", "understand"), fsdp=True)
    assert "the processes must run the same components in every step" in error


@pytest.mark.parametrize("file", sorted(LAUNCH_CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_configs_are_accelerates(file):
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    kind = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(file.stem, "DEEPSPEED")
    assert config.distributed_type.value == kind
    assert config.mixed_precision == "bf16"
    if file.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def test_every_way_to_launch_is_shipped():
    names = {file.stem for file in LAUNCH_CONFIGS.glob("*.yaml")}
    assert names == {"single_gpu", "ddp", "fsdp2", "zero1", "zero2", "zero3"}
