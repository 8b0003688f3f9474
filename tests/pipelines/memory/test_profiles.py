"""Profiles on the CPU: nothing moves there, but every switch is the one that an accelerator gets."""

import json

import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan, PipelineQuantizationConfig, WanTransformer3DModel
from transformers import QuantoConfig, UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner

from omni_video_hf import OmniVideoAdapter, OmniVideoConfig, OmniVideoForConditionalGeneration, OmniVideoPipeline
from omni_video_hf.cli.main import app
from omni_video_hf.hub.inspection import repository_headers
from omni_video_hf.models.configuration_omni_video import WAN_2_1_T2V_1_3B
from omni_video_hf.pipelines.memory.profiles import COMPONENTS, DTYPES, PROFILES, estimate_memory, get_memory_profile
from omni_video_hf.training.lora import add_lora, save_lora

UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "omni-video-tiny"
    tiny.pipeline(vision_width=32).save_pretrained(folder)  # torch's 8-bit kernel for the CPU wants multiples of 16
    return folder


def load(repository, **arguments):
    pipe = OmniVideoPipeline.from_pretrained(repository, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **arguments):
    arguments = {"task": "t2v", "negative_prompt": "a dog", "output_type": "pt"} | arguments
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **arguments).frames


def stored_bytes(module):
    """Bytes of everything in a module's files; a quantised matrix is its integers and its scales."""

    def size(tensor):
        parts = (
            [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if is_quantized(tensor) else [tensor]
        )
        return sum(part.numel() * part.element_size() for part in parts)

    names = module.state_dict().keys()
    tensors = dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if n in names}
    return sum(size(tensor) for tensor in tensors.values())


def is_quantized(tensor):
    return type(tensor).__name__ == "WeightQBytesTensor"


# --- profiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_apply_their_settings(repository, name):
    profile = PROFILES[name]
    pipe = load(repository, memory=name, memory_device="cpu")
    quantized = {part for part in COMPONENTS if any(is_quantized(p) for p in getattr(pipe, part).parameters())}
    assert quantized == set(profile.quantized)
    assert pipe.vae.dtype == torch.float32
    assert pipe.transformer.dtype == pipe.adapter.dtype == torch.bfloat16
    assert pipe.vae.use_tiling is profile.tile_vae
    assert len(getattr(pipe, "_all_hooks", [])) == (len(COMPONENTS) if profile.offload == "model" else 0)
    assert pipe._maybe_raise_error_if_group_offload_active() is (profile.offload == "group")

    frames = run(pipe)
    assert torch.isfinite(frames).all()
    plain = run(load(repository, dtype=dict(DTYPES)))
    error = float((frames - plain).norm() / plain.norm())
    assert (0 < error < 0.2) if profile.quantized else error == 0
    assert pipe("what?", task="understand", max_new_tokens=2).text


@pytest.mark.parametrize("name", [None, *PROFILES])
def test_estimates_are_what_is_loaded(repository, name):
    profile = PROFILES.get(name)
    pipe = load(repository, **({"memory": name, "memory_device": "cpu"} if name else {"dtype": "auto"}))
    total = sum(stored_bytes(getattr(pipe, part)) for part in COMPONENTS)
    estimate = estimate_memory(repository_headers(repository), profile)
    if profile:
        assert estimate.main == pytest.approx(total, rel=0.02)  # parts that stay in float32 are small but not nothing
    else:
        nothing = estimate_memory({f"{part}/x": {"x": ("F32", (0,), 0)} for part in COMPONENTS}, None)
        weights = {part: estimate.accelerator[part] - nothing.accelerator[part] for part in COMPONENTS}
        assert list(weights.values()) == pytest.approx([total] * len(COMPONENTS), rel=0.02)
        assert estimate.main == 0


def test_without_a_profile_the_estimate_has_the_stored_formats():
    def sizes(code, width):
        headers = {f"{part}/x": {"x.weight": (code, (1000, 1000), width * 10**6)} for part in COMPONENTS}
        return [estimate_memory(headers, profile).accelerator["mllm"] for profile in (None, PROFILES["24GB"])]

    stored, profile = sizes("F32", 4)
    assert stored - sizes("BF16", 2)[0] == 4 * 2 * 10**6  # of all parts but the VAE, which is float32 in both
    assert profile == sizes("BF16", 2)[1]


def test_a_call_runs_its_parts_one_after_the_other(repository):
    """With model offload a part that ran twice, with another between, would meet the other on the accelerator."""
    pipe = load(repository)
    runs = []
    for name in COMPONENTS[:-1]:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    pipe.mllm.generation_config.update(eos_token_id=None)
    run(pipe)
    assert [name for index, name in enumerate(runs) if index == 0 or runs[index - 1] != name] == list(COMPONENTS[:-1])
    assert pipe.model_cpu_offload_seq.split("->") == list(COMPONENTS)


