import json
import shutil

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from examples.shapes import configuration
from examples.shapes.recolor import any_colors
from examples.shapes.training.train_mllm import AnswerObjective, ConversationBatches, conversation, evaluate, train
from examples.shapes.training.vision import NOT_LEARNED, SPEAKING_COLORS, SeeingObjective, SeenImages
from omni_video_hf.models.modeling_vila import VilaForConditionalGeneration
from omni_video_hf.shapes import Scene, ShapesDataset
from omni_video_hf.shapes.scene import COLORS, HELD_OUT


@pytest.fixture(scope="module")
def processor():
    return configuration.processor()


@pytest.fixture
def mllm():
    torch.manual_seed(0)
    return configuration.model(adapter_config=None, decoder_config=None).mllm


def learned(processor, sample):
    return processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])


class Draws:
    """Stands for a generator whose uniform numbers are known."""

    def __init__(self, value):
        self.value, self.rng = value, np.random.default_rng(0)

    def random(self):
        return self.value

    def integers(self, *arguments):
        return self.rng.integers(*arguments)


NEVER_RECOLORS = Draws(1.0)


def test_questions_come_in_colors_that_they_do_not_ask_for(processor):
    dataset = ShapesDataset("understand", "train", 60, kind="image")
    for index in range(60):
        example = dataset.example(index)
        own = processor.preprocess_images([dataset[index]["source"][0]])[0]
        x, y = (int(value) for value in example.source.center)
        speaks = example.attribute == "shape" and example.source.color in SPEAKING_COLORS
        for draw, may_differ in ((Draws(0.0), True), (Draws(1.0), speaks)):
            sample = conversation(processor, example, True, draw)
            picture = sample["pixel_values"][0]
            assert processor.tokenizer.decode(sample["labels"][sample["labels"] != -100]).startswith(example.answer)
            same_behind, same_shape = (torch.equal(picture[:, j, i], own[:, j, i]) for i, j in ((0, 0), (x, y)))
            assert same_behind == (not may_differ or example.attribute in ("background", "describe"))
            assert same_shape == (not may_differ or example.attribute in ("color", "describe"))


def test_shapes_are_asked_for_in_colors_that_say_nothing_of_them():
    rng = np.random.default_rng(0)
    for shape in ("circle", "square", "triangle"):
        scene = Scene("yellow", shape, "large", "grey")
        colors = np.array([any_colors(rng, scene, tells_shape=False)["color"] for _ in range(300)])
        for name in ("red", "green", "blue"):
            assert np.linalg.norm(colors - COLORS[name], axis=1).min() > 90


def test_attributes_are_asked_for_before_sentences(processor):
    batches = ConversationBatches(processor, 40, 8, 0)
    said = [
        processor.tokenizer.decode(batches[index]["labels"][row][batches[index]["labels"][row] != -100])
        for index in (*range(3), *range(30, 36))
        for row in range(8)
    ]
    assert all(len(text.split()) == 1 for text in said[:24])
    assert any(len(text.split()) > 5 for text in said[24:])


