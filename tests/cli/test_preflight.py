"""What the command line checks of Omni-Video 2 before it loads weights."""

import pytest
from golden_2 import clip

from omni_video_hf.cli.checks import GenerationOptions, Loading
from omni_video_hf.cli.console import UsageProblem
from omni_video_hf.cli.preflight import Outline, Outline2
from omni_video_hf.hub.inspection import repository_parts
from omni_video_hf.media import save_video


@pytest.fixture(scope="module")
def outline(converted_2):
    found = Outline.of(Loading(model=str(converted_2["A14B"])))
    assert isinstance(found, Outline2)
    return found


def test_requests_that_fit_pass(outline, tmp_path):
    outline.check("t2v", ["a panda"], GenerationOptions(size="64x32", frames=5), {})
    outline.check(None, ["a panda"], GenerationOptions(size="64x32", frames=5), {})
    save_video(clip(9, 32, 64).frames, tmp_path / "clip.mp4", fps=8)
    options = GenerationOptions(size="64x32", frames=5)
    outline.check("v2v", ["a red dress"], options, {"video": str(tmp_path / "clip.mp4")})


@pytest.mark.parametrize(
    ("task", "options", "media", "message"),
    [
        ("t2i", {}, {}, "'t2v', 'v2v'"),
        ("i2i", {}, {"image": "a.png"}, "videos only"),
        ("t2v", {"frames": 6}, {}, "4n"),
        ("t2v", {"size": "65x32"}, {}, "multiple"),
        ("v2v", {}, {"video": "a.mp4"}, "context tokens"),
    ],
)
def test_requests_that_do_not_fit_are_refused(outline, task, options, media, message):
    with pytest.raises(UsageProblem, match=message):
        outline.check(task, ["a panda"], GenerationOptions(**options), media)


def test_the_parts_of_a_repository(converted_2):
    parts = {part.name: part for part in repository_parts(converted_2["A14B"])}
    assert parts.keys() == {
        *("adapter", "adapter_2", "mllm", "text_encoder", "transformer", "transformer_2", "vae"),
    }
    assert parts["transformer"].parameters == parts["transformer_2"].parameters
