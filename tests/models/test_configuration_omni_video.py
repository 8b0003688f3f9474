import pytest
import tiny
import torch
from transformers import AutoConfig, Qwen2_5_VLConfig

from omni_video_hf import OmniVideoConfig, OmniVideoForConditionalGeneration, VilaConfig


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def upstream_bridge(width: int, input_width: int, queries: int) -> int:
    """Parameters of upstream's bridge: two linear layers, queries, and a `torch.nn.Transformer`."""
    with torch.device("meta"):
        network = torch.nn.Transformer(width, 8, 4, 4, 4 * width, norm_first=True, batch_first=True)
        projection = torch.nn.Sequential(torch.nn.Linear(input_width, width), torch.nn.Linear(width, width))
    return count(network) + count(projection) + queries * width


def test_defaults_are_the_released_11b():
    with torch.device("meta"):
        model = OmniVideoForConditionalGeneration(OmniVideoConfig())
    assert count(model.vision_head) == upstream_bridge(1152, 4096, 4) == 154_840_320  # "155 M"
    assert count(model.adapter.query_transformer) == upstream_bridge(4096, 1152, 256) == 1_902_141_440  # "1.90 B"
    assert count(model.adapter.visual_context_adapter) == 16 * 16 * 1536 + 1536 + 1536 * 4096 + 4096  # "6.7 M"
    assert count(model.decoder) == 1_418_996_800  # Wan2.1-T2V-1.3B
    language = count(model.mllm.model.language_model) + count(model.mllm.lm_head)
    assert language == 8_030_261_248 + 2 * 4096  # Llama-3-8B and its `[PAD]` row, in and out
    shapes = {name: tuple(value.shape) for name, value in model.named_buffers()}
    assert shapes["vision_head.null_hidden_states.weight"] == (164, 4096)
    assert shapes["adapter.marker_embeds.weight"] == (6, 4096)


def test_an_image_takes_196_tokens():
    assert VilaConfig().image_seq_length == 196
    assert VilaConfig(vision_config=dict(tiny.VISION)).image_seq_length == 4


@pytest.mark.parametrize("parts", [{}, {"adapter_config": None}, {"adapter_config": None, "decoder_config": None}])
def test_save_and_load(tmp_path, parts):
    config = tiny.config(**parts)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is OmniVideoConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.adapter_config is None) == ("adapter_config" in parts)
    assert (loaded.decoder_config is None) == ("decoder_config" in parts)


@pytest.mark.parametrize(
    ("overrides", "numbers"),
    [
        ({"vision_head_config": tiny.VISION_HEAD | {"mllm_hidden_size": 64}}, ("64", "48")),
        ({"vision_head_config": tiny.VISION_HEAD | {"hidden_size": 32}}, ("24", "32")),
        ({"decoder_config": tiny.DECODER | {"text_dim": 64}}, ("32", "64")),
        ({"adapter_config": tiny.ADAPTER | {"num_image_vision_tokens": 5}}, ("5", "4")),
        ({"adapter_config": tiny.ADAPTER | {"num_attention_heads": 5}}, ("32", "5")),
        ({"mllm_config": {"vision_config": dict(tiny.VISION), "vision_feature_layer": -9}}, ("-9", "3")),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_both_numbers(overrides, numbers):
    with pytest.raises(ValueError) as error:
        tiny.config(**overrides)
    assert all(number in str(error.value) for number in numbers)


def test_any_image_text_to_text_model_can_be_the_mllm():
    text = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen = Qwen2_5_VLConfig(text_config=text | {"intermediate_size": 64, "vocab_size": 200})
    config = tiny.config(mllm_config=qwen)
    assert config.get_text_config().hidden_size == 48
    with torch.device("meta"):
        model = OmniVideoForConditionalGeneration(config)
    assert type(model.mllm).__name__ == "Qwen2_5_VLForConditionalGeneration"


def test_the_configuration_of_another_model_is_refused(tmp_path):
    tiny.config().mllm_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'vila', not 'omni_video'"):
        OmniVideoConfig.from_pretrained(tmp_path)