def headers_of(model):
    return {
        name: (DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())
        for name, tensor in model.state_dict().items()
    }


def test_the_released_model_fits_every_profile():
    with torch.device("meta"):
        models = {
            "mllm": OmniVideoForConditionalGeneration(OmniVideoConfig(adapter_config=None, decoder_config=None)),
            "text_encoder": UMT5EncoderModel(UMT5Config(**UMT5_XXL)),
            "adapter": OmniVideoAdapter(),
            "transformer": WanTransformer3DModel(**WAN_2_1_T2V_1_3B),
            "vae": AutoencoderKLWan(),
        }
    headers = {f"{name}/model.safetensors": headers_of(model) for name, model in models.items()}
    peaks = {name: estimate_memory(headers, profile).peak for name, profile in PROFILES.items()}
    for name, profile in PROFILES.items():
        assert peaks[name] < profile.gibibytes * 2**30, name
    order = list(peaks.values())
    assert order == sorted(order, reverse=True)
    for larger, smaller in zip(PROFILES.values(), list(PROFILES)[1:], strict=False):
        assert peaks[larger.name] > PROFILES[smaller].gibibytes * 2**30, "the smaller profile would not be needed"


# --- by hand --------------------------------------------------------------------------------------------------------


OFFLOADS = {
    "none": lambda pipe: pipe,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group": lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.fixture(scope="module")
def lora(repository, tmp_path_factory):
    """Matrices in every part, none of them zero."""
    model = OmniVideoForConditionalGeneration.from_pretrained(repository)
    add_lora(model, {"r": 2})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("lora")
    save_lora(model, folder)
    return folder


@pytest.mark.parametrize(
    "quantized",
    [pytest.param((), id="plain"), pytest.param(("mllm", "text_encoder"), id="int8", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("offload", "first"),
    # diffusers switches model offload on again after it has loaded a LoRA, then without naming the device.
    [("none", "lora"), ("model", "lora"), ("group", "lora"), ("group", "offload")],
)
def test_offloading_with_quantisation_and_lora(repository, lora, quantized, offload, first):
    mapping = {name: QuantoConfig(weights="int8") for name in quantized}
    settings = {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)} if mapping else {}
    wanted = load(repository, **settings)
    untouched = run(wanted)
    wanted.load_lora_weights(lora)
    wanted = run(wanted)
    assert not torch.allclose(wanted, untouched, atol=1e-3)

    pipe = load(repository, **settings)
    for step in (first, {"lora": "offload", "offload": "lora"}[first]):
        OFFLOADS[offload](pipe) if step == "offload" else pipe.load_lora_weights(lora)
    assert torch.allclose(run(pipe), wanted, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_unknown_profiles_are_refused(repository):
    with pytest.raises(ValueError, match=r"`memory` must be one of '24GB', .*got '10GB'"):
        get_memory_profile("10GB")
    with pytest.raises(ValueError, match="got 16"):
        load(repository, memory=16)


@pytest.mark.parametrize(
    "arguments", [{"dtype": torch.float16}, {"device_map": "balanced"}, {"quantization_config": None}]
)
def test_a_profile_and_what_it_chooses_are_refused_together(repository, arguments):
    with pytest.raises(ValueError, match=f"`memory='16GB'` sets `{next(iter(arguments))}`"):
        load(repository, memory="16GB", memory_device="cpu", **arguments)


def test_a_device_without_a_profile_is_refused(repository):
    with pytest.raises(ValueError, match="`memory_device` is 'cpu', but `memory` is missing"):
        load(repository, memory_device="cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_accelerator_a_profile_is_refused(repository):
    with pytest.raises(ValueError, match="torch finds none here"):
        load(repository, memory="24GB")


def test_an_incomplete_repository_has_no_estimate(repository):
    headers = {file: weights for file, weights in repository_headers(repository).items() if "vae" not in file}
    with pytest.raises(ValueError, match="no weights in vae"):
        estimate_memory(headers, None)


# --- the command ----------------------------------------------------------------------------------------------------


def test_info_memory(repository):
    table = CliRunner().invoke(app, ["info", str(repository), "--memory"])
    assert table.exit_code == 0, table.output
    assert all(name in table.output for name in PROFILES)
    printed = CliRunner().invoke(app, ["info", str(repository), "--memory", "--json"])
    rows = json.loads(printed.stdout)
    headers = repository_headers(repository)
    assert [row["memory"] for row in rows] == [None, *PROFILES]
    assert [row["peak"] for row in rows[1:]] == [estimate_memory(headers, p).peak for p in PROFILES.values()]
