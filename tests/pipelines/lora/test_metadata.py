import json
import re
import sys

import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from omni_video_hf.pipelines.lora.metadata import check_lora_metadata
from omni_video_hf.utils.read_budget import read_budget

ENDLESS = [
    r"(a+)+b", r"(a*)*b", r"((a|b)+)*c", r"(a|a)*b", r"(a|ab)*c", r"(a?){40}b", r".*.*.*.*.*b", r"(a|a)" * 40 + "c",
    r"(?:a{1,60}){1,60}b", r"(.)\1*x", r"(?=(a+)+b)",
]  # fmt: skip
USUAL = [
    r"adapter\..*(v_proj|fc2)",
    r".*transformer_blocks.*\.(to_q|to_k|to_v|to_out\.0)",
    r"model\.layers\.\d+\..*(q_proj|k_proj)$",
    r"^(?!.*vision).*q_proj",
    r"blocks\.[0-9]{1,2}\.attn",
    "to_k",
]


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ENDLESS)
def test_endless_keys(name, pattern):
    with pytest.raises(ValueError, match=rf"fox\.safetensors: the .*adapter\.{name}"):
        check_lora_metadata({f"adapter.{name}": {"to_k": 4, pattern: 8}}, "fox.safetensors")


def test_usual_settings_pass():
    check_lora_metadata(None, "x")
    for pattern in USUAL:
        check_lora_metadata({"mllm.target_modules": pattern, "mllm.rank_pattern": {"to_k": 2}}, "x")
    names = [f"blocks.{number}.to_k" for number in range(3000)]
    check_lora_metadata({"mllm.target_modules": names, "mllm.r": 4, "mllm.init_lora_weights": True}, "x")
    check_lora_metadata({"mllm.rank_pattern": {f"^{name}": 2 for name in names}}, "x")


def test_a_pattern_that_is_no_expression():
    with pytest.raises(ValueError, match=r"rank_pattern' has the pattern '\(unclosed'"):
        check_lora_metadata({"transformer.rank_pattern": {"(unclosed": 2}}, "fox.safetensors")


def test_settings_that_are_not_an_object():
    with pytest.raises(ValueError, match="must be a JSON object"):
        check_lora_metadata(["target_modules"], "fox.safetensors")


def test_the_limit_can_be_raised():
    metadata = {"mllm.rank_pattern": {".*" * 4 + "x": 2}}
    with pytest.raises(ValueError, match="OMNI_VIDEO_READ_MAX_STEPS"):
        check_lora_metadata(metadata, "x")
    with read_budget(max_steps=10**10):
        check_lora_metadata(metadata, "x")


HOSTILE = r"((\w|\.)+)+!"


def hostile_file(pipe, path, **settings):
    """A LoRA of one layer whose settings say what is given."""
    name, layer = next((n, m) for n, m in pipe.transformer.named_modules() if n.endswith("to_k"))
    weights = {
        f"transformer.{name}.lora_A.weight": torch.zeros(2, layer.in_features),
        f"transformer.{name}.lora_B.weight": torch.zeros(layer.out_features, 2),
    }
    said = {f"transformer.{key}": value for key, value in ({"r": 2, "lora_alpha": 2} | settings).items()}
    save_file(weights, path, {"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    return name


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_hostile_file_is_not_loaded(tmp_path, setting):
    pipe = tiny.pipeline()
    assert re.compile(HOSTILE)
    hostile_file(pipe, tmp_path / "fox.safetensors", **{setting: {HOSTILE: 2}})
    with pytest.raises(ValueError, match=r"fox\.safetensors: the "):
        pipe.load_lora_weights(tmp_path / "fox.safetensors")
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("target_modules", HOSTILE),
        ("exclude_modules", HOSTILE),
        ("layers_pattern", HOSTILE),
        ("megatron_core", "antigravity"),
        ("megatron_config", {"antigravity": True}),
        ("auto_mapping", {"base_model_class": "Antigravity", "parent_library": "antigravity"}),
    ],
)
def test_settings_of_a_file_beyond_rank_and_alpha_never_reach_peft(tmp_path, setting, value):
    """Settings that peft would match against every name, or import code for."""
    pipe = tiny.pipeline()
    name = hostile_file(pipe, tmp_path / "fox.safetensors", **{setting: value})
    pipe.load_lora_weights(tmp_path / "fox.safetensors", adapter_name="fox")
    config = pipe.transformer.peft_config["fox"]
    assert set(config.target_modules) == {name}
    if setting != "target_modules":
        assert getattr(config, setting) == getattr(LoraConfig(), setting)
    assert "antigravity" not in sys.modules
