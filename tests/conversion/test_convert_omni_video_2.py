"""Upstream's folders of Omni-Video 2: what comes out, and what is refused."""

import json
import os
import pickle
import shutil

import pytest
import torch
from golden_2 import DECODER_HEADS, MLLMS, original, prompts, shared_config
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conversion.authors_prompts import read_prompts
from conversion.convert_omni_video import app
from conversion.convert_omni_video_2 import convert
from conversion.original_checkpoint_2 import find_layout
from omni_video_hf import OmniVideo2Adapter, OmniVideo2Pipeline
from omni_video_hf.hub.repository import read_header
from omni_video_hf.pipelines.omni_video_2.prompts import DEFAULT_PROMPTS


@pytest.fixture
def folder(tmp_path):
    """A copy of A14B to damage."""
    return original(tmp_path)


def refused(folder, output, *messages, **options):
    given = {"mllm": str(MLLMS["A14B"]), "decoder_heads": DECODER_HEADS} | options
    with pytest.raises(ValueError) as error:
        convert(folder, output, **given)
    assert all(str(message) in str(error.value) for message in messages), str(error.value)
    assert not output.exists()
    assert not output.with_name(f"{output.name}.incomplete").exists()


def change(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content.get("module", content.get("model", content)))
    torch.save(content, path)


def test_the_layout_is_found(folder, tmp_path):
    assert find_layout(folder) == "A14B"
    assert find_layout(original(tmp_path, "1.3B")) == "1.3B"
    assert find_layout(tmp_path) is None
    (folder / "low_noise_model" / "model.pt").unlink()
    with pytest.raises(ValueError, match="low_noise_model"):
        find_layout(folder)


@pytest.mark.parametrize("layout", MLLMS)
def test_every_weight_comes_through(converted_2, layout, tmp_path):
    pipe = OmniVideo2Pipeline.from_pretrained(converted_2[layout])
    experts = 2 if layout == "A14B" else 1
    assert sum(part is not None for part in (pipe.transformer, pipe.transformer_2)) == experts
    assert pipe.config.boundary_ratio == (0.875 if experts == 2 else None)
    assert pipe.config.prompts == prompts() | {"negative": "blurred, grey"}
    assert sorted(pipe.config.presets) == ["t2v", "v2v"]
    root = original(tmp_path, layout)
    file = root / ("low_noise_model/model.pt" if experts == 2 else "transformer/pytorch_model.pt")
    weights = torch.load(file, weights_only=True)
    weights = weights.get("model", weights)
    adapter = pipe.adapter_2 if experts == 2 else pipe.adapter
    assert torch.equal(adapter.mllm_proj.weight, weights["vlm_proj.weight"])
    assert adapter.marker_embeds().shape == (4, 32)
    stored = load_file(converted_2[layout] / "mllm" / "model.safetensors")
    assert stored.keys() == load_file(MLLMS[layout] / "model.safetensors").keys(), "copied as it was"


def test_dtype_and_own_prompts(folder, tmp_path):
    convert(folder, tmp_path / "out", str(MLLMS["A14B"]), dtype=torch.bfloat16, decoder_heads=DECODER_HEADS)
    for name in ("adapter", "adapter_2", "transformer_2"):
        header = read_header(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors")
        assert {dtype for dtype, _, _ in header.values()} == {"BF16"}
    adapter = OmniVideo2Adapter.from_pretrained(tmp_path / "out", subfolder="adapter")
    assert adapter.config.max_context_length == 6144
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["prompts"] == DEFAULT_PROMPTS


# --- the prompts of the authors -------------------------------------------------------------------------------------


def test_prompts_are_read_and_nothing_runs(tmp_path):
    path = shared_config(tmp_path)
    marker = tmp_path / "ran"
    path.write_text(f"open({str(marker)!r}, 'w')\n{path.read_text()}")
    assert read_prompts(path) == prompts() | {"negative": "blurred, grey"}
    assert not marker.exists()
    nested = tmp_path / "code" / "omnivideo" / "configs"
    nested.mkdir(parents=True)
    shutil.copy(path, nested / "shared_config.py")
    assert read_prompts(tmp_path / "code") == read_prompts(path)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"sample_neg_prompt_en": None}, "", "has no sample_neg_prompt_en"),
        ({"feature_extraction_system_prompt": " "}, "", "feature_extraction_system_prompt must be a string"),
        ({}, "\ncfg.sample_neg_prompt_en = input()", "must be a string"),
        ({}, "\ncfg.sample_neg_prompt_en = 'again'", "a second time"),
        ({}, "\nif", "is no Python file"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, changes, more, message):
    path = shared_config(tmp_path, **changes)
    path.write_text(path.read_text() + more)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_mllm_that_does_not_fit_is_refused(folder, tmp_path):
    refused(folder, tmp_path / "out", "'qwen3_vl'", "'qwen3_vl_moe'", mllm=str(MLLMS["1.3B"]))
    refused(folder, tmp_path / "out", "`--mllm` is missing", mllm=None)
    narrow = shutil.copytree(MLLMS["A14B"], tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    config["text_config"]["hidden_size"] = 48
    (narrow / "config.json").write_text(json.dumps(config))
    refused(folder, tmp_path / "out", "48 wide", "states of 40", mllm=str(narrow))
    other = shutil.copytree(MLLMS["A14B"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    refused(folder, tmp_path / "out", "lm_head.weight", mllm=str(other))


@pytest.mark.parametrize("name", ["high_noise_model/model.pt", "low_noise_model/model.pt"])
def test_every_key_must_be_used_and_fit(folder, tmp_path, name):
    untouched = (folder / name).read_bytes()
    for edit, message in (
        (lambda weights: weights.update({"surprise.weight": torch.zeros(2)}), "surprise.weight"),
        (lambda weights: weights.update({"wan_model.surprise.weight": torch.zeros(2)}), "surprise.weight"),
        (lambda weights: weights.pop("vlm_norm.weight"), "mllm_norm.weight"),
        (lambda weights: weights.pop("wan_model.blocks.1.ffn.0.weight"), "blocks.1.ffn.net.0.proj.weight"),
        (lambda weights: weights.update({"vlm_norm.weight": torch.ones(41)}), "of another shape"),
    ):
        change(folder / name, edit)
        refused(folder, tmp_path / "out", name, message)
        (folder / name).write_bytes(untouched)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickles_cannot_run_code(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "special_tokens.pkl").write_bytes(pickle.dumps({"<img_st>": Payload(marker)}))
    refused(folder, tmp_path / "out", "special_tokens.pkl")
    assert not marker.exists()


def test_markers_must_be_the_four(folder, tmp_path):
    (folder / "special_tokens.pkl").write_bytes(pickle.dumps({"<img_st>": torch.zeros(1, 32)}))
    refused(folder, tmp_path / "out", "special_tokens.pkl", "<prp_ed>")


def test_missing_files_and_heads(folder, tmp_path):
    refused(folder, tmp_path / "out", "48 wide", decoder_heads=None)
    (folder / "Wan2.1_VAE.pth").unlink()
    refused(folder, tmp_path / "out", "Wan2.1_VAE.pth", "--wan-repo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mllm", str(MLLMS["A14B"]), "--without-markers"], "does not apply"),
        ([], "`--mllm` is missing"),
    ],
)
def test_the_command_finds_the_version(folder, tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["--original", str(folder), "--output", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
