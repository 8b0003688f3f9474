import json
import shutil

import pytest
import torch
import training
import yaml
from training_runs import base_fixture, command, data_fixture, picture, write_samples  # noqa: F401
from transformers.integrations import is_wandb_available

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.hub.model_card import TrainingSummary
from omni_video_hf.training.recipe import RECIPES, read_recipe, shipped_recipes
from omni_video_hf.training.stages import STAGES

NEEDED = ["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu", "--bf16", "false", "--report_to", "none"]


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_known_key_by_key(name):
    _, args = read_recipe(name, NEEDED)
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for key, value in written.items():
        if key not in ("bf16", "report_to"):
            assert getattr(args, key) == value, key
    assert args.lr_scheduler_type == written["lr_scheduler_type"]


def test_there_is_a_recipe_for_every_stage():
    assert {yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["stage"] for name in shipped_recipes()} == set(
        STAGES
    )


def test_the_decoder_recipe_is_upstreams():
    _, args = read_recipe("decoder", NEEDED)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (3e-6, 1e-4, 0.05)
    assert (args.warmup_steps, args.lr_scheduler_type, args.condition_dropout) == (500, "cosine", 0.2)
    assert args.per_device_train_batch_size == 2
    config = args.loss_config
    assert (config.timestep_shift, config.timestep_sampling, config.timestep_weighting) == (3.0, "uniform", "bell")


def test_the_command_line_overrides():
    words = ["--learning-rate", "1e-5", "--losses.alignment=squared_l2", "--losses.alignment_weight", "2e-1"]
    run, args = read_recipe("joint", [*NEEDED, *words, "--resume", "--part_learning_rates.decoder", "1e-6"])
    assert run.resume is True
    assert read_recipe("joint", [*NEEDED, "--save_strategy", "no"])[1].save_strategy == "no"
    assert read_recipe("lora", [*NEEDED, "--lora.use_rslora"])[1].lora["use_rslora"] is True
    assert (run.model, run.data) == ("m", "d")
    previews = "[{prompt: a fox, task: t2i, num_frames: 5}]"
    assert read_recipe("joint", [*NEEDED, "--previews", previews])[1].previews[0]["num_frames"] == 5
    assert read_recipe("joint", [*NEEDED, "--activation_checkpointing_kwargs", "{use_reentrant: false}"])
    assert args.learning_rate == 1e-5
    assert args.part_learning_rates == {"text_head": 3e-6, "decoder": 1e-6}
    assert (args.loss_config.alignment, args.loss_config.alignment_weight) == ("squared_l2", 0.2)
    assert args.loss_config.timestep_shift == 3.0


def test_wrong_recipes_are_refused(tmp_path):
    file = tmp_path / "mine.yaml"

    def refused(text, message, words=NEEDED):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(file, words)

    refused("learning_rat: 1\n", r"`mine.yaml`: unknown 'learning_rat' \(did you mean 'learning_rate'\?\)")
    refused("- a\n", "a recipe must be a mapping of settings, got list")
    refused("a: [\n", "mine.yaml: not YAML")
    refused("stage: decoder\n", "`model` is missing", [])
    refused("stage: decoder\n", "`data` is missing: set a feature cache", NEEDED[:2])
    refused("stage: decoder\n", "`output_dir` is missing", NEEDED[:4])
    refused("stage: decoder\n", r"`command line`: unknown 'stge' \(did you mean 'stage'\?\)", [*NEEDED, "--stge", "x"])
    for words, message in (
        (["--learning_rate", "fast"], "`learning_rate` must be a number, got 'fast'"),
        (["--max_steps", "1.5"], r"`max_steps` must be a whole number, got 1\.5"),
        (["--seed"], "`seed` must be a whole number, got True"),
        (["--resume", "maybe"], "`resume` must be true or false, got 'maybe'"),
        (["--bf16", "7"], "`bf16` must be true or false, got 7"),
        (["--data", "{a: b}"], r"`data` must be a text or a list \(each a text\), got \{'a': 'b'\}"),
        (["--task_weights", "{t2v: much}"], r"`task_weights` must be a mapping, got \{'t2v': 'much'\}"),
        (["--lr_scheduler_type", "cosin"], r"`lr_scheduler_type`: unknown 'cosin' \(did you mean 'cosine'\?\)"),
        (["--save_strategy", "step"], r"`save_strategy`: unknown 'step' \(did you mean 'steps'\?\)"),
        (["--losses", "flow"], "`losses` must be a mapping such as"),
        (["--losses.alignment_weight", "much"], r"`losses\.alignment_weight` must be a number, got 'much'"),
        (["--losses.alignment", "cosin"], r"`losses\.alignment`: unknown 'cosin' \(did you mean 'cosine'\?\)"),
        (["--stage", "lora", "--lora.r", "1.5"], r"`lora\.r` must be a whole number, got 1\.5"),
        (["--stage", "lora", "--lora.parts", "[decodr]"], r"`lora\.parts`: unknown 'decodr' \(did you mean"),
        (["--report_to", "tensorbord"], r"`report_to`: unknown 'tensorbord' \(did you mean 'tensorboard'\?\)"),
    ):
        refused("stage: decoder\n", message, [*NEEDED, *words])
    question = ["--previews", "[{prompt: what is it?, task: understand}]"]
    refused("stage: decoder\n", r"`--previews \[\{prompt: what is it\?, .*not YAML .*in quotes", [*NEEDED, *question])
    refused("stage: decoder\n", "settings must be passed as `--key value`", ["stage"])
    with pytest.raises(
        ValueError, match=r"no recipe of the package\. Pass a YAML file, or one of align, connect, connect_text"
    ):
        read_recipe("jont", NEEDED)