def test_questions_are_answered_and_ended(processor):
    example = ShapesDataset("understand", "train", 5, kind="image").example(3)
    sample = conversation(processor, example, as_task=True, rng=NEVER_RECOLORS)
    assert learned(processor, sample) == f"{example.answer}<|end_of_text|>"
    assert sample["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("task", "pictures"), [("t2v", 0), ("t2i", 0), ("i2i", 1), ("v2v", 4)])
def test_requests_are_answered_by_what_there_would_be_to_see(processor, task, pictures):
    example = ShapesDataset(task, "train", 5).example(1)
    sample = conversation(processor, example, as_task=False, rng=NEVER_RECOLORS)
    said = learned(processor, sample)
    assert said.startswith(f"{example.kind}: a {example.target.size} {example.target.color} {example.target.shape}")
    assert (f"moving {example.target.motion}" in said or "standing still" in said) == (example.kind == "video")
    assert len(sample.get("pixel_values", ())) == pictures


def test_the_prompt_of_a_task_is_the_one_that_the_pipeline_writes(processor):
    """Up to the answer, which the pipeline forces, the MLLM has seen in training what the vision head will read."""
    for task, source in (("t2v", {}), ("v2v", {"videos": 1}), ("i2i", {"images": 1})):
        dataset = ShapesDataset(task, "train", 3)
        sample = conversation(processor, dataset.example(2), as_task=True, rng=NEVER_RECOLORS)
        question = sample["input_ids"][sample["labels"] == -100]
        frames = dataset[2].get("source")
        media = {name: [frames if name == "videos" else frames[0]] for name in source}
        inputs = processor.apply_task_template(task, dataset[2]["prompt"], return_tensors="pt", **media)
        assert torch.equal(inputs["input_ids"][0, : len(question)], question)
        if source:
            torch.testing.assert_close(inputs["pixel_values"], sample["pixel_values"])


def test_what_is_held_out_is_never_said(processor):
    batches = ConversationBatches(processor, 12, 8, 0)
    said = {processor.tokenizer.decode(ids) for index in range(12) for ids in batches[index]["input_ids"]}
    assert len(said) > 60
    assert not [text for text in said for color, shape in HELD_OUT if f"{color} {shape}" in text]
    assert all(torch.equal(value, batches[3][name]) for name, value in batches[3].items())


@torch.no_grad()
def test_the_loss_is_the_models_own(processor, mllm):
    batch = ConversationBatches(processor, 3, 4, 0)[1]
    torch.testing.assert_close(AnswerObjective(mllm)(**batch)["loss"], mllm(**batch).loss)


def test_an_untrained_mllm_answers_nothing_right(processor, mllm):
    scores = evaluate(mllm, processor, count=3, seed=0)
    assert [(score.split, score.counts["all"].right, score.counts["all"].total) for score in scores] == [
        ("seen", 0, 4),
        ("composition", 0, 4),
    ]


def test_the_tower_sees_what_the_processor_shows(processor):
    """In the pixels that the MLLM will be given; in colours that speak for a shape, none is learned."""
    images, dataset = SeenImages(60, seed=0), ShapesDataset("t2i", "train", 60)
    own = 0
    for index in range(60):
        seen, scene = images[index], dataset.example(index).target
        (pixels,) = processor.preprocess_images([dataset[index]["target"][0]])
        x, y = (int(value) for value in scene.center)
        torch.testing.assert_close(seen["pixel_values"][:, y, x], seen["color"])
        torch.testing.assert_close(seen["pixel_values"][:, 0, 0], seen["background"])
        torch.testing.assert_close(seen["center"] * 32 + 32, torch.tensor(scene.center, dtype=torch.float32))
        if torch.allclose(seen["pixel_values"], pixels):
            own += 1
            assert (seen["shape"] == NOT_LEARNED) == (scene.color in SPEAKING_COLORS)
        else:
            assert seen["shape"] == ("circle", "square", "triangle").index(scene.shape)
    assert 8 < own < 30


def test_what_is_not_to_be_learned_has_no_gradient(mllm):
    objective = SeeingObjective(mllm.model.vision_tower)
    batch = default_data_collator([SeenImages(8, seed=0)[index] for index in range(4)])
    batch["shape"][:] = NOT_LEARNED
    objective(**batch)["loss"].backward()
    of_shapes, others = objective.head.weight.grad.split([3, 10])
    assert not of_shapes.any()
    assert others.abs().sum(dim=1).all()


@pytest.mark.parametrize("phase", ["vision", "answers"])
def test_training_resumes_as_if_it_had_not_stopped(tmp_path, phase):
    settings = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "seed": 3, "save_steps": 2, "eval_questions": 1}
    settings |= {"vision_steps": 4, "vision_batch_size": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, **settings)
    shutil.copytree(whole / phase / "checkpoint-2", stopped / phase / "checkpoint-2")
    if phase == "answers":
        shutil.copytree(whole / "vision" / "checkpoint-4", stopped / "vision" / "checkpoint-4")
    train(stopped, **settings)
    first, second = (VilaForConditionalGeneration.from_pretrained(folder / "mllm") for folder in (whole, stopped))
    for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    results = json.loads((whole / "mllm.json").read_text())
    assert results["settings"]["steps"] == 4
    assert first.lm_head.weight.isfinite().all()
