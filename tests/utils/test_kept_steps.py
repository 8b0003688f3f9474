"""Steps that are kept and used again: the same result, and nothing of others is touched."""

import pytest
import tiny
import torch

from omni_video_hf.utils.kept_steps import KeptSteps, fingerprint

CALL = {"task": "t2v", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, steps=None, stop_after=None):
    """Latents, and how often the decoder ran."""
    ran = []

    def callback(_, step, timestep, tensors):
        if steps is not None:
            steps.end_step()
        if step == stop_after:
            raise StoppedError
        return tensors

    hook = pipe.transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        if steps is None:
            return pipe("a fox", generator=torch.Generator().manual_seed(0), **CALL).frames, len(ran)
        with steps.used(), steps.recording(pipe.transformer):
            output = pipe("a fox", generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **CALL)
            return output.frames, len(ran)
    finally:
        hook.remove()


def test_an_interrupted_call_goes_on_bit_by_bit(pipe, tmp_path):
    expected, whole = sample(pipe)
    folder = tmp_path / "out.mp4.partial"
    with pytest.raises(StoppedError):
        sample(pipe, KeptSteps(folder, {"seed": 0}), stop_after=1)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000.safetensors", "step-00001.safetensors"]
    latents, ran = sample(pipe, KeptSteps(folder, {"seed": 0}))
    assert torch.equal(latents, expected)
    assert ran == whole // 2
    assert not folder.exists()
    assert "forward" not in vars(pipe.transformer)


def test_other_settings_are_refused(tmp_path):
    with pytest.raises(StoppedError), KeptSteps(tmp_path / "a", {"seed": 0, "prompt": "a"}).used():
        raise StoppedError
    other = KeptSteps(tmp_path / "a", {"seed": 1, "prompt": "a"})
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 here\)"), other.used():
        pass
    assert (tmp_path / "a" / "state.json").is_file()


def test_nothing_of_others_is_touched(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    steps = KeptSteps(tmp_path / "a", {})
    with pytest.raises(ValueError, match=r"holds mine\.txt, which this command did not write"), steps.used():
        pass
    with KeptSteps(tmp_path / "b", {}).used():
        (tmp_path / "b" / "mine.txt").write_text("mine")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]
    (tmp_path / "c").symlink_to(tmp_path / "b")
    with pytest.raises(ValueError, match="is no folder of steps"), KeptSteps(tmp_path / "c", {}).used():
        pass


def test_two_processes_at_once_are_refused(tmp_path):
    first, second = (KeptSteps(tmp_path / "a", {}) for _ in range(2))
    with first.used(), pytest.raises(ValueError, match="another process uses"), second.used():
        pass


def test_a_damaged_step_is_refused(tmp_path):
    with pytest.raises(StoppedError), KeptSteps(tmp_path / "a", {}).used():
        (tmp_path / "a" / "step-00000.safetensors").write_bytes(b"1234")
        raise StoppedError
    steps = KeptSteps(tmp_path / "a", {})
    with pytest.raises(ValueError, match=r"step-00000\.safetensors: is missing or damaged"), steps.used():
        pass


def test_fingerprints(tmp_path):
    (tmp_path / "a").write_text("a")
    before = fingerprint(tmp_path / "a"), fingerprint(tmp_path)
    assert before == (fingerprint(tmp_path / "a"), fingerprint(tmp_path))
    (tmp_path / "a").write_text("bb")
    assert before[0] != fingerprint(tmp_path / "a")
    assert before[1] != fingerprint(tmp_path)
