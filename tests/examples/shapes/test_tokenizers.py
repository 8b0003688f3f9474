import hashlib
import json

import pytest

from examples.shapes.tokenizers import MLLM_TOKENS, VOCABULARY_SIZE, mllm_tokenizer, text_tokenizer
from omni_video_hf.processing.processing_omni_video import CHAT_TEMPLATE, SYSTEM_PROMPT
from omni_video_hf.shapes import ShapesDataset

DIGESTS = {
    mllm_tokenizer: "03384856bf31d026349ba41d74a0f8801affb9e94124457a85aa3a838795ad73",
    text_tokenizer: "330b9e9d1f9a4c68cb04a8933d3ab54f5dec73280eaa1ddcd654f584f3b9ca7f",
}


@pytest.fixture(scope="module")
def mllm():
    return mllm_tokenizer()


@pytest.fixture(scope="module")
def text():
    return text_tokenizer()


@pytest.mark.parametrize("build", DIGESTS)
def test_training_gives_the_same_tokenizer_everywhere(build):
    """Stored: embeddings that were trained with one tokenizer are worth nothing with another."""
    learned = json.loads(build().backend_tokenizer.to_str())["model"]
    text = json.dumps([learned["vocab"], learned["merges"]], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == DIGESTS[build]


def test_vocabulary(mllm, text):
    assert len(text) == VOCABULARY_SIZE
    assert len(mllm) == VOCABULARY_SIZE + 1
    assert mllm.convert_tokens_to_ids("<image>") == VOCABULARY_SIZE
    assert mllm.convert_tokens_to_ids(list(MLLM_TOKENS)) == list(range(len(MLLM_TOKENS)))
    assert [text.pad_token_id, text.eos_token_id] == [0, 1]


def test_control_tokens_of_the_chat_are_single_tokens(mllm):
    for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        assert token in CHAT_TEMPLATE
    for token in MLLM_TOKENS:
        assert mllm(token, add_special_tokens=False).input_ids == [mllm.convert_tokens_to_ids(token)]


def test_bos_and_eos(mllm, text):
    assert mllm("red").input_ids[0] == mllm.bos_token_id
    assert mllm("red").input_ids[-1] != mllm.eos_token_id
    assert text("red").input_ids[-1] == text.eos_token_id
    assert text(["red", "a red circle"], padding=True).input_ids[0][-1] == text.pad_token_id


def test_any_text_survives_but_for_capitals(mllm):
    for sentence in ("A large red circle.", "générer 日本\n\n\t!", SYSTEM_PROMPT):
        assert mllm.decode(mllm(sentence).input_ids, skip_special_tokens=True) == sentence.lower()
    assert mllm("Make IT red").input_ids == mllm("make it red").input_ids


def test_texts_of_the_data_set_are_short(mllm, text):
    """About a token a word, in the splits it was not trained on as well."""
    for task in ("t2i", "t2v", "i2i", "v2v"):
        for split in ("seen", "composition"):
            dataset = ShapesDataset(task, split, 200)
            prompts = [dataset.example(index).prompt for index in range(200)]
            words = sum(len(prompt.split()) for prompt in prompts)
            for tokenizer in (mllm, text):
                assert sum(map(len, tokenizer(prompts).input_ids)) < 1.3 * words + 2 * len(prompts)
