import re

import golden
import numpy as np
import PIL
import pytest
import tiny
import torch
from golden import VILA_EXPECTED
from PIL import Image
from transformers import AutoProcessor

from omni_video_hf import OmniVideoProcessor
from omni_video_hf.media.clip import VideoClip
from omni_video_hf.tasks import TASKS

# upstream's name of each task; the two `generate` prompts are understanding with no image and with two frames
UPSTREAM = {"t2v": "vid_gen", "t2i": "img_gen", "v2v": "vid_edit", "i2v": "i2v_gen", "i2i": "img_edit"}
TEXT = golden.PROMPTS["text"]
IMAGE = Image.fromarray(VILA_EXPECTED["checkpoint"]["preprocess_wide.image"].numpy())
CLIP = VideoClip(np.random.default_rng(0).integers(0, 255, (11, 24, 32, 3), dtype=np.uint8), 8.0)


@pytest.fixture(scope="module")
def processor():
    return tiny.processor()


def expanded(ids, tokens=4, image_token=160):
    return [value for token in ids for value in ([image_token] * tokens if token == -200 else [token])]


@pytest.mark.parametrize("task", list(UPSTREAM))
def test_prompts_and_ids_of_every_task_are_upstreams(processor, task):
    wanted = golden.PROMPTS["prompts"][UPSTREAM[task]]
    assert processor.build_prompt(task, TEXT) == wanted["prompt"]
    source = TASKS[task].source
    media = {f"{source}s": [IMAGE if source == "image" else CLIP]} if source else {}
    inputs = processor.apply_task_template(task, TEXT, **media)
    assert inputs["input_ids"][0] == expanded(wanted["input_ids"])
    assert inputs["attention_mask"][0] == [1] * len(inputs["input_ids"][0])
    assert ("pixel_values" in inputs) == bool(source)


@pytest.mark.parametrize(("name", "frames"), [("generate_text", 0), ("generate_two_frames", 2)])
def test_questions_are_upstreams(processor, name, frames):
    wanted = golden.PROMPTS["prompts"][name]
    assert processor.build_prompt("understand", TEXT, frames) == wanted["prompt"]
    videos = [VideoClip(CLIP.frames[:frames], 8.0)] if frames else None
    inputs = processor.apply_task_template("understand", TEXT, videos=videos)
    assert inputs["input_ids"][0] == expanded(wanted["input_ids"])
    # and the same as a standard conversation
    content = [{"type": "image", "image": IMAGE}] * frames + [{"type": "text", "text": TEXT}]
    conversation = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == wanted["prompt"]
    chat = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert chat["input_ids"][0] == expanded(wanted["input_ids"])


@pytest.mark.parametrize("task", list(UPSTREAM))
def test_a_tokenizer_that_adds_no_bos_loses_tokens_as_upstreams(task):
    processor = tiny.processor()
    processor.tokenizer.backend_tokenizer.post_processor = None
    wanted = golden.PROMPTS["prompts"][UPSTREAM[task]]
    ids = processor.tokenize_prompt(wanted["prompt"])
    assert ids == expanded(wanted["input_ids_if_tokenizer_adds_no_bos"])


@pytest.mark.parametrize("mode", ["resize", "pad"])
@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_pixels_are_upstreams(mode, shape):
    processor = tiny.processor(image_aspect_ratio=mode)
    expected = VILA_EXPECTED["checkpoint"]
    pixels = processor.preprocess_images([expected[f"preprocess_{shape}.image"].numpy()])
    wanted = expected[f"preprocess_{shape}.{mode}"]
    if int(PIL.__version__.partition(".")[0]) >= 13:
        assert torch.equal(pixels[0], wanted)
    else:  # earlier versions of Pillow resize a tall image differently, by up to five of 255 levels
        assert (pixels[0] - wanted).abs().max() < 5.5 * 2 / 255
        assert (pixels[0] != wanted).float().mean() < 0.5


