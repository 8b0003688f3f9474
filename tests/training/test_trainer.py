import json
from pathlib import Path

import pytest
import tiny
import torch
import training
from other_mllms import LLAVA, QWEN, other_inputs
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omni_video_hf import OmniVideoForConditionalGeneration
from omni_video_hf.training.checkpointing.randomness import derive_seed, draw_dropouts, sample_generators

TASKS = ("t2i", "t2v", "i2i", "v2v", "i2v")


def gradients(run):
    """Loss and gradients of a run's first optimiser step."""
    found = {}

    def keep(*args, **kwargs):
        found.update({name: p.grad.clone() for name, p in run.trained_parameters().items() if p.grad is not None})

    run.create_optimizer()
    run.optimizer.register_step_pre_hook(keep)
    run.train()
    return run.state.log_history[0]["loss"], found


# --- chance ---------------------------------------------------------------------------------------------------------


def test_random_numbers_of_a_sample_depend_only_on_its_place_in_the_step():
    def draws(first, size, stride, step=7):
        return [torch.rand(1, generator=g).item() for g in sample_generators(1, step, first, size, stride)]

    together = draws(0, 4, 4)
    assert together == [draw for first in range(4) for draw in draws(first, 1, 1)]
    assert together == draws(0, 2, 2) + draws(1, 2, 2)
    assert len(set(together + draws(0, 4, 4, step=8) + draws(1, 4, 4))) == 12
    assert len(set(draws(0, 9, 2) + draws(1, 2, 2))) == 11  # a batch larger than the stride
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_dropouts_exclude_each_other_and_come_as_often_as_asked():
    generators = sample_generators(0, 0, 0, 4000, 4000)
    instruction, prompt = draw_dropouts(generators, both=0.2, instruction=0.1, prompt=0.3)
    assert abs(float((instruction & prompt).float().mean()) - 0.2) < 0.03
    assert abs(float((instruction & ~prompt).float().mean()) - 0.1) < 0.03
    assert abs(float((~instruction & prompt).float().mean()) - 0.3) < 0.03


def test_conditions_that_are_always_dropped_do_not_matter(tmp_path):
    samples = [training.sample("v2v", number) for number in range(2)]
    other = [sample | {"prompt_embeds": sample["prompt_embeds"] + 1} for sample in samples]

    def loss(samples, **dropouts):
        run = training.trainer(tmp_path, samples, max_steps=1, **dropouts)
        return gradients(run)[0]

    assert loss(samples, condition_dropout=1.0) == loss(other, condition_dropout=1.0)
    assert loss(samples, condition_dropout=0.0, prompt_dropout=1.0) == loss(
        other, prompt_dropout=1.0, condition_dropout=0.0
    )
    assert loss(samples, condition_dropout=0.0) != loss(other, condition_dropout=0.0)


