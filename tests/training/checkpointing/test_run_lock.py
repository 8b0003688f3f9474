"""One training at a time in one `output_dir`."""

import os
import signal
import time
from contextlib import contextmanager

import pytest
import training
from training_runs import base_fixture, command, data_fixture  # noqa: F401

from omni_video_hf.training.checkpointing import checkpoints
from omni_video_hf.training.checkpointing.run_lock import LOCK_NAME, only_training

MESSAGE = "another training uses this folder"


@contextmanager
def other_training(folder):
    """A process that trains in a folder and has a child of its own, as with workers of a DataLoader."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with only_training(training.arguments(folder)):
            child = os.fork()
            if child:
                os.write(tell, str(child).encode())
            time.sleep(3600)
        os._exit(0)
    child = int(os.read(ready, 20))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:  # the child lives on and must not hold the lock
            with only_training(training.arguments(folder)):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_second_training_is_refused_until_the_first_one_dies(base, data, tmp_path):
    samples = [training.sample("t2v", number) for number in range(2)]
    with other_training(tmp_path):
        with pytest.raises(ValueError, match=MESSAGE):
            training.trainer(tmp_path, samples).train()
        refused = command(base, data, tmp_path, "decoder")
        assert refused.exit_code == 1
        assert MESSAGE in " ".join(refused.output.split())
        assert {path.name for path in tmp_path.iterdir()} == {LOCK_NAME}
    training.trainer(tmp_path, samples).train()
    # What is left of the lock is no training and no checkpoint.
    assert checkpoints.last_checkpoint(tmp_path) is None
    result = command(base, data, tmp_path, "decoder")
    assert result.exit_code == 0, result.output


def test_one_process_may_train_again_and_enter_twice(tmp_path):
    args = training.arguments(tmp_path)
    with only_training(args), only_training(args):
        pass
    with only_training(args):
        pass


def test_a_file_is_no_folder_to_train_in(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`output_dir` .*file is a file: choose a folder"):
        training.arguments(tmp_path / "file")
