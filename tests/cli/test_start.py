"""How the command starts and ends: what it imports, its exit codes, Ctrl-C, and access tokens."""

import io
import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import client_env, hub_server_fixture  # noqa: F401
from safetensors.torch import save_file

import omni_video_hf
from omni_video_hf.cli import checks as cli_checks
from omni_video_hf.cli import main as cli
from omni_video_hf.media import images, video_writer
from omni_video_hf.media import record as media_record
from omni_video_hf.pipelines.memory.profiles import PROFILES
from omni_video_hf.shapes import CHECKPOINT
from omni_video_hf.utils.masking import MASK, MaskedStream, MaskingFilter, clean_token, mask_tokens

TOKEN = "hf_" + "aB3" * 11 + "x"
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "numpy", "PIL", "av")
REPORT = """
import sys
sys.argv = ["omni-video", *{arguments!r}]
from omni_video_hf.__main__ import main
try:
    main()
finally:
    sys.stderr.write("imported: " + " ".join(name for name in {heavy!r} if name in sys.modules) + "\\n")
"""


def start(*arguments, heavy=HEAVY, stdin="", before="", env=None):
    code = before + REPORT.format(arguments=[*map(str, arguments)], heavy=heavy)
    options = {"input": stdin, "capture_output": True, "text": True, "env": env}
    # Where these tests run in the background of a shell, Ctrl-C is ignored, and child processes inherit that.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    done = subprocess.run([sys.executable, "-c", code], check=False, **options)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("imported:")]
    imported = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("imported:")]
    return done, lines, imported[0] if imported else None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, ["generate", "precompute"]),
        (["--version"], 0, [omni_video_hf.__version__]),
        (["generate", "--help"], 0, ["--guidance-scale"]),
        (["train", "--help"], 0, ["--config"]),
        (["eval", "shapes", "--help"], 0, ["--count"]),
        (["generate", "a", "--nothing"], 2, ["No such option: --nothing", "omni-video generate --help"]),
        (["generate", "a", "--fps", "nan"], 2, ["--fps nan"]),
        (["generate", "a", "-o", "x.avi"], 2, ["suffix"]),
        (["edit", "nothing.mp4", "a"], 2, ["`SOURCE` nothing.mp4: no such file"]),
        ([], 2, ["Usage: omni-video"]),
    ],
)
def test_what_needs_no_model_imports_no_library(tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    done, _, imported = start(*arguments)
    assert done.returncode == code, done.stderr
    assert all(word in done.stdout + done.stderr for word in words)
    assert imported == []
    assert list(tmp_path.iterdir()) == []


def test_completion_imports_no_library(tmp_path):
    words = {"_OMNI_VIDEO_COMPLETE": "complete_bash", "COMP_WORDS": "omni-video gen", "COMP_CWORD": "1"}
    before = f"import os\nos.environ.update({words!r})\n"
    done, _, imported = start(before=before)
    assert done.stdout.strip() == "generate"
    assert imported == []


def test_info_of_a_folder_imports_no_library():
    done, _, imported = start("info", CHECKPOINT, "--json")
    assert {part["name"] for part in json.loads(done.stdout)} >= {"mllm", "vae", "transformer"}
    assert imported == []


def test_the_package_has_every_name_it_promises():
    assert set(omni_video_hf._HOMES) | {"__version__"} == set(omni_video_hf.__all__)
    for name in omni_video_hf.__all__:
        assert getattr(omni_video_hf, name) is not None
        assert name in dir(omni_video_hf)
    with pytest.raises(AttributeError, match="nothing"):
        _ = omni_video_hf.nothing


def test_what_the_command_knows_without_importing_it_is_right():
    assert [member.value for member in cli.Memory] == list(PROFILES)
    assert cli_checks.FPS_RANGE == video_writer.FPS_RANGE
    assert media_record.KEY == images.METADATA_KEY


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------

INTERRUPT = """
import signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            {action}
sys.meta_path.insert(0, Finder())
"""
SWALLOWED = """try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("numpy.core.multiarray failed to import")"""


@pytest.mark.parametrize(
    "module", ["omni_video_hf.hub.remote_code", "typer", "omni_video_hf.hub.inspection", "rich.table"]
)
@pytest.mark.parametrize("action", ["signal.raise_signal(signal.SIGINT)", SWALLOWED])
def test_ctrl_c_is_one_line_whatever_is_being_imported(module, action):
    done, lines, _ = start("info", CHECKPOINT, "--json", before=INTERRUPT.format(module=module, action=action))
    assert done.returncode == 130
    assert lines[-1] == "error: interrupted"
    assert "Traceback" not in done.stderr
    assert len(lines) == 1
    assert done.stdout == ""


# --- access tokens --------------------------------------------------------------------------------------------------


def test_tokens_are_masked():
    assert mask_tokens(f"a {TOKEN}, 'Bearer {TOKEN}\\n'") == f"a {MASK}, 'Bearer {MASK}\\n'"
    assert mask_tokens("hf_hub_download of hf_transfer, my_hf_model") == "hf_hub_download of hf_transfer, my_hf_model"
    stream = io.StringIO()
    masked = MaskedStream(stream)
    print(TOKEN, file=masked)
    masked.writelines([TOKEN, "\n"])
    assert stream.getvalue() == f"{MASK}\n{MASK}\n"
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(MaskingFilter())
    logger = logging.Logger("omni-video-test")
    logger.addHandler(handler)
    try:
        raise ValueError(TOKEN)
    except ValueError:
        logger.exception("with %s", TOKEN)
    assert TOKEN not in stream.getvalue()
    assert stream.getvalue().count(MASK) >= 2


def test_a_token_is_stripped_or_refused_without_repeating_it():
    assert clean_token(f" {TOKEN}\r\n") == TOKEN
    assert clean_token(None) is None
    assert clean_token(" \n") is None
    for broken in (f"{TOKEN}\n{TOKEN}", f"{TOKEN} x", f"{TOKEN}é"):
        with pytest.raises(ValueError, match="one word") as caught:
            clean_token(broken)
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", TOKEN, "lab/model"], "neither a folder nor a Hub repository"),
        (["push", ".", TOKEN], "must be a Hub repository"),
        (["info", TOKEN], "neither a folder nor a Hub repository"),
        (["info", ".", TOKEN], "unexpected extra argument"),
        (["info", "lab/model", f"--{TOKEN}"], "No such option"),
        (["info", "lab/model", "--token", f"{TOKEN} {TOKEN}"], "one word"),
        (["generate", "a", "-m", TOKEN], "neither a folder nor a Hub repository"),
        (["generate", "a", "--steps", TOKEN], "--steps"),
        (["generate", "a", "--lora", TOKEN], "--lora"),
        (["generate", "a", "-o", f"{TOKEN}.avi"], "suffix"),
    ],
)
@pytest.mark.parametrize("verbose", [False, True])
def test_swapped_arguments_do_not_print_a_token(tmp_path, monkeypatch, capsys, arguments, message, verbose):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["omni-video", *arguments, *(["--verbose"] if verbose else [])])
    assert cli.run() == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert TOKEN not in re.sub(r"\s", "", printed.out + printed.err)
    assert verbose or len(printed.err.splitlines()) == 1


def test_a_token_with_a_line_end_works(hub_server, tmp_path):
    save_file({"a.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    files = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
    hub_server.add_repo("lab/private", files, private=True)
    for token in (hub_server.token + "\n", f" {hub_server.token}\r\n"):
        done, lines, _ = start("info", "lab/private", "--json", env=client_env(hub_server, token))
        assert done.returncode == 0, lines
        assert [part["parameters"] for part in json.loads(done.stdout)] == [3]
        done, lines, _ = start("info", "lab/nothing", "--verbose", env=client_env(hub_server, token))
        assert done.returncode == 1
        assert hub_server.token not in done.stdout + done.stderr


# --- repositories ---------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_reported_without_a_request_to_the_hub(hub_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("file.txt").touch()
    for name, message in (
        ("run/pipeline", "no pipeline in it"),
        ("./run/pipeline", "there is no such folder"),
        ("run/pipeline/x", "there is no such folder"),
        ("run/pipeline/", "there is no such folder"),
        ("file.txt", "cannot be read as an image or video"),
    ):
        done, lines, imported = start("info", name, env=client_env(hub_server))
        assert done.returncode == (1 if name == "file.txt" else 2)
        assert message in lines[-1]
        assert "torch" not in imported
    assert hub_server.requests == []