# --- equalities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["decoder", "joint"])
def test_accumulating_four_batches_of_one_equals_one_batch_of_four(tmp_path, stage):
    precomputed = stage == "decoder"
    make = training.sample if precomputed else training.instructed
    samples = [make("v2v", number) for number in range(4)]
    results = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        sampler = training.BatchesInOrder([list(range(i, i + size)) for i in range(0, 4, size)])
        run = training.trainer(
            tmp_path,
            samples,
            tiny.model(enable_mllm=not precomputed),
            sampler,
            stage=stage,
            max_steps=1,
            max_grad_norm=0.0,
            condition_dropout=0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        results.append(gradients(run))
    (loss, expected), *others = results
    assert expected
    for other_loss, other in others:
        assert abs(other_loss - loss) < 1e-4 * abs(loss)
        assert set(other) == set(expected)
        for name, gradient in expected.items():
            assert torch.allclose(other[name], gradient, rtol=1e-3, atol=1e-5), name


def test_checkpointing_of_activations_changes_nothing(tmp_path):
    samples = [training.instructed("v2v", number) for number in range(2)]
    (loss, expected), (other_loss, other) = (
        gradients(
            training.trainer(
                tmp_path,
                samples,
                tiny.model(),
                stage="joint",
                max_steps=1,
                max_grad_norm=0.0,
                activation_checkpointing=on,
            )
        )
        for on in (False, True)
    )
    assert abs(loss - other_loss) < 1e-5
    assert set(expected) == set(other)
    for name, gradient in expected.items():
        assert torch.allclose(gradient, other[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("stage", ["align", "connect", "joint", "decoder"])
def test_frozen_parts_in_half_precision_train_alike(tmp_path, stage):
    samples = [training.instructed("v2v", number) for number in range(2)]
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = tiny.model()
        run = training.trainer(tmp_path, samples, model, stage=stage, max_steps=1, bf16=True, frozen_dtype=dtype)
        losses.append(gradients(run)[0])
        assert {parameter.dtype for parameter in run.trained_parameters().values()} == {torch.float32}
        frozen = {p.dtype for n, p in model.named_parameters() if not p.requires_grad and "mllm.model" in n}
        assert frozen == {getattr(torch, dtype)}
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("answers", [True, False])
def test_logits_are_computed_where_an_answer_is_learned_and_of_one_position_else(tmp_path, answers):
    samples = [training.instructed("v2v", number) for number in range(2)]
    if not answers:
        samples = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
    model, lengths = tiny.model(), []
    model.mllm.lm_head.register_forward_hook(lambda module, inputs, logits: lengths.append(logits.shape[1]))
    run = training.trainer(
        tmp_path, samples, model, stage="joint", max_steps=1, eval_dataset=training.Samples(samples)
    )
    run.train()
    run.evaluate()
    assert lengths == ([13, 13] if answers else [1, 1])


@pytest.mark.parametrize(("family", "mllm"), [("llava", LLAVA), ("qwen2_5_vl", QWEN)])
def test_an_mllm_of_another_family_trains_and_generates(tmp_path, family, mllm):
    model = tiny.model(mllm_config=mllm)
    inputs = other_inputs(family)
    patches = 16 if family == "qwen2_5_vl" else 1
    samples = []
    for number in range(2):
        sample = training.instructed("t2v", number)
        sample |= {name: inputs[name][number] for name in ("input_ids", "attention_mask")}
        sample["labels"] = torch.where(torch.arange(12) < 7, -100, sample["input_ids"])
        sample["pixel_values"] = inputs["pixel_values"][patches * number : patches * (number + 1)]
        sample |= {name: inputs[name][number] for name in ("image_grid_thw", "mm_token_type_ids") if name in inputs}
        samples.append(sample)

    def together(samples):
        batch = training.collate(samples)
        return batch | {"pixel_values": batch["pixel_values"].flatten(0, 1)}

    run = training.trainer(tmp_path, samples, model, stage="joint", max_steps=1)
    run.data_collator = together
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run.train()
    losses = run.state.log_history[0]
    assert all(losses[f"{name}_loss"] > 0 for name in ("answer", "alignment", "flow_matching"))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"mllm", "vision_head", "adapter", "decoder"}
    assert {name for name in changed if name.startswith("mllm.")} == {"mllm.lm_head.weight"}

    greedy = {"do_sample": False, "max_new_tokens": 4}
    answer = model.eval().generate(**inputs, **greedy)
    assert answer.shape == (2, 16)
    assert torch.equal(answer, model.mllm.generate(**inputs, **greedy))


# --- what is logged -------------------------------------------------------------------------------------------------


def test_every_loss_is_logged_by_name_and_task(tmp_path):
    tasks = [*TASKS, "understand"]
    samples = [
        training.sample(task, 2 * i + j) if task == "understand" else training.instructed(task, 2 * i + j)
        for i, task in enumerate(tasks)
        for j in range(2)
    ]
    sampler = training.BatchesInOrder([[2 * i, 2 * i + 1] for i in range(len(tasks))])
    run = training.trainer(
        tmp_path,
        samples,
        tiny.model(),
        sampler,
        stage="joint",
        max_steps=6,
        logging_steps=6,
        report_to="tensorboard",
        eval_dataset=training.Samples(samples[:2] + samples[2:4]),
        per_device_eval_batch_size=2,
    )
    run.train()
    entry = run.state.log_history[0]
    for name in ("alignment", "flow_matching"):
        parts = [entry[f"{name}_loss_{task}"] for task in TASKS]
        assert entry[f"{name}_loss"] == pytest.approx(sum(parts) / 5, rel=1e-5)
        assert f"{name}_loss_understand" not in entry
    assert entry["answer_loss"] == pytest.approx(sum(entry[f"answer_loss_{task}"] for task in tasks) / 6, rel=1e-5)
    expected = entry["answer_loss"] + 5 / 6 * (entry["alignment_loss"] + entry["flow_matching_loss"])
    assert entry["loss"] == pytest.approx(expected, rel=1e-4)

    metrics = run.evaluate()
    assert metrics["eval_flow_matching_loss_t2v"] > 0
    expected = metrics["eval_answer_loss"] + metrics["eval_alignment_loss"] + metrics["eval_flow_matching_loss"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    again = run.evaluate()
    assert again["eval_loss"] == metrics["eval_loss"]

    events = EventAccumulator(str(next(Path(tmp_path).rglob("events.out*")).parent)).Reload()
    assert {"train/flow_matching_loss_v2v", "train/answer_loss_understand", "eval/alignment_loss_t2i"} <= set(
        events.Tags()["scalars"]
    )


def test_batches_that_cannot_train_are_refused(tmp_path):
    def run(samples, **settings):
        training.trainer(tmp_path, samples, **({"max_steps": 1} | settings)).train()

    samples = [training.sample("v2v", number) for number in range(2)]
    with pytest.raises(ValueError, match=r"`task`: unknown 'v2x' \(did you mean"):
        run([sample | {"task": "v2x"} for sample in samples])
    bare = [{key: sample[key] for key in ("task", "latents", "prompt_embeds")} for sample in samples]
    with pytest.raises(ValueError, match="must have `input_ids` or `mllm_hidden_states`, got"):
        run(bare)
    for sample in samples:
        sample.pop("latents")
    with pytest.raises(ValueError, match="allows none of the losses of the stage 'decoder'"):
        run(samples)


def test_a_loss_that_no_batch_allowed_is_warned_of(tmp_path, caplog):
    samples = [training.instructed("t2v", number) for number in range(2)]
    training.trainer(tmp_path, samples, tiny.model(), stage="joint").train()
    assert "No batch allowed" not in caplog.text
    bare = [{name: value for name, value in sample.items() if name != "target_features"} for sample in samples]
    training.trainer(tmp_path, bare, tiny.model(), stage="joint").train()
    assert "No batch allowed the alignment loss" in caplog.text
    assert "the answer loss" not in caplog.text


# --- learning rates, moving average, previews -----------------------------------------------------------------------


def test_parts_have_their_own_learning_rates(tmp_path):
    rates = {"decoder": 1e-4, "text_head": 2e-4, "adapter": 3e-4}
    run = training.trainer(
        tmp_path,
        [training.instructed("t2i")],
        tiny.model(),
        stage="joint",
        part_learning_rates=rates,
        weight_decay=0.1,
    )
    run.create_optimizer()
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups for p in g["params"]}
    assert set(found) == set(run.trained_names)
    expected = {"decoder.": 1e-4, "mllm.lm_head.": 2e-4, "adapter.": 3e-4, "vision_head.": 1e-3}
    for name, (rate, decay) in found.items():
        assert rate == next(value for prefix, value in expected.items() if name.startswith(prefix))
        if name.endswith("bias"):
            assert decay == 0.0, name
        elif name.endswith(("proj.weight", "proj_1.weight", "to_q.weight")):
            assert decay == 0.1, name


def test_the_moving_average_is_one_and_is_what_is_saved(tmp_path):
    samples = [training.sample("t2v", number) for number in range(4)]
    run = training.trainer(tmp_path / "run", samples, ema_decay=0.5, max_steps=3)
    name = "decoder.proj_out.weight"
    weights = [run.trained_parameters()[name].detach().clone()]
    run.create_optimizer()
    run.optimizer.register_step_post_hook(lambda *_: weights.append(run.trained_parameters()[name].detach().clone()))
    run.train()
    average = weights[0]
    for step, value in enumerate(weights[1:]):
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))  # diffusers' warm-up of the decay
        average = decay * average + (1 - decay) * value
    run.save_model(str(tmp_path / "saved"))
    saved = OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.allclose(saved.decoder.proj_out.weight, average, atol=1e-6)
    assert not torch.equal(average, weights[-1])
    assert torch.equal(run.trained_parameters()[name], weights[-1])


