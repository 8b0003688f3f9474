"""Runs what README and model cards show, as it stands there, against a tiny repository of the same layout."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from golden import DATA
from hub_cards import card_problems
from hub_server import hub_server_fixture, run_client  # noqa: F401
from raw_data import write_jsonl
from strangers import WITHOUT_PACKAGE

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.pipelines.presets import PRESETS
from omni_video_hf.training.recipe import read_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
CARD = (ROOT / "model_cards" / "omni-video-11b.md").read_text()
OWNER, MODEL = "lab", "omni-video-11b"
NOT_HERE = ("make demo", "pip install -e .")
TESTED_WITH_THE_CONVERTER = ("python -m conversion --original omni_ckpts --output omni-video-11b",)
NEEDS_GPU = "pipe.enable_model_cpu_offload()\n"
SHORT_RUN = "--use_cpu --bf16 false --warmup_steps 0 --per_device_train_batch_size 1"
SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}


def snippets(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    return [line for block in snippets(text, "bash") for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the reader is: the model under its name, a clip, a table."""
    pipe = tiny.pipeline(vision_width=32, max_context_length=2560)
    pipe.register_to_config(presets={task: preset | SMALL for task, preset in pipe.config.presets.items()})
    pipe.save_pretrained(tmp_path / MODEL)
    shutil.copy(DATA / "bigbuckbunny.mp4", tmp_path / "fox.mp4")
    write_jsonl(tmp_path / "data.jsonl", *({"task": "t2v", "prompt": str(n), "media": "fox.mp4"} for n in range(2)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(server, code, prelude=""):
    """Python as a document has it, in a fresh process."""
    owned = code.replace("OWNER", OWNER).replace(NEEDS_GPU, "")
    owned = owned.replace('memory="16GB"', 'memory="16GB", memory_device="cpu"')
    return run_client(prelude + owned, server)


def test_the_readmes_python_runs(folder, hub_server):
    hub_server.add_repo(f"{OWNER}/{MODEL}", folder / MODEL)
    pipe = OmniVideoPipeline.from_pretrained(folder / MODEL)
    make_lora = """
import torch
from peft import LoraConfig
from omni_video_hf import OmniVideoPipeline, collect_lora_layers
pipe = OmniVideoPipeline.from_pretrained("omni-video-11b")
pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
pipe.save_lora_weights("lora", **collect_lora_layers(pipe))
"""
    run(hub_server, make_lora)
    hub_server.add_repo(f"{OWNER}/fox-lora", folder / "lora")
    blocks = snippets(README, "python")
    assert len(blocks) == 6
    run(hub_server, "\n".join(blocks))
    assert "README.md" in hub_server.repos[f"{OWNER}/omni-video-foxes"].find("main").files
    assert pipe.config.presets["t2v"]["num_frames"] == SMALL["num_frames"]


def test_the_readmes_commands_run(folder, hub_server):
    lines = [line for line in commands(README) if line not in NOT_HERE + TESTED_WITH_THE_CONVERTER]
    assert all(line.startswith("omni-video ") for line in lines)
    for line in lines:
        words = shlex.split(line.replace("OWNER", OWNER))
        if words[1] == "train":
            words = [word.replace("1000", "1") for word in words] + shlex.split(SHORT_RUN)
        if words[1] == "eval":
            words += ["--count", "1"]
        code = f"import sys\nsys.argv = {words!r}\nfrom omni_video_hf.cli.main import main\nsys.exit(main())"
        if words[1] == "generate":  # a clip of this size is no source for what comes next
            (folder / "fox.mp4").rename(folder / "real.mp4")
        run_client(code, hub_server)
        if words[1] == "generate":
            (folder / "real.mp4").replace(folder / "fox.mp4")
    made = {"circle.mp4", "blue.mp4", "scores", "fox.mp4", "autumn.mp4", "fox-tuned.mp4"}
    assert made <= {path.name for path in folder.iterdir()}
    assert set(hub_server.repos) == {f"{OWNER}/{MODEL}"}


def test_the_cards_python_runs_without_the_package(folder, hub_server):
    assert card_problems(CARD) == ([], [])
    hub_server.add_repo(f"{OWNER}/{MODEL}", folder / MODEL)
    run(hub_server, "\n".join(snippets(CARD, "python")), WITHOUT_PACKAGE)


def test_the_cards_settings_are_the_presets():
    for task, preset in PRESETS.items():
        size, fps = f"{preset['width']}x{preset['height']}", f"{preset['fps']} " if preset["fps"] else ""
        numbers = [preset[name] for name in ("num_inference_steps", "guidance_scale", "flow_shift")]
        row = f"| {task} | {size} | {preset['num_frames']} | {fps}| {' | '.join(map(str, numbers))} |"
        assert row in CARD


def test_the_training_pages_settings_and_commands_are_read(tmp_path):
    """Running them is the work of tests/training/test_recipe.py."""
    needed = [
        "--model",
        "m",
        "--data",
        "d",
        "--output_dir",
        "o",
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
    ]
    settings = {name: value for block in snippets(TRAINING, "yaml") for name, value in yaml.safe_load(block).items()}
    assert {"data", "previews", "task_weights"} <= settings.keys()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stage": "joint", "preview_steps": 500} | settings))
    run, arguments = read_recipe(tmp_path / "mine.yaml", needed)
    assert (run.task_weights, len(arguments.previews)) == (settings["task_weights"], 3)
    for line in commands(TRAINING):
        words = shlex.split(line.partition(" train ")[2].replace("...", ""))
        assert words[0] == "--config"
        read_recipe(words[1], [*needed, *words[2:]])
    (python,) = snippets(TRAINING, "python")
    names = dict.fromkeys(["data", "collate", "sampler"]) | {"model": tiny.model(enable_mllm=False)}
    (tmp_path / "run").mkdir()
    code = python.replace('"run"', repr(str(tmp_path / "run"))).replace("trainer.train()", "")
    exec(compile(code, "docs/training.md", "exec"), names)  # noqa: S102 - the page's own
    assert names["trainer"].args.max_steps == 1000