def test_v2v_shows_the_first_frame_unless_asked_for_all(processor):
    first = processor.apply_task_template("v2v", TEXT, videos=[CLIP], return_tensors="pt")
    assert torch.equal(first["pixel_values"], processor.preprocess_images([CLIP.frames[0]]))
    every = processor.apply_task_template("v2v", TEXT, videos=[CLIP], mllm_frames="all", return_tensors="pt")
    assert every["pixel_values"].shape[0] == processor.num_frames == 8
    assert int((every["input_ids"] == 160).sum()) == 8 * 4


def test_a_processor_remembers_which_frames_its_model_was_trained_with(processor, tmp_path):
    assert processor.mllm_frames == "first"
    tiny.processor(mllm_frames="all").save_pretrained(tmp_path)
    loaded = OmniVideoProcessor.from_pretrained(tmp_path)
    assert loaded.mllm_frames == "all"
    assert loaded.apply_task_template("v2v", TEXT, videos=[CLIP], return_tensors="pt")["pixel_values"].shape[0] == 8
    first = loaded.apply_task_template("v2v", TEXT, videos=[CLIP], mllm_frames="first", return_tensors="pt")
    assert first["pixel_values"].shape[0] == 1
    for refused in (
        lambda: tiny.processor(mllm_frames="last"),
        lambda: loaded.apply_task_template("v2v", TEXT, videos=[CLIP], mllm_frames="last"),
        lambda: loaded.apply_task_template("t2v", TEXT, mllm_frames="last"),
    ):
        with pytest.raises(ValueError, match="`mllm_frames` must be 'first' or 'all', got 'last'"):
            refused()


def test_question_about_a_video_samples_as_upstream(processor):
    inputs = processor.apply_task_template("understand", TEXT, videos=[CLIP], return_tensors="pt")
    frames = CLIP.frames[np.linspace(0, 10, 8).astype(int)]
    assert torch.equal(inputs["pixel_values"], processor.preprocess_images(list(frames)))


def test_batches_are_padded_left_and_masked(processor):
    inputs = processor.apply_task_template("t2v", ["a", "a longer prompt"], return_tensors="pt")
    lengths = inputs["attention_mask"].sum(dim=1)
    assert int(lengths[1] - lengths[0]) == len("a longer prompt") - 1
    assert inputs["attention_mask"][0, 0] == 0
    right = processor.apply_task_template("t2v", ["a", "a longer prompt"], padding_side="right", return_tensors="pt")
    assert right["attention_mask"][0, -1] == 0


def test_conversations_with_every_kind_of_media(processor, tmp_path):
    IMAGE.save(tmp_path / "image.png")
    array = np.asarray(IMAGE)
    kinds = [
        {"image": IMAGE},
        {"image": array},
        {"image": torch.from_numpy(array.copy())},
        {"path": str(tmp_path / "image.png")},
        {"url": str(tmp_path / "image.png")},
    ]
    outputs = []
    for kind in kinds:
        conversation = [{"role": "user", "content": [{"type": "image", **kind}, {"type": "text", "text": "what?"}]}]
        outputs.append(
            processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
    for output in outputs[1:]:
        assert torch.equal(output["pixel_values"], outputs[0]["pixel_values"])
        assert torch.equal(output["input_ids"], outputs[0]["input_ids"])


def test_conversation_with_a_video_and_a_closing_answer(processor):
    video = {"type": "video", "video": CLIP}
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [video, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a clip"}]},
    ]
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"num_frames": 3}
    )
    assert inputs["pixel_values"].shape == (3, 3, 42, 42)
    prompt = processor.apply_chat_template(conversation, processor_kwargs={"num_frames": 3})
    assert prompt.count("<image>\n") == 3
    assert prompt.endswith("a clip<|end_of_text|>")
    assert "helpful language" not in prompt
    assert conversation[1]["content"][0] is video  # the caller's conversation is left alone