def test_previews_are_generated_with_the_weights_of_their_step(tmp_path):
    pipe = tiny.pipeline()
    question = {"prompt": "what?", "task": "understand", "image": str(tmp_path / "i.png"), "max_new_tokens": 2}
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "i.png")
    previews = [{"prompt": "a fox", "task": "t2i"}, {"prompt": "a fox runs", "task": "t2v"}, question]
    samples = [training.sample("t2v", number) for number in range(4)]
    run = training.trainer(
        tmp_path / "run",
        samples,
        tiny.model(),
        preview_pipeline=pipe,
        preview_steps=2,
        previews=previews,
        max_steps=4,
        learning_rate=0.1,
    )
    run.train()
    assert pipe.transformer is run.model.decoder
    folder = tmp_path / "run" / "previews"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"step-00000{step}{end}" for step in (2, 4) for end in (".png", "-1.mp4", ".txt")}
    first, last = (Image.open(folder / f"step-00000{step}.png").tobytes() for step in (2, 4))
    assert first != last
    plain = training.trainer(tmp_path / "plain", samples, tiny.model(), max_steps=4, learning_rate=0.1)
    plain.train()
    for name, parameter in plain.trained_parameters().items():
        assert torch.equal(parameter, run.trained_parameters()[name]), name
    with pytest.raises(ValueError, match="Previews need the adapter and the decoder"):
        training.trainer(
            tmp_path,
            samples,
            tiny.model(adapter_config=None, decoder_config=None),
            stage="align",
            preview_steps=1,
            previews=previews,
            preview_pipeline=pipe,
        )


