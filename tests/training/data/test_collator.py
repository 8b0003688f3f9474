import numpy as np
import pytest
import tiny
import torch
import training
from golden import DATA
from raw_data import datasets_cache, make_clip, make_image, write_jsonl  # noqa: F401 - a fixture

from omni_video_hf.training.data.bad_data import BadDataError
from omni_video_hf.training.data.batch_sampler import Bucket, OmniVideoBatchSampler
from omni_video_hf.training.data.collator import MixedDataset, OmniVideoDataCollator, bucket_of, encode_conversation
from omni_video_hf.training.data.conversations import ConversationDataset
from omni_video_hf.training.data.media_table import load_media_table

CLIP = DATA / "bigbuckbunny.mp4"


class Known(training.Samples):
    """Samples that know their buckets."""

    @property
    def buckets(self):
        return [
            bucket_of(sample["task"], {name: value.shape for name, value in sample.items() if name != "task"})
            for sample in self.samples
        ]


def test_unequal_lengths_are_padded_and_masked():
    samples = [training.sample("v2v", number) for number in range(2)]
    samples[1]["prompt_embeds"] = samples[1]["prompt_embeds"][:2]
    samples[0]["mllm_hidden_states"] = samples[0]["mllm_hidden_states"][:3]
    for length, sample in enumerate(samples, start=1):
        sample["target_prompt_embeds"] = torch.randn(length, 32)
    batch = OmniVideoDataCollator()(samples)
    assert batch["task"] == "v2v"
    assert batch["output_kind"] == "video"
    assert batch["prompt_embeds_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["mllm_attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0], [1] * 7]
    assert batch["target_prompt_embeds_mask"].tolist() == [[1, 0], [1, 1]]
    assert torch.equal(batch["prompt_embeds"][1, :2], samples[1]["prompt_embeds"])
    assert not batch["prompt_embeds"][1, 2:].any()
    assert torch.equal(batch["source_latents"][1], samples[1]["source_latents"])
    assert batch["latents"].shape == (2, 16, 2, 8, 4)


def test_inputs_that_would_not_reach_the_model_are_refused():
    samples = [
        training.sample("t2v", number) | {"prompt": "a fox", "timesteps": torch.zeros(2)} for number in range(2)
    ]
    with pytest.raises(ValueError, match="task 't2v' contain prompt, timesteps, which the model does not use"):
        OmniVideoDataCollator()(samples)


def test_a_padded_batch_has_the_losses_of_its_samples():
    model = tiny.model()
    samples = [training.sample("t2v", number) for number in range(2)]
    samples[1]["prompt_embeds"] = samples[1]["prompt_embeds"][:2]
    samples[0]["mllm_hidden_states"] = samples[0]["mllm_hidden_states"][:3]
    noise, timesteps = torch.randn(2, 16, 2, 8, 4), torch.tensor([300.0, 700.0])

    def loss(chosen, rows):
        batch = OmniVideoDataCollator()(chosen)
        batch.pop("task")
        with torch.no_grad():
            return model(**batch, noise=noise[rows], timesteps=timesteps[rows]).flow_matching_loss

    alone = torch.stack([loss([samples[row]], [row]) for row in range(2)])
    torch.testing.assert_close(loss(samples, [0, 1]), alone.mean(), rtol=1e-5, atol=1e-6)


def test_padded_questions_have_the_losses_of_their_own():
    model, processor = tiny.model(), tiny.processor()
    samples = [
        {"task": "understand"} | encode_conversation(processor, "understand", question, answer, **media)
        for question, answer, media in (
            ("what is it?", "a bunny", {"video": CLIP}),
            ("and here?", "no", {"image": np.zeros((8, 8, 3), np.uint8)}),
        )
    ]
    collate = OmniVideoDataCollator(pad_token_id=processor.tokenizer.pad_token_id or 0)

    def loss(chosen):
        batch = collate(chosen)
        assert batch.pop("task") == "understand"
        assert "output_kind" not in batch
        learned = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            return model(**batch).answer_loss * learned, learned

    alone = [loss([sample]) for sample in samples]
    together, learned = loss(samples)
    assert learned == sum(number for _, number in alone)
    torch.testing.assert_close(together, sum(value for value, _ in alone), rtol=1e-5, atol=1e-5)


def test_only_the_answer_and_its_end_are_learned():
    processor = tiny.processor()
    sample = encode_conversation(processor, "understand", "what is it?", "a bunny", video=CLIP)
    learned = sample["labels"][sample["labels"] != -100]
    assert learned.tolist() == [*processor.tokenizer("a bunny", add_special_tokens=False).input_ids, 97]
    assert torch.equal(sample["input_ids"][-len(learned) :], learned)
    question = processor.apply_task_template("understand", "what is it?", videos=[CLIP], return_tensors="pt")
    assert torch.equal(sample["input_ids"][: -len(learned)], question["input_ids"][0])
    assert torch.equal(sample["pixel_values"], question["pixel_values"])


def test_the_ids_are_those_of_the_whole_conversation():
    processor = tiny.processor()
    messages = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a bunny"}]
    text = processor.apply_chat_template(messages, tokenize=False)
    sample = encode_conversation(processor, "understand", "what is it?", "a bunny")
    assert sample["input_ids"].tolist() == processor.tokenize_prompt(text)


