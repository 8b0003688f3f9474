"""Repositories of Omni-Video 2 as people load them who have diffusers, but not this package."""

import json

import pytest
import torch
from golden_2 import clip
from strangers import WITHOUT_PACKAGE, last_json, run_stranger

from omni_video_hf import OmniVideo2Pipeline
from omni_video_hf.hub.model_card import render_model_card

CALL = """
import torch
def frames(pipe, video):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 3}
    output = pipe("a red dress", video=video, generator=generator, max_new_tokens=3, output_type="latent", **size)
    values = output.frames.double()
    return [values.sum().item(), values.std().item(), output.settings["thought"]["prompt"]]
"""


def test_diffusers_opens_a_repository_without_the_package(converted_2, tmp_path):
    video = torch.from_numpy(clip().frames)
    torch.save(video, tmp_path / "video.pt")
    code = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(converted_2["A14B"])!r}, trust_remote_code=True)
import json
names = [type(part).__name__ for part in (pipe, pipe.adapter_2, pipe.mllm)]
print(json.dumps(names + frames(pipe, torch.load({str(tmp_path / "video.pt")!r}).numpy())))
"""
    found = last_json(run_stranger(WITHOUT_PACKAGE + CALL + code, tmp_path))
    scope = {}
    exec(CALL, scope)  # noqa: S102 - the lines above
    own = scope["frames"](OmniVideo2Pipeline.from_pretrained(converted_2["A14B"]), video.numpy())
    names = ["OmniVideo2Pipeline", "OmniVideo2Adapter", "Qwen3VLMoeForConditionalGeneration"]
    assert found == json.loads(json.dumps([*names, *own]))


def test_a_repository_has_one_copy_of_the_code(converted_2):
    folder = converted_2["A14B"]
    assert len(list(folder.rglob("*.py"))) <= 30
    for name in ("adapter", "adapter_2", "processor"):
        (component,) = (folder / name).glob("*.py")
        assert component.name.startswith("omni_video_hf_component_")
    assert "auto_map" not in json.loads((folder / "mllm" / "config.json").read_text())


@pytest.mark.parametrize("layout", ["A14B", "1.3B"])
def test_a_second_save_changes_nothing(converted_2, tmp_path, layout):
    pipe = OmniVideo2Pipeline.from_pretrained(converted_2[layout])
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    OmniVideo2Pipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_card_says_what_the_model_is(converted_2):
    card = render_model_card(converted_2["A14B"], "lab/omni-video-2-tiny")
    assert "Omni-Video 2" in card
    assert "AutoModelForImageTextToText" not in card
    for part in ("mllm", "transformer", "transformer_2", "adapter_2"):
        assert f"| {part} |" in card
