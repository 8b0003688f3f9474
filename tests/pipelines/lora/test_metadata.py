import json
import re

import pytest
import tiny
import torch
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


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "layers_pattern"])
@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_may_never_end(name, pattern):
    with pytest.raises(ValueError, match=rf"fox\.safetensors: the .*transformer\.{name}"):
        check_lora_metadata({f"transformer.{name}": pattern}, "fox.safetensors")


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ENDLESS)
def test_endless_keys(name, pattern):
    with pytest.raises(ValueError, match=f"adapter.{name}"):
        check_lora_metadata({f"adapter.{name}": {"to_k": 4, pattern: 8}}, "fox.safetensors")


def test_usual_settings_pass():
    check_lora_metadata(None, "x")
    for pattern in USUAL:
        check_lora_metadata({"mllm.target_modules": pattern, "mllm.rank_pattern": {"to_k": 2}}, "x")
    names = [f"blocks.{number}.to_k" for number in range(3000)]
    check_lora_metadata({"mllm.target_modules": names, "mllm.r": 4, "mllm.init_lora_weights": True}, "x")
    check_lora_metadata({"mllm.rank_pattern": {f"^{name}": 2 for name in names}}, "x")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("megatron_core", "antigravity"),
        ("megatron_config", {}),
        ("auto_mapping", {"parent_library": "antigravity"}),
        ("init_lora_weights", "pissa_niter_1000000"),
        ("init_lora_weights", "loftq"),
        ("target_modules", "(unclosed"),
    ],
)
def test_settings_that_do_something_else(setting, value):
    with pytest.raises(ValueError, match=setting):
        check_lora_metadata({f"transformer.{setting}": value}, "fox.safetensors")


def test_not_a_table():
    with pytest.raises(ValueError, match="must be a table"):
        check_lora_metadata(["target_modules"], "fox.safetensors")


def test_the_limit_can_be_raised():
    metadata = {"mllm.target_modules": ".*" * 4 + "x"}
    with pytest.raises(ValueError, match="OMNI_VIDEO_READ_MAX_STEPS"):
        check_lora_metadata(metadata, "x")
    with read_budget(max_steps=10**9):
        check_lora_metadata(metadata, "x")


def test_a_hostile_file_is_not_loaded(tmp_path):
    pipe = tiny.pipeline()
    name, layer = next((n, m) for n, m in pipe.transformer.named_modules() if n.endswith("to_k"))
    weights = {
        f"transformer.{name}.lora_A.weight": torch.zeros(2, layer.in_features),
        f"transformer.{name}.lora_B.weight": torch.zeros(layer.out_features, 2),
    }
    settings = {"transformer.r": 2, "transformer.target_modules": r"((\w|\.)+)+!"}
    assert re.compile(settings["transformer.target_modules"])
    file = tmp_path / "fox.safetensors"
    save_file(weights, file, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ValueError, match=r"fox\.safetensors: the LoRA setting 'transformer\.target_modules'"):
        pipe.load_lora_weights(file)
    assert not pipe.get_list_adapters()