def test_a_generation_task_learns_to_request_its_output():
    processor = tiny.processor()
    sample = encode_conversation(processor, "t2v", "a fox")
    assert sample["labels"][sample["labels"] != -100].tolist() == [99, 97]  # [GEN_VID] and the end
    image = np.zeros((8, 8, 3), np.uint8)
    sample = encode_conversation(processor, "i2i", "more red", image=image)
    assert sample["labels"][sample["labels"] != -100].tolist() == [98, 97]
    assert sample["pixel_values"].shape == (1, 3, 42, 42)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("understand", "what?", None), "`answer` must be a non-empty string, got None"),
        (("understand", "what?", " "), "`answer` must be a non-empty string"),
        (("understand", "what?", "yes "), "starts or ends with blanks"),
        (("understand", "what?", "a<image>b"), "`answer` contains '<image>'"),
        (("understand", "", "yes"), "`prompt` must be a non-empty string"),
        (("t2v", "a fox", "yes"), "is always"),
        (("t2w", "a fox", None), "`task` must be one of"),
    ],
)
def test_conversations_that_teach_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        encode_conversation(tiny.processor(), *arguments)


def test_mixed_data_train_through_the_sampler(tmp_path):
    tasks = ("t2i", "t2v", "i2i", "v2v", "i2v")
    drawn = Known([training.sample(task, number) for number in range(4) for task in tasks])
    asked = Known([training.sample("understand", number) for number in range(4)])
    for sample in asked.samples:
        sample["pixel_values"] = sample["pixel_values"][None]
    for sample in drawn.samples:
        if sample["task"] == "i2v":
            sample["reference_latents"] = sample.pop("source_latents")
    data = MixedDataset([drawn, asked])
    sampler = OmniVideoBatchSampler(data.buckets, 2, weights=dict.fromkeys((*tasks, "understand"), 1))
    assert len(sampler) == 12
    run = training.trainer(
        tmp_path, [], tiny.model(), sampler=sampler, stage="joint", num_train_epochs=1, max_steps=-1
    )
    run.train_dataset, run.data_collator = data, OmniVideoDataCollator()
    assert run.train().global_step == 12
    logged = {name for entry in run.state.log_history for name in entry}
    assert any("understand" in name for name in logged)


def test_collator_refuses_what_does_not_go_together():
    collate = OmniVideoDataCollator()
    with pytest.raises(ValueError, match=r"one task, got \['t2i', 't2v'\]"):
        collate([training.sample("t2i"), training.sample("t2v")])
    other = training.sample("t2v", 1)
    other.pop("target_features")
    with pytest.raises(ValueError, match="must have the same inputs"):
        collate([training.sample("t2v"), other])
    other = training.sample("t2v", 1)
    other["latents"] = other["latents"][:, :1]
    with pytest.raises(ValueError, match="`latents` must have the same shape in all samples of a batch"):
        collate([training.sample("t2v"), other])


def test_buckets_distinguish_shapes_and_inputs():
    base = bucket_of("t2v", {"latents": (16, 2, 8, 4), "prompt_embeds": (5, 32)})
    assert base == bucket_of("t2v", {"prompt_embeds": (9, 32), "latents": (16, 2, 8, 4)})
    assert base != bucket_of("t2v", {"latents": (16, 2, 8, 4)})
    assert base != bucket_of("t2v", {"latents": (16, 5, 8, 4), "prompt_embeds": (5, 32)})
    assert str(base) == "t2v (latents 16x2x8x4)"
    assert isinstance(base, Bucket)


def test_questions_straight_from_raw_data(tmp_path):
    make_clip(tmp_path / "a.mp4", frames=3)
    make_image(tmp_path / "a.png")
    rows = [
        {"task": "t2v", "prompt": "left to precompute", "media": "nowhere.mp4"},
        {"task": "understand", "question": "what is it?", "answer": "noise", "media": "a.mp4"},
        {"task": "understand", "question": "and this?", "answer": "red", "media": "a.png"},
        {"task": "understand", "question": "one and one?", "answer": "two"},
    ]
    processor = tiny.processor()
    data = ConversationDataset(load_media_table(write_jsonl(tmp_path / "a.jsonl", *rows)), processor, progress=False)
    assert len(data) == 3
    assert [len(data[number].get("pixel_values", ())) for number in range(3)] == [3, 1, 0]
    for number, bucket in enumerate(data.buckets):
        sample = dict(data[number])
        assert bucket == bucket_of(sample.pop("task"), {name: tensor.shape for name, tensor in sample.items()})
    sampler = OmniVideoBatchSampler(data.buckets, 2)
    batches = [OmniVideoDataCollator()([data[index] for index in indices]) for indices in sampler]
    assert sorted(len(batch.get("pixel_values", ())) for batch in batches) == [0, 4]

    rows += [
        {"task": "understand", "question": "", "answer": "noise"},
        {"task": "understand", "question": "gone?", "answer": "yes", "media": "gone.mp4"},
    ]
    table = load_media_table(write_jsonl(tmp_path / "b.jsonl", *rows))
    with pytest.raises(BadDataError, match="2 problems in 5 samples"):
        ConversationDataset(table, processor, progress=False)
    assert len(ConversationDataset(table, processor, on_bad_data="skip", progress=False)) == 3
    with pytest.raises(ValueError, match="has no row of the task 'understand'"):
        ConversationDataset(load_media_table(write_jsonl(tmp_path / "c.jsonl", rows[0])), processor, progress=False)