@pytest.mark.parametrize(
    ("task", "prompt", "media", "message"),
    [
        ("t3v", "a", {}, "t2i, t2v, i2i, v2v, i2v, understand"),
        ("t2v", "", {}, "non-empty"),
        ("t2v", "  ", {}, "non-empty"),
        ("t2v", None, {}, "non-empty"),
        ("t2v", "look: <image>", {}, "'<image>'"),
        ("t2v", "stop<|eot_id|>", {}, "'<|eot_id|>'"),
        ("t2v", "a", {"images": [IMAGE]}, "no images and no videos"),
        ("i2i", "a", {}, "`images` was not given"),
        ("v2v", "a", {"images": [IMAGE]}, "`images` was given"),
        ("i2i", ["a", "b"], {"images": [IMAGE]}, "1 entries for 2 prompts"),
    ],
)
def test_what_a_task_does_not_take_is_refused(processor, task, prompt, media, message):
    prompts = prompt if isinstance(prompt, list) else [prompt]
    with pytest.raises(ValueError) as error:
        processor.apply_task_template(task, prompts, **media)
    assert message in str(error.value)


def test_images_and_placeholders_must_agree(processor):
    with pytest.raises(ValueError, match=r"1 <image> placeholders, but `images` has 2"):
        processor(images=[IMAGE, IMAGE], text="<image> x")
    with pytest.raises(ValueError, match="a place in the prompt"):
        processor(text="x", videos=[CLIP])
    with pytest.raises(TypeError, match="colour"):
        processor(text="x", colour=1)


def test_long_prompts_with_images_are_refused_or_cut_as_upstream():
    processor = tiny.processor(model_max_length=300)
    with pytest.raises(ValueError, match="more than the 300"):
        processor.apply_task_template("i2i", "a" * 100, images=[IMAGE])
    cut = processor.apply_task_template("i2i", "a" * 100, images=[IMAGE], truncation=True)
    assert len(cut["input_ids"][0]) == 300
    with pytest.raises(ValueError, match="more than the 300"):
        processor.apply_task_template("i2i", "a" * 100, images=[IMAGE], truncation=True, max_length=310)
    assert len(processor.apply_task_template("t2i", "a" * 100)["input_ids"][0]) > 300  # text alone has no limit


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = OmniVideoProcessor.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    for other in (loaded, again):
        assert type(other) is OmniVideoProcessor
        assert other.chat_template == processor.chat_template
        assert other.num_image_tokens == 4
        inputs = other.apply_task_template("i2i", TEXT, images=[IMAGE], return_tensors="pt")
        wanted = processor.apply_task_template("i2i", TEXT, images=[IMAGE], return_tensors="pt")
        assert all(torch.equal(inputs[key], wanted[key]) for key in wanted)


# --- arguments of every transformers processor ----------------------------------------------------------------------


def question(answer="a circle"):
    """A conversation about two images, whose last message is an answer."""
    asked = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what?"}, {"type": "image", "image": IMAGE}]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "look again"},
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


