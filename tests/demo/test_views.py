"""HTML of the page."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from omni_video_hf import OmniVideoPipelineOutput
from omni_video_hf.demo import views
from omni_video_hf.demo.files import Comparison
from omni_video_hf.demo.runner import Cancelled, Started, Step, Waiting

EVIL = "<script>alert(1)</script> \" ' ${alert(2)} {{this}} `x`"
OUTPUT = OmniVideoPipelineOutput(
    frames=[[]],
    task="v2v",
    fps=8,
    settings={
        "prompt": EVIL,
        "seed": 7,
        "width": 64,
        "height": 48,
        "num_frames": 17,
        "fps": 8,
        "num_inference_steps": 20,
    },
    notes=["The source was resized."],
)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.mark.parametrize(
    ("event", "words", "value"),
    [
        (None, "Starting", None),
        (Started(), "Reading the prompt and the source", None),
        (Waiting(1), "Waiting for 1 other call", None),
        (Waiting(3), "Waiting for 3 other calls", None),
        (Step(1, 20), "Step 1 of 20", "0.050"),
        (Step(7, 20, 12.6), "Step 7 of 20, about 13 s left", "0.350"),
        (Step(7, 20, 600.0), "Step 7 of 20, about 10 min left", "0.350"),
        (Step(20, 20, 0.0), "Step 20 of 20, decoding", "1.000"),
    ],
)
def test_progress_says_what_happens_and_how_long(event, words, value):
    elements = Elements(views.progress(event))
    assert words in "".join(elements.words)
    (bar,) = elements.of("progress")
    assert bar.get("value") == value
    assert bar["aria-label"]
    assert {"role": "status"} in elements.of("p")


def test_progress_keeps_the_last_preview():
    image = Image.new("RGB", (8, 8))
    (shown,) = Elements(views.progress(Step(2, 4), image)).of("img")
    assert shown["alt"] == "Preview"
    assert shown["src"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    "html",
    [
        views.result("/tmp/a.mp4", OUTPUT, 3.0),  # noqa: S108
        views.result("/tmp/a.png", OUTPUT, 3.0),  # noqa: S108
        views.failure(EVIL),
        views.placeholder(EVIL),
        views.answer(EVIL, OmniVideoPipelineOutput(text=[EVIL], task="understand"), 1.0),
        views.comparison(
            Comparison(Path("/tmp/s.mp4"), Path("/tmp/r.mp4"), Path("/tmp/d.mp4"), "video"),  # noqa: S108
            OUTPUT,
            3.0,
            "view-1",
        ),
    ],
)
def test_texts_of_visitors_are_no_code(html):
    elements = Elements(html)
    assert not elements.of("script")
    assert not set("{}$`") & set(html.replace("this.value + '%'", ""))
    labels = [attributes.get("aria-label", attributes.get("alt")) for _, attributes in elements.found]
    assert any(EVIL in str(text) for text in (*labels, "".join(elements.words)))


def test_every_picture_and_control_has_a_name():
    html = views.comparison(Comparison(Path("s.png"), Path("r.png"), Path("d.png"), "image"), OUTPUT, 3.0, "view-1")
    elements = Elements(html)
    assert len(elements.of("img")) == 5
    assert all(picture["alt"] for picture in elements.of("img"))
    radios = [entry for entry in elements.of("input") if entry["type"] == "radio"]
    assert [radio["id"] for radio in radios] == [label["for"] for label in elements.of("label")]
    assert {radio["name"] for radio in radios} == {"view-1"}
    (slider,) = [entry for entry in elements.of("input") if entry["type"] == "range"]
    assert slider["aria-label"]


def test_a_caption_has_size_length_steps_seed_and_notes():
    words = "".join(Elements(views.caption(OUTPUT, 3.14)).words)
    for expected in (
        "64\u00d748",
        "17 frames at 8 per second",
        "20 steps",
        "seed 7",
        "3.1 s",
        "The source was resized.",
    ):
        assert expected in words


def test_a_cancelled_call_says_where_it_stopped():
    assert "Cancelled after step 3." in views.cancelled(Cancelled(3))
    assert "Cancelled before it began." in views.cancelled(Cancelled(0))