# --- data -----------------------------------------------------------------------------------------------------------


def refused(base, data, output, words, *options, exit_code=1):
    result = command(base, data, output, "decoder", *options)
    assert result.exit_code == exit_code
    assert words in " ".join(result.output.split()), result.output
    assert not list(output.glob("checkpoint-*"))


def test_all_bad_samples_are_named_before_anything_trains(base, tmp_path):
    good = [training.sample("t2v", number) for number in range(3)]
    nan = good[0]["latents"].clone()
    nan[0, 0, 0, 0] = torch.nan
    bad = [good[0] | {"latents": nan}, good[1] | {"task": "t2i"}]
    data = write_samples(tmp_path / "data", [*good, *bad])
    said = "2 problems in 5 samples: repair or remove the samples, or pass `--on_bad_data skip`"
    refused(base, data, tmp_path / "run", said)
    refused(base, data, tmp_path / "run", "`latents` contains 1 values that are NaN or infinite")
    refused(base, data, tmp_path / "run", "`latents` have 2 frames; the task 't2i' generates one image")
    skipped = command(base, data, tmp_path / "run", "decoder", "--on_bad_data", "skip", "--learning_rate", "1e-2")
    assert skipped.exit_code == 0, skipped.output
    assert TrainingSummary.read(tmp_path / "run" / "pipeline").num_samples == 3
    with pytest.raises(ValueError, match=r"row 1: `prompt_embeds_shape` is \[0, 32\], which must be 2 numbers"):
        write_samples(tmp_path / "empty", [good[0], good[1] | {"prompt_embeds": torch.zeros(0, 32)}])


def test_data_that_do_not_fit_the_stage_are_refused(base, data, tmp_path):
    said = "`report_to`: wandb is not installed (WandbCallback requires wandb"
    if not is_wandb_available():
        refused("none/none", data, tmp_path / "run", said, "--report_to", "wandb")
    said = "nowhere: is neither a folder nor a Hub repository"
    refused("nowhere", data, tmp_path / "run", said, exit_code=2)
    refused(base, tmp_path / "none", tmp_path / "run", "contains no manifest.json, so it is not a feature cache")
    questions = write_samples(tmp_path / "data", [training.sample("understand"), training.sample("t2v")])
    useless = (
        "`data`: 1 samples of the tasks understand allow none of the losses of the stage 'decoder' (flow_matching)"
    )
    refused(base, questions, tmp_path / "run", useless)
    weights = "{t2v: 1, understand: 0}"
    result = command(base, questions, tmp_path / "run", "decoder", "--task_weights", weights)
    assert result.exit_code == 0, result.output
    refused(base, data, tmp_path / "b", "`weights` has no entry for t2v, v2v", "--task_weights", "{t2i: 1}")
    refused(base, data, tmp_path / "b", "`task_weights`: unknown 't2x'", "--task_weights", "{t2x: 1}", exit_code=2)


@pytest.mark.parametrize("stage", ["align", "joint"])
def test_a_loss_that_no_sample_allows_is_refused_before_anything_is_loaded(base, data, tmp_path, stage):
    def refuse(cache, *words):
        (tmp_path / "model").mkdir(exist_ok=True)
        for path in base.iterdir():  # without its weights the model cannot be loaded
            if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith("index.json"):
                shutil.copyfile(path, tmp_path / "model" / path.name)
        result = command(tmp_path / "model", cache, tmp_path / "run", stage, *words)
        assert result.exit_code == 1
        return " ".join(result.output.split())

    said = refuse(data)
    assert f"`data`: no sample allows the answer loss of the stage '{stage}'" in said
    assert "`losses.answer_weight` is 1 and needs `labels`: compute features with `--instruction tokens`" in said
    plain = {name: value for name, value in training.sample("t2i").items() if name != "target_features"}
    said = refuse(write_samples(tmp_path / "plain", [plain]))
    assert "the answer and the alignment loss" in said
    assert "needs `target_features`: compute features with `--target-encoder`" in said
    weights = ["--task_weights", "{t2i: 1, understand: 0}"]
    mixed = write_samples(tmp_path / "mixed", [training.sample("t2i"), training.sample("understand")])
    assert "no sample allows the answer loss" in refuse(mixed, *weights)


