"""The page and its API, without a browser."""

import os
import re

import numpy as np
import pytest
import tiny

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")

from gradio.utils import get_upload_folder  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from omni_video_hf import OmniVideoPipeline  # noqa: E402
from omni_video_hf.demo.api import _uploaded  # noqa: E402
from omni_video_hf.demo.launch import make_demo  # noqa: E402
from omni_video_hf.demo.style import CSS, SCRIPT, theme  # noqa: E402
from omni_video_hf.media import load_image, read_media_record  # noqa: E402
from omni_video_hf.shapes import CHECKPOINT, Scene, read_scene  # noqa: E402


@pytest.fixture(scope="module")
def demo():
    pipe = tiny.pipeline(max_context_length=160)
    return make_demo(pipe, "lab/tiny")


def test_nothing_is_loaded_from_other_servers(demo):
    assert theme()._stylesheets == []
    assert not re.findall(r"url\((?![\"']?data:)|@import", theme()._get_theme_css())
    assert not re.findall(r"https?://|url\(|@import", CSS + SCRIPT)
    assert demo.blocks.analytics_enabled is False


def test_the_page_names_the_model_and_every_text_field_has_a_label(demo):
    components = demo.blocks.config["components"]
    assert any("lab/tiny" in str(each["props"].get("value")) for each in components)
    fields = ("textbox", "number", "radio", "checkbox", "file", "gallery", "chatbot", "multimodaltextbox")
    unlabelled = [each for each in components if each["type"] in fields and not each["props"].get("label")]
    assert not unlabelled


def test_clients_see_four_endpoints_with_named_arguments(demo):
    endpoints = demo.blocks.get_api_info()["named_endpoints"]
    assert set(endpoints) == {"/create", "/edit", "/ask", "/cancel"}
    names = [parameter["parameter_name"] for parameter in endpoints["/create"]["parameters"]]
    assert names == ["prompt", "kind", "seed", "settings"]
    assert endpoints["/create"]["parameters"][1]["parameter_default"] == "video"


def test_a_pipeline_that_cannot_generate_is_refused():
    pipe = tiny.pipeline()
    pipe.register_modules(vae=None)
    with pytest.raises(ValueError, match="cannot generate"):
        make_demo(pipe)


@pytest.fixture(scope="module")
def address():
    """A served page. An address of the environment is one that a developer serves already."""
    if "OMNI_VIDEO_DEMO_ADDRESS" in os.environ:
        yield os.environ["OMNI_VIDEO_DEMO_ADDRESS"]
        return
    demo = make_demo(OmniVideoPipeline.from_pretrained(CHECKPOINT))
    _, local, _ = demo.launch(prevent_thread_lock=True)
    yield local
    demo.blocks.close(verbose=False)


@pytest.mark.slow
def test_a_client_creates_edits_and_asks(address, tmp_path):
    client = Client(address, download_files=str(tmp_path), verbose=False)
    file, record = client.predict("a large red circle on a white background", "image", 0, api_name="/create")
    right = read_scene(np.asarray(load_image(file))).right(Scene("red", "circle", "large", "white"))
    assert [name for name, is_right in right.items() if not is_right] == ["motion"]  # an image has none
    assert (record["seed"], record["task"]) == (0, "t2i")
    assert read_media_record(file)["seed"] == 0
    edited, record = client.predict(handle_file(file), "make it blue", 0, api_name="/edit")
    assert record["task"] == "i2i"
    assert read_scene(np.asarray(load_image(edited))).color == "blue"
    assert client.predict(handle_file(edited), "what color is it?", 0, api_name="/ask") == "blue"


@pytest.mark.slow
def test_a_client_gets_the_sentence_of_an_error(address):
    client = Client(address, verbose=False)
    with pytest.raises(AppError, match="The prompt is empty"):
        client.predict("  ", api_name="/create")
    with pytest.raises(AppError, match="`settings` may have preset"):
        client.predict("a fox", settings={"colour": 1}, api_name="/create")


@pytest.mark.parametrize("source", ["/etc/hostname", "{uploads}/../other.png", "https://example.com/a.png", None])
def test_a_client_cannot_name_files_of_the_server_or_addresses(tmp_path, source):
    path = source and source.format(uploads=get_upload_folder())
    with pytest.raises(ValueError, match="must be a file that the client sends"):
        _uploaded({"path": path}, tmp_path)
    assert _uploaded({"path": str(tmp_path / "result.png")}, tmp_path) == str(tmp_path / "result.png")


@pytest.mark.slow
def test_two_clients_at_once_get_their_own_results_and_cancel_only_their_own(address, tmp_path):
    clients = [Client(address, download_files=str(tmp_path / str(n)), verbose=False) for n in range(2)]
    prompts = ["a large red circle on a white background", "a small blue triangle on a black background"]
    jobs = [
        client.submit(prompt, "image", 0, api_name="/create") for client, prompt in zip(clients, prompts, strict=True)
    ]
    scenes = [read_scene(np.asarray(load_image(job.result()[0]))) for job in jobs]
    assert [(scene.color, scene.shape) for scene in scenes] == [("red", "circle"), ("blue", "triangle")]
    slow = clients[0].submit(prompts[0], "image", 0, {"num_inference_steps": 100000}, api_name="/create")
    quick = clients[1].submit(prompts[1], "image", 0, api_name="/create")
    while clients[0].predict(api_name="/cancel") == 0:
        pass
    with pytest.raises(AppError, match="cancelled"):
        slow.result()
    assert read_scene(np.asarray(load_image(quick.result()[0]))).color == "blue"
