"""`omni-video train` beside training: settings in its help, what is refused, and checkpoints as pipelines."""

from dataclasses import MISSING, fields

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import base_fixture, command, data_fixture, picture, write_samples  # noqa: F401
from typer.testing import CliRunner

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.cli.main import app
from omni_video_hf.cli.train_help import settings_of_runs
from omni_video_hf.training.arguments import OmniVideoTrainingArguments
from omni_video_hf.training.recipe import RunArguments


def omni_video(*words):
    return CliRunner().invoke(app, list(map(str, words)))


# --- help -----------------------------------------------------------------------------------------------------------


def test_the_help_has_every_setting_with_type_default_and_explanation():
    read = {setting.name: setting for settings in settings_of_runs().values() for setting in settings}
    known = {f.name: f for kind in (RunArguments, OmniVideoTrainingArguments) for f in fields(kind) if f.init}
    assert set(read) == set(known)
    for name, setting in read.items():
        assert setting.help or name in ("remove_unused_columns", "ddp_find_unused_parameters"), name
        default = known[name].default
        if default is not MISSING and isinstance(default, (int, float, str)) and type(default) in (int, float, str):
            assert setting.default in (repr(default), "chosen by installed versions"), name
    shown = omni_video("train", "--help")
    assert shown.exit_code == 0
    assert "--condition_dropout  float = 0.2" in shown.output
    assert "probability per sample, 0..1, that instruction and prompt are both replaced" in shown.output
    assert all(f"--{name}  " in shown.output for name in known)
    assert "--export" in shown.output


def test_a_recipe_is_asked_for():
    result = omni_video("train", "--output_dir", "run")
    assert result.exit_code != 0
    assert "`--config` is missing: pass a recipe" in result.output


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["decoder", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_checkpoint_becomes_the_pipeline_that_the_run_would_have_written(stage, base, data, tmp_path):
    settings = ["--learning_rate", "1e-2", "--ema_decay", "0.5", "--lr_scheduler_type", "constant"]
    run = command(base, data, tmp_path / "run", stage, *settings, "--max_steps", "4")
    assert run.exit_code == 0, run.output
    for step in (2, 4):
        done = omni_video("train", "--export", tmp_path / "run" / f"checkpoint-{step}", tmp_path / f"{step}")
        assert done.exit_code == 0, done.output
        assert str(tmp_path / f"{step}") in done.output
    for component in ("mllm", "adapter", "transformer", "vae", "text_encoder"):
        for file in (tmp_path / "run" / "pipeline" / component).glob("*.safetensors"):
            before, after = load_file(file), load_file(tmp_path / "4" / component / file.name)
            assert all(torch.equal(value, after[name]) for name, value in before.items())
    if stage == "lora":
        name = "lora/pytorch_lora_weights.safetensors"
        before, after = load_file(tmp_path / "run" / name), load_file(tmp_path / "4" / name)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    pipes = [OmniVideoPipeline.from_pretrained(folder) for folder in (tmp_path / "2", tmp_path / "4", base)]
    first, last, untrained = map(picture, pipes)
    assert not torch.equal(first, last)
    assert not torch.equal(first, untrained)


def test_what_cannot_be_exported_is_refused_with_the_checkpoints_that_can(base, data, tmp_path):
    assert command(base, data, tmp_path / "run", "decoder").exit_code == 0

    def refused(*words):
        result = omni_video("train", "--export", *words)
        assert result.exit_code != 0
        return " ".join(result.output.split()).replace(" ", "")

    place = tmp_path / "run"
    listed = f"Completeare:{place}/checkpoint-2,{place}/checkpoint-4."
    assert listed in refused(place / "checkpoint-3", tmp_path / "out")
    assert "nosuchfolder" in refused(place / "checkpoint-3", tmp_path / "out")
    assert listed in refused(place, tmp_path / "out")
    assert "existsandisnotanemptyfolder" in refused(place / "checkpoint-4", place)
    assert "Itdoesnotaccept--learning_rate" in refused(
        place / "checkpoint-4", tmp_path / "out", "--learning_rate", "1"
    )
    assert "--exportRUN/checkpoint-NDIR" in refused(place / "checkpoint-4")
    assert not (tmp_path / "out").exists()


# --- questions alone, previews --------------------------------------------------------------------------------------


def test_questions_train_without_a_cache(base, tmp_path):
    table = tmp_path / "questions.jsonl"
    table.write_text('{"task": "understand", "question": "what?", "answer": "a fox"}\n' * 3)
    words = ["--model", base, "--questions", table, "--output_dir", tmp_path / "run", "--use_cpu", "--bf16", "false"]
    words += ["--max_steps", "2", "--warmup_steps", "0", "--report_to", "none", "--learning_rate", "1e-2"]
    result = omni_video("train", "--config", "understand", *words, "--disable_tqdm")
    assert result.exit_code == 0, result.output
    before, after = (load_file(f / "mllm" / "model.safetensors") for f in (base, tmp_path / "run" / "pipeline"))
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == {"mllm.lm_head.weight"}


@pytest.mark.slow
def test_previews_are_shown_in_tensorboard(base, data, tmp_path):
    previews = "[{prompt: a fox, task: t2i}, {prompt: 'what?', task: understand, max_new_tokens: 2}]"
    words = ["--previews", previews, "--preview_steps", "2", "--report_to", "tensorboard"]
    result = command(base, data, tmp_path, "decoder", *words)
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.rglob("events.out*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Images("previews/0")] == [2, 4]
    assert events.Images("previews/0")[0].width == 64
    assert [event.step for event in events.Tensors("previews/1/text_summary")] == [2, 4]


def test_wrong_previews_are_named_before_anything_is_loaded(tmp_path):
    words = ["--model", tmp_path, "--data", "d", "--output_dir", tmp_path / "run", "--use_cpu", "--bf16", "false"]

    def refused(previews):
        result = omni_video("train", "--config", "decoder", *words, "--preview_steps", "1", "--previews", previews)
        assert result.exit_code != 0
        return " ".join(result.output.split())

    assert "`previews[0]`: unknown 'promt' (did you mean 'prompt'?)" in refused("[{promt: a fox}]")
    assert "`previews[0].task`: unknown 't2x'" in refused("[{prompt: a fox, task: t2x}]")
    said = refused("[{prompt: a fox}, {prompt: b, task: i2i, image: none.png}]")
    assert "`previews[1].image` none.png: no such file" in said
