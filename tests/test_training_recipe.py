import json

import pytest
import tiny
import torch
import training
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.cli import app
from omni_video_hf.model_card_omni_video import TrainingSummary
from omni_video_hf.training.feature_folder import FeatureFolder, SameShapeBatches, stack_samples
from omni_video_hf.training.recipe import RECIPES, read_recipe, shipped_recipes
from omni_video_hf.training.stages import STAGES

NEEDED = ["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu", "--bf16", "false", "--report_to", "none"]


def write_samples(folder, samples):
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        tensors = {key: value.contiguous() for key, value in sample.items() if key != "task"}
        if "pixel_values" in tensors:
            tensors["pixel_values"] = tensors["pixel_values"][None]
        save_file(tensors, folder / f"{number:03d}.safetensors", {"task": sample["task"]})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    samples = [training.sample(task, number) for task in ("t2i", "t2v", "v2v") for number in range(3)]
    return write_samples(tmp_path_factory.mktemp("samples"), samples)


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
    refused("- a\n", "a recipe is a mapping of settings, got list")
    refused("a: [\n", "mine.yaml: not YAML")
    refused("stage: decoder\n", "`model` is missing", [])
    refused("stage: decoder\n", "`output_dir` is missing", NEEDED[:4])
    refused("stage: decoder\n", r"`command line`: unknown 'stge' \(did you mean 'stage'\?\)", [*NEEDED, "--stge", "x"])
    refused("stage: decoder\n", "settings are given as `--key value`", ["stage"])
    with pytest.raises(ValueError, match=r"no recipe of the package \(align, connect, connect_text"):
        read_recipe("jont", NEEDED)


# --- data -----------------------------------------------------------------------------------------------------------


def test_batches_are_of_one_shape_and_order_is_of_seed_and_epoch(data):
    folder = FeatureFolder(data)
    assert folder.is_precomputed
    sampler = SameShapeBatches(folder, 2, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == len(sampler) == 6
        assert sorted(index for batch in orders[-1] for index in batch) == list(range(9))
    assert orders[0] == orders[2] != orders[1]
    for batch in orders[0]:
        stacked = stack_samples([folder[index] for index in batch])
        assert stacked["latents"].shape[0] == len(batch)
        assert {folder.tasks[index] for index in batch} == {stacked["task"]}


def test_rounds_are_of_one_shape_for_all_processes(tmp_path):
    samples = [training.sample(task, number) for task, count in (("t2i", 7), ("v2v", 5)) for number in range(count)]
    folder = FeatureFolder(write_samples(tmp_path, samples))
    sampler = SameShapeBatches(folder, 2, seed=0, num_processes=2)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 6
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert len({folder.tasks[index] for index in first + second}) == 1
    # Seven make two rounds, the last of two and one; of five one is left over.
    assert sorted(map(len, batches)) == [1, 2, 2, 2, 2, 2]
    assert len({index for batch in batches for index in batch}) == 11
    with pytest.raises(ValueError, match=r"5 samples of v2v have the shapes .* fewer than the 6 processes"):
        SameShapeBatches(folder, 2, seed=0, num_processes=6)


def test_samples_that_do_not_stack_are_refused():
    with pytest.raises(ValueError, match=r"one task and size, got .*t2i.*t2v.* Use a batch sampler"):
        stack_samples([training.sample("t2i"), training.sample("t2v")])


def test_all_bad_files_are_named_at_the_start(tmp_path):
    good = training.sample("t2v")
    write_samples(tmp_path, [good, good | {"task": "t2x"}, {"task": "t2v", "latents": good["latents"]}])
    save_file({"latent": torch.zeros(1)}, tmp_path / "x.safetensors", {"task": "t2v"})
    save_file({"latents": torch.zeros(1, 2)}, tmp_path / "y.safetensors", {"task": "t2v"})
    (tmp_path / "z.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="5 of 6 files are no samples") as error:
        FeatureFolder(tmp_path)
    for words in (
        "001.safetensors: the task is 't2x'",
        "002.safetensors: neither `input_ids` nor `mllm_hidden_states`",
        "x.safetensors: unknown tensor 'latent'",
        "y.safetensors: `latents` is (1, 2), not 4 dimensions",
        "z.safetensors",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"no \*.safetensors files"):
        FeatureFolder(tmp_path / "none")
    write_samples(tmp_path / "nan", [good | {"latents": good["latents"] / 0}])
    with pytest.raises(ValueError, match="`latents` holds numbers that are not finite"):
        FeatureFolder(tmp_path / "nan")[0]


# --- runs -----------------------------------------------------------------------------------------------------------


def command(base, data, output, *words):
    settings = ["--model", base, "--data", data, "--output_dir", output, "--use_cpu", "--bf16", "false", "--max_steps"]
    settings += [4, "--report_to", "none", "--warmup_steps", 0, "--save_steps", 2, "--disable_tqdm"]
    return CliRunner().invoke(app, ["train", "--config", *map(str, [words[0], *settings, *words[1:]])])


def picture(pipeline):
    generator = torch.Generator().manual_seed(0)
    arguments = {"prompt": "a fox", "task": "t2i", "height": 32, "width": 64, "num_inference_steps": 2}
    return pipeline(**arguments, generator=generator, output_type="latent").frames


def test_a_run_from_recipe_to_pipeline_and_its_resumption(data, tmp_path):
    base = tmp_path / "base"
    tiny.pipeline().save_pretrained(base)
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
    assert again.exit_code == 2
    assert "holds checkpoint-4 of an earlier run: pass `--resume`" in " ".join(again.output.split())
    longer = command(base, data, output, "decoder", "--resume", "--max_steps", "6")
    assert longer.exit_code == 0, longer.output
    assert (output / "checkpoint-6").is_dir()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_runs(name, data, tmp_path):
    base, output = tmp_path / "base", tmp_path / "run"
    tiny.pipeline().save_pretrained(base)
    if name in ("align", "joint"):
        data = write_samples(
            tmp_path / "data",
            [training.instructed("v2v", 0), training.instructed("t2i", 1), training.sample("understand")],
        )
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
    }
    summary = TrainingSummary.read(output / "pipeline")
    assert (summary.steps, summary.datasets, summary.hardware) == (6, [data.name], "1 x CPU")
    assert summary.losses["loss"] > 0
    assert changed == parts.get(name, {"mllm", "adapter", "transformer"})
    if name == "lora":
        untrained.load_lora_weights(output / "lora")
        assert torch.allclose(picture(untrained), picture(trained), atol=1e-3)