CHAT = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ({"padding": "max_length", "max_length": 400}, 400),
        ({"padding": "max_length", "max_length": 401, "pad_to_multiple_of": 8}, 408),
        ({"pad_to_multiple_of": 64}, 320),
        ({"truncation": True, "max_length": 260}, 260),
        ({"truncation": False, "max_length": 260}, 286),
        ({"text_kwargs": {"padding": "max_length", "max_length": 400}}, 400),
    ],
)
def test_prompts_are_padded_and_cut_as_told(processor, arguments, length):
    plain = processor.apply_chat_template(question(), **CHAT)
    for inputs in (
        processor.apply_chat_template(question(), **CHAT, processor_kwargs=arguments),
        processor(
            text=processor.apply_chat_template(question()), images=[IMAGE, IMAGE], return_tensors="pt", **arguments
        ),
    ):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert ids.shape == mask.shape == (1, length)
        real = ids[mask.bool()]
        assert torch.equal(real, plain["input_ids"][0, : len(real)])
        assert bool(mask[0, -1])  # padded on the left
        assert torch.equal(inputs["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_never_cuts_placeholders(processor, side, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    with pytest.raises(ValueError, match=r"would cut \d of the 8 image placeholders of a prompt of 286 tokens"):
        processor.apply_chat_template(question(), **CHAT, processor_kwargs={"truncation": True, "max_length": 60})


@pytest.mark.parametrize("side", ["left", "right"])
def test_messages_of_the_assistant_are_marked(processor, side):
    batch = [question("a very round circle"), question()[:2], [{"role": "user", "content": "hello"}]]
    inputs = processor.apply_chat_template(
        batch, **CHAT, return_assistant_tokens_mask=True, processor_kwargs={"padding_side": side}
    )
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    said = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert said == ["look again<|eot_id|>a very round circle<|end_of_text|>", "look again<|end_of_text|>", ""]


def test_a_template_that_marks_nothing_gives_no_mask(processor):
    unmarked = re.sub(r"\{%-? *(end)?generation *-?%\}", "", processor.chat_template)
    assert processor.apply_chat_template(question(), chat_template=unmarked) == processor.apply_chat_template(
        question()
    )
    with pytest.raises(ValueError, match=r"{% generation %}"):
        processor.apply_chat_template(question(), **CHAT, return_assistant_tokens_mask=True, chat_template=unmarked)


@pytest.mark.parametrize(
    "place",
    [
        lambda n: {"num_frames": n},
        lambda n: {"processor_kwargs": {"num_frames": n}},
        lambda n: {"processor_kwargs": {"videos_kwargs": {"num_frames": n}}},
    ],
)
def test_num_frames_of_a_conversation_is_accepted_in_every_place(processor, place):
    conversation = [{"role": "user", "content": [{"type": "video", "video": CLIP}, {"type": "text", "text": "what?"}]}]
    assert processor.apply_chat_template(conversation, **CHAT, **place(3))["pixel_values"].shape[0] == 3
    with pytest.raises(ValueError, match="`num_frames` was given twice, as 3 and 4"):
        processor.apply_chat_template(conversation, num_frames=3, processor_kwargs={"num_frames": 4})
    with pytest.raises(TypeError, match="`fps` is not supported: pass `num_frames`"):
        processor.apply_chat_template(conversation, **CHAT, processor_kwargs={"videos_kwargs": {"fps": 2}})


def test_images_are_processed_as_told(processor):
    text = processor.apply_chat_template(question())
    raw = processor(text=text, images=[IMAGE, IMAGE], images_kwargs={"do_rescale": False, "do_normalize": False})
    assert raw["pixel_values"].max() > 1
    same = processor(text=text, images=[IMAGE, IMAGE], do_rescale=False, do_normalize=False)
    assert torch.equal(same["pixel_values"], raw["pixel_values"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_kwargs": {"colour": 1}}, r"unexpected arguments: text_kwargs\['colour'\]"),
        ({"videos_kwargs": {"fps": 2}}, "unexpected arguments: videos_kwargs"),
        ({"return_overflowing_tokens": True}, "does not support return_overflowing_tokens"),
        ({"text_kwargs": {"stride": 3}}, "does not support stride"),
    ],
)
def test_arguments_without_a_meaning_are_refused(processor, arguments, message):
    with pytest.raises(TypeError, match=message):
        processor(text="x", **arguments)


def test_a_longest_length_must_be_known(processor, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 10**30)
    with pytest.raises(ValueError, match="needs `max_length`"):
        processor(text="x", padding="max_length")


def test_placeholders_of_images_are_counted_as_a_call_does(processor):
    inputs = processor.apply_chat_template(question(), **CHAT, processor_kwargs={"return_mm_token_type_ids": True})
    sizes = [(30, 40), (40, 30)]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert counted["num_image_tokens"] == [4, 4]
    assert int(inputs["mm_token_type_ids"].sum()) == 8
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)


def test_a_completion_tokenised_by_itself_has_no_bos_in_front(processor):
    """What trainers on prompts and completions put together equals the conversation as a whole."""
    whole = processor.apply_chat_template(question(), **CHAT)["input_ids"][0].tolist()
    prompt = processor.apply_chat_template(question()[:-1], add_generation_prompt=True)
    rendered = processor.apply_chat_template(question())
    assert rendered.startswith(prompt)
    texts = {"text": rendered.removeprefix(prompt), "add_special_tokens": False}
    completion = processor(**texts)["input_ids"][0]
    start = processor(text=prompt, images=[IMAGE, IMAGE], add_special_tokens=False)["input_ids"][0]
    assert start + completion == whole
    assert completion == processor(text_kwargs={"add_special_tokens": False}, text=texts["text"])["input_ids"][0]
    assert processor(text=texts["text"])["input_ids"][0] == [processor.tokenizer.bos_token_id, *completion]