def test_the_card_has_the_facts_of_the_run_and_an_edited_one_stays(tmp_path):
    run = training.trainer(tmp_path, [training.sample("t2v", number) for number in range(4)])
    run.train()
    run.save_model()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "decoder" in card
    (tmp_path / "README.md").write_text("mine")
    run.create_model_card()
    assert (tmp_path / "README.md").read_text() == "mine"


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_trains_and_knows_its_stage(tmp_path):
    samples = [training.sample("v2v", number) for number in range(4)]
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    run = training.trainer(tmp_path, samples, max_steps=4, **settings)
    run.train()
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"checkpoint-3", "checkpoint-4"}
    with safe_open(tmp_path / "checkpoint-4" / "trained.safetensors", "pt") as file:
        assert set(file.keys()) == set(run.trained_names)
        assert json.loads(file.metadata()["stage"]) == "decoder"
    with pytest.raises(OSError):
        OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    other = training.trainer(tmp_path, samples, stage="connect", **settings)
    with pytest.raises(ValueError, match="written in the stage 'decoder', but the `stage` of this run is 'connect'"):
        other.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    samples = [training.sample("v2v", number) for number in range(4)]
    run = training.trainer(
        tmp_path,
        samples,
        max_steps=4,
        learning_rate=0.3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        eval_dataset=training.Samples(samples),
        metric_for_best_model="loss",
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert Path(run.state.best_model_checkpoint) == tmp_path / f"checkpoint-{best}"
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    state = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
