"""The commands `demo` and `push-space`: what they refuse before a model is loaded."""

import socket

import pytest
from typer.testing import CliRunner

from omni_video_hf.cli import demo
from omni_video_hf.cli.main import app


def refused(words, *arguments, code=2):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    assert words in line
    assert "Traceback" not in line


def test_a_port_in_use_is_named_before_the_model_is_loaded():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(f"`--port {port}` cannot be used", "demo", "--port", port)


def test_a_missing_gradio_names_what_to_install(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    refused("pip install 'omni-video-hf[demo]'", "demo", code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--memory", "3GB"], "must be one of 24GB, 16GB, 12GB, 8GB"),
        (["demo", "--model", "no-such-folder"], "neither a folder nor a Hub repository"),
        (["push-space", "demo"], "`TARGET` must be a Space on the Hub, `owner/name`, got demo."),
        (["push-space", "lab/demo", "--model", "nothing"], "neither a folder nor a Hub repository"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    refused(words, *arguments)


def test_a_space_cannot_load_a_folder_of_this_machine(tmp_path):
    refused("which a Space cannot read", "push-space", "lab/demo", "--model", tmp_path)