def test_evaluation_data_that_allow_no_loss_are_refused(base, data, tmp_path):
    questions = write_samples(tmp_path / "data", [training.sample("understand")])
    said = "`eval_data`: 1 samples of the tasks understand allow none of the losses of the stage 'decoder'"
    refused(base, data, tmp_path / "run", said, "--eval_data", questions)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_from_recipe_to_pipeline_and_its_resumption(base, data, tmp_path):
    output = tmp_path / "run"
    evaluation = ["--eval_data", data, "--eval_strategy", "steps", "--eval_steps", "4"]
    result = command(
        base,
        data,
        output,
        "decoder",
        *evaluation,
        "--learning_rate",
        "1e-2",
        "--preview_steps",
        "4",
        "--previews",
        "[{prompt: a fox, task: t2i}]",
    )
    assert result.exit_code == 0, result.output
    assert str(output / "pipeline") in result.output
    assert (output / "previews" / "step-000004.png").is_file()
    trained, untrained = (OmniVideoPipeline.from_pretrained(folder) for folder in (output / "pipeline", base))
    assert not torch.allclose(picture(trained), picture(untrained), atol=1e-3)
    for name, parameter in trained.transformer.named_parameters():
        assert not torch.equal(parameter, dict(untrained.transformer.named_parameters())[name])
    for name, parameter in trained.mllm.named_parameters():
        assert torch.equal(parameter, dict(untrained.mllm.named_parameters())[name])

    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["eval_flow_matching_loss_v2v"] > 0
    assert history[-1]["step"] == 4

    again = command(base, data, output, "decoder")
    assert again.exit_code == 1
    assert "contains checkpoint-4 of an earlier run: pass `--resume`" in " ".join(again.output.split())
    longer = command(base, data, output, "decoder", "--resume", "--max_steps", "6")
    assert longer.exit_code == 0, longer.output
    assert (output / "checkpoint-6").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_runs(name, base, data, tmp_path):
    output = tmp_path / "run"
    if name in ("align", "joint"):
        data = write_samples(
            tmp_path / "data",
            [training.instructed("v2v", 0), training.instructed("t2i", 1), training.sample("understand")],
        )
    elif name == "understand":
        data = write_samples(tmp_path / "data", [training.sample("understand", number) for number in range(3)])
    result = command(base, data, output, name, "--learning_rate", "1e-2", "--max_steps", "6")
    assert result.exit_code == 0, result.output
    trained, untrained = (OmniVideoPipeline.from_pretrained(folder) for folder in (output / "pipeline", base))
    changed = {
        part
        for part in ("mllm", "adapter", "transformer")
        for parameter, other in zip(
            getattr(trained, part).parameters(), getattr(untrained, part).parameters(), strict=True
        )
        if not torch.equal(parameter, other)
    }
    parts = {
        "align": {"mllm"},
        "connect": {"adapter"},
        "connect_text": {"adapter"},
        "decoder": {"adapter", "transformer"},
        "edit": {"adapter", "transformer"},
        "edit_lora": {"transformer"},
        "understand": {"mllm"},
    }
    summary = TrainingSummary.read(output / "pipeline")
    assert (summary.steps, summary.datasets, summary.hardware) == (6, [data.name], "1 x CPU")
    assert summary.losses["loss"] > 0
    assert changed == parts.get(name, {"mllm", "adapter", "transformer"})
    if name == "lora":
        untrained.load_lora_weights(output / "lora")
        assert torch.allclose(picture(untrained), picture(trained), atol=1e-3)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"the alias `\*a` is not allowed"),
        ("a: &a {stage: align}\nlosses: {<<: [*a, *a]}\n", r"the alias `\*a` is not allowed"),
        ("losses: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("seed: \x00", "not YAML"),
    ],
)
def test_a_recipe_that_asks_for_endless_work_is_one_error(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(path, NEEDED)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_override_that_asks_for_endless_work_is_one_error():
    for text in ("[" * 3000 + "]" * 3000, "[&a x, *a]"):
        with pytest.raises(ValueError, match="`--losses"):
            read_recipe("align", [*NEEDED, "--losses", text])
