"""What `export_checkpoint` refuses; what it writes is tested with the command that calls it."""

import shutil

import pytest
from interrupted import interrupt_save
from training_runs import base_fixture, command, data_fixture  # noqa: F401

from omni_video_hf.training.checkpointing.export import export_checkpoint


def test_an_unfinished_base_is_refused(base, data, tmp_path):
    run = command(base, data, tmp_path / "run", "decoder", "--max_steps", "2")
    assert run.exit_code == 0, run.output
    shutil.copytree(base, tmp_path / "unfinished")
    interrupt_save(tmp_path / "unfinished")
    with pytest.raises(ValueError, match="is unfinished: a save was interrupted"):
        export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "out", base=str(tmp_path / "unfinished"))
    assert not (tmp_path / "out").exists()
