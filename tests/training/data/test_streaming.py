"""Datasets without length, models made when a training begins, predictions and metrics."""

import numpy as np
import pytest
import tiny
import torch
import training
from torch.utils.data import IterableDataset
from transformers import Trainer

from omni_video_hf.training import OmniVideoTrainer
from omni_video_hf.training.data.collator import OmniVideoDataCollator
from omni_video_hf.training.data.streaming import StreamOfBatches


class Stream(IterableDataset):
    """Samples one after the other, in another order in every epoch."""

    def __init__(self, samples):
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(self.epoch))
        return iter([self.samples[number] for number in order])


def samples_of_tasks(*tasks, number=3):
    samples = [training.sample(task, i) for task in tasks for i in range(number)]
    return [s | ({"pixel_values": s["pixel_values"][None]} if "pixel_values" in s else {}) for s in samples]


def make(folder, stream, model=None, **settings):
    extra = {
        name: settings.pop(name)
        for name in list(settings)
        if name in ("eval_dataset", "compute_metrics", "model_init")
    }
    model = model or (None if "model_init" in extra else tiny.model(enable_mllm=False))
    args = training.arguments(folder, **settings)
    return OmniVideoTrainer(model, args, train_dataset=stream, data_collator=OmniVideoDataCollator(), **extra)


def test_batches_of_a_stream_are_of_one_task_and_shape_and_dealt_out():
    samples = samples_of_tasks("t2i", "t2v", "v2v", number=5)
    hands = [list(StreamOfBatches(Stream(samples), 2, 2, rank, endless=False)) for rank in range(2)]
    assert len(hands[0]) == len(hands[1])
    seen = []
    for mine, others in zip(*hands, strict=True):
        assert len(mine) == len(others)
        assert len({sample["task"] for sample in mine + others}) == 1
        seen += [id(sample["latents"]) for sample in mine + others]
    assert len(seen) == len(set(seen)) == 3 * 4  # a fifth one has no partner
    alone = [sample for batch in StreamOfBatches(Stream(samples), 2, 1, 0, endless=False) for sample in batch]
    assert len(alone) == 15
    with pytest.raises(ValueError, match=r"gave no batch for 1 processes\. It is empty"):
        next(iter(StreamOfBatches(Stream([]), 2, 1, 0, endless=True)))
    with pytest.raises(ValueError, match=r"Sample 0 of the stream: `latents` must be a tensor, got list"):
        next(iter(StreamOfBatches([{"task": "t2i", "latents": [1.0]}], 1, 1, 0, endless=False)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_trains_over_its_end_evaluates_and_resumes_bit_equal(tmp_path, workers):
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    saving |= {"dataloader_num_workers": workers, "per_device_eval_batch_size": 1}
    weights = []
    for folder, stops in (("whole", [8]), ("parts", [3, 8])):
        for steps in stops:
            stream = Stream(samples_of_tasks("t2i", "t2v"))
            held = Stream(samples_of_tasks("v2v", number=2))
            run = make(tmp_path / folder, stream, max_steps=steps, eval_dataset=held, **saving)
            run.train(resume_from_checkpoint=steps == 8 and len(stops) > 1)
        weights.append(run.trained_parameters())
    assert run.state.global_step == 8
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert run.evaluate()["eval_flow_matching_loss_v2v"] > 0


def test_a_stream_takes_neither_numbers_nor_several_workers(tmp_path):
    stream = Stream(samples_of_tasks("t2i"))
    with pytest.raises(ValueError, match="`train_batch_sampler` chooses samples by number"):
        OmniVideoTrainer(
            tiny.model(enable_mllm=False),
            training.arguments(tmp_path),
            train_dataset=stream,
            train_batch_sampler=training.BatchesInOrder([[0]]),
        )
    with pytest.raises(ValueError, match="`dataloader_num_workers` is 2, but a stream needs a single worker"):
        make(tmp_path, stream, dataloader_num_workers=2).train()


def test_a_model_that_is_made_when_training_begins_trains_like_any_other(tmp_path):
    run = make(tmp_path, Stream(samples_of_tasks("t2v")), model_init=lambda: tiny.model(enable_mllm=False))
    run.train()
    given = make(tmp_path, Stream(samples_of_tasks("t2v")))
    given.train()
    for name, value in given.trained_parameters().items():
        assert torch.equal(value, run.trained_parameters()[name])
    assert not any(p.requires_grad for p in run.model.vision_head.parameters())
    first = run.model
    run.train()
    assert run.model is not first
    with pytest.raises(RuntimeError, match="either a `model` or `model_init`"):
        make(tmp_path, Stream([]), model_init=None)


# --- predictions ----------------------------------------------------------------------------------------------------


def accuracy(prediction):
    """As most notebooks have it: logits first."""
    guesses = prediction.predictions.argmax(-1)[:, :-1]
    labels = prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean()), "counted": int((labels != -100).sum())}


def test_answers_are_predicted_and_measured(tmp_path):
    samples = samples_of_tasks("understand", number=5)
    settings = {"stage": "understand", "compute_metrics": accuracy, "per_device_eval_batch_size": 2}
    held = training.Samples(samples)
    run = make(tmp_path, held, tiny.model(decoder_config=None, adapter_config=None), eval_dataset=held, **settings)
    metrics = run.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert metrics["eval_counted"] == 5 * 5
    output = run.predict(held)
    assert output.predictions.shape == (5, 13, 160)
    assert np.array_equal(output.label_ids, torch.stack([sample["labels"] for sample in samples]).numpy())
    with torch.no_grad():
        inputs = {name: value[None] for name, value in samples[1].items() if name != "task"}
        inputs["pixel_values"] = samples[1]["pixel_values"]
        expected = run.model.eval()(**inputs).logits[0]
    assert np.allclose(output.predictions[1], expected.numpy(), atol=1e-4)
    assert output.metrics["test_accuracy"] == metrics["eval_accuracy"]
    # transformers' own Trainer gets the logits alone as well.
    batches = [{name: value for name, value in sample.items() if name != "task"} for sample in samples]
    plain = Trainer(
        run.model,
        training.arguments(tmp_path, stage="understand", per_device_eval_batch_size=1),
        data_collator=lambda rows: {
            name: value if name == "pixel_values" else value[None] for name, value in rows[0].items()
        },
    )
    assert plain.predict(training.Samples(batches)).predictions.shape == (5, 13, 160)


def test_metrics_that_would_never_be_computed_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the stage 'decoder' trains none .*use `stage='understand'`"):
        make(tmp_path, Stream([]), compute_metrics=accuracy)
    whole = tiny.model()
    with pytest.raises(ValueError, match="is never called with `prediction_loss_only=True`"):
        make(tmp_path, Stream([]), whole, stage="joint", compute_metrics=accuracy, prediction_loss_only=True)
    drawn = training.Samples([s | training.sample("t2v") for s in samples_of_tasks("understand", number=1)])
    run = make(tmp_path, drawn, whole, stage="joint", compute_metrics=accuracy, eval_dataset=drawn)
    for predict in (run.evaluate, lambda: run.predict(drawn)):
        with pytest.raises(ValueError, match=r"must be of the task 'understand' .*this one is of 't2v'"):
            predict()
    assert make(tmp_path, drawn, whole, stage="joint", eval_dataset=drawn).evaluate()["eval_loss"] > 0
