"""Memory of Omni-Video 2 at full size, from models on the meta device."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, UMT5Config, UMT5EncoderModel

from omni_video_hf import OmniVideo2Adapter
from omni_video_hf.pipelines.memory.profiles import OMNI_VIDEO_2_PROFILES, estimate_memory, get_memory_profile
from omni_video_hf.pipelines.memory.table import memory_rows

WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 13824, "num_layers": 40}
TEXT = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
}


@pytest.fixture(scope="module")
def headers():
    """Headers of an A14B repository at full size."""
    with torch.device("meta"):
        parts = {
            "mllm": Qwen3VLMoeForConditionalGeneration(
                Qwen3VLMoeConfig(text_config=TEXT, vision_config={"out_hidden_size": 2048})
            ),
            "text_encoder": UMT5EncoderModel(
                UMT5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=256384)
            ),
            "vae": AutoencoderKLWan(),
        }
        for suffix in ("", "_2"):
            parts[f"adapter{suffix}"] = OmniVideo2Adapter()
            parts[f"transformer{suffix}"] = WanTransformer3DModel(**WAN_14B)
    return {
        f"{name}/weights.safetensors": {
            key: ("BF16", tuple(value.shape), value.numel() * 2) for key, value in part.state_dict().items()
        }
        for name, part in parts.items()
    }


def count(headers, name):
    return sum(num_bytes // 2 for _, _, num_bytes in headers[f"{name}/weights.safetensors"].values())


def test_two_experts_of_14b(headers):
    assert count(headers, "transformer") == count(headers, "transformer_2") == 14_288_491_584
    assert 30e9 < count(headers, "mllm") < 32e9


def test_what_cards_of_24_and_80_gb_need(headers):
    for name, profile in OMNI_VIDEO_2_PROFILES.items():
        estimate = estimate_memory(headers, profile)
        assert {"adapter_2", "transformer_2"} <= estimate.accelerator.keys()
        assert estimate.peak < profile.gibibytes * 2**30, name
        assert 125e9 < estimate.main < 135e9
    assert estimate_memory(headers, None).peak > 125e9
    assert [row["memory"] for row in memory_rows(headers)] == [None, *OMNI_VIDEO_2_PROFILES]


def test_profiles_belong_to_a_version():
    assert get_memory_profile("24GB", "OmniVideo2Pipeline").offload == "group"
    assert get_memory_profile("24GB").offload == "model"
    with pytest.raises(ValueError, match="80GB"):
        get_memory_profile("8GB", "OmniVideo2Pipeline")
