import json
import shutil
from pathlib import Path

import pytest
from golden import CORE
from tokenizers import AddedToken

from conversion.original_checkpoint import OriginalCheckpoint
from conversion.vila_settings import (
    CONFIG,
    GENERATION_CONFIG,
    LLM_CONFIG,
    PREPROCESSOR_CONFIG,
    generation_config,
    generation_token_id,
    generation_token_notes,
    vila_config,
    vila_processor,
    vila_tokenizer,
)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy to change."""
    return OriginalCheckpoint(Path(shutil.copytree(CORE / "omni_ckpts", tmp_path / "omni_ckpts")))


@pytest.fixture
def tokenizer(checkpoint):
    return vila_tokenizer(checkpoint)


def change(checkpoint, file, **values):
    content = json.loads((checkpoint.root / file).read_text()) | values
    content = {name: value for name, value in content.items() if value is not ...}
    (checkpoint.root / file).write_text(json.dumps(content))


def test_configuration_is_upstreams(checkpoint, tokenizer):
    config = vila_config(checkpoint, tokenizer)
    assert config.image_token_id == 160
    assert config.vision_feature_layer == -2
    assert config.text_config.rope_parameters["rope_theta"] == 500000.0
    assert config.text_config.vocab_size == 160
    assert config.vision_config.hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        (CONFIG, "s2", 1, "s2 is 1; only False"),
        (CONFIG, "mm_use_im_patch_token", ..., "mm_use_im_patch_token is True; only False"),
        (CONFIG, "mm_vision_select_layer", True, "mm_vision_select_layer is True"),
        (CONFIG, "mm_vision_select_layer", -9, "make no configuration"),
        (LLM_CONFIG, "model_type", "no_such_model", "make no configuration"),
        (LLM_CONFIG, "hidden_size", "wide", "make no configuration"),
        (LLM_CONFIG, "model_type", ..., "has no 'model_type'"),
        (LLM_CONFIG, "auto_map", {"AutoModel": "code.Model"}, "refers to code"),
        (PREPROCESSOR_CONFIG, "resample", 2, "resample is 2; only 3"),
    ],
)
def test_settings_that_are_not_reproduced(checkpoint, tokenizer, file, key, value, message):
    change(checkpoint, file, **{key: value})
    with pytest.raises(ValueError, match=message) as error:
        vila_config(checkpoint, tokenizer)
    place = checkpoint.root / ("ar_model/checkpoint" if message == "make no configuration" else file)
    assert f"{place}: " in str(error.value)


def test_the_patch_token_may_be_in_the_tokenizer_already(checkpoint, tokenizer):
    change(checkpoint, CONFIG, mm_use_im_patch_token=True)
    tokenizer.add_tokens("<im_patch>", special_tokens=True)
    assert vila_config(checkpoint, tokenizer).vision_feature_layer == -2


def test_image_token_goes_behind_the_vocabulary_or_stays_where_it_is(checkpoint, tokenizer):
    assert tokenizer.convert_tokens_to_ids("<image>") == 160
    folder = checkpoint.root / "ar_model/checkpoint/llm"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    last = next(token for token in vocabulary["added_tokens"] if token["id"] == 159)
    last["content"] = "<image>"
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    (folder / "special_tokens_map.json").unlink()
    change(checkpoint, "ar_model/checkpoint/llm/tokenizer_config.json", pad_token=..., added_tokens_decoder=...)
    assert vila_tokenizer(checkpoint).convert_tokens_to_ids("<image>") == 159


def test_generation_tokens(tokenizer):
    assert generation_token_id(tokenizer, "[GEN_IMG]") == 98
    assert generation_token_notes(tokenizer) == []
    plain = _without_generation_tokens(tokenizer)
    assert generation_token_id(plain, "[GEN_VID]") == tokenizer.bos_token_id + 3
    assert ["splits" in note for note in generation_token_notes(plain)] == [True, True]
    plain.add_tokens(AddedToken("[GEN_VID]", special=True))
    assert generation_token_id(plain, "[GEN_VID]") == len(plain) - 1
    assert "upstream looks for 99" in generation_token_notes(plain)[1]


def _without_generation_tokens(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["content"] = token["content"].replace("[GEN_", "<reserved_")
    fresh = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return type(tokenizer)(tokenizer_object=fresh, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def test_sampling_is_upstreams_and_the_rest_is_kept(checkpoint, tokenizer):
    change(checkpoint, GENERATION_CONFIG, repetition_penalty=1.3, temperature=0.6, top_p=0.9, eos_token_id=[97, 105])
    config = generation_config(checkpoint, tokenizer)
    assert (config.do_sample, config.temperature, config.top_p, config.max_new_tokens) == (True, 0.2, 1.0, 512)
    assert config.repetition_penalty == 1.3
    assert config.eos_token_id == [97, 105]
    assert config.pad_token_id == tokenizer.pad_token_id
    change(checkpoint, GENERATION_CONFIG, cache_implementation="no such cache")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        generation_config(checkpoint, tokenizer)


def test_processor(checkpoint, tokenizer):
    config = vila_config(checkpoint, tokenizer)
    change(checkpoint, PREPROCESSOR_CONFIG, image_mean=[0.4, 0.5, 0.6])
    change(checkpoint, CONFIG, image_aspect_ratio="pad")
    processor = vila_processor(checkpoint, config, tokenizer)
    assert list(processor.image_processor.image_mean) == [0.4, 0.5, 0.6]
    assert processor.image_aspect_ratio == "pad"
    assert (processor.num_image_tokens, processor.model_max_length) == (4, 400)
    for file, key, value in (
        (PREPROCESSOR_CONFIG, "size", {"height": 10, "width": 10}),
        (PREPROCESSOR_CONFIG, "do_normalize", False),
        (LLM_CONFIG, "tokenizer_model_max_length", "long"),
    ):
        before = (checkpoint.root / file).read_text()
        change(checkpoint, file, **{key: value})
        with pytest.raises(ValueError, match=key):
            vila_processor(checkpoint, config, tokenizer)
        (checkpoint.root / file).write_text(before)
