import json
import sys

import pytest
import tiny
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from golden import CORE_EXPECTED, TASKS, kind, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, QuantoConfig, pipeline

from omni_video_hf import OmniVideoAdapter, OmniVideoForConditionalGeneration
from omni_video_hf.models import connectors
from omni_video_hf.models.modeling_omni_video import ATTENTION_BACKENDS

LATENTS = torch.randn(2, 16, 2, 8, 4, generator=torch.Generator().manual_seed(1))
PROMPT = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
TIMESTEPS = torch.tensor([500.0, 3.0])


@torch.no_grad()
def run(model):
    """One pass through every part."""
    states = model.get_mllm_hidden_states(**tiny.mllm_inputs())
    context = model.encode_condition(states, PROMPT, source_latents=LATENTS, output_kind="video")
    return model.predict_velocity(LATENTS, TIMESTEPS, context)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


# --- upstream's numbers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted_model(converted):
    return OmniVideoForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).eval()


@pytest.mark.parametrize("output", ["video", "image"])
@torch.no_grad()
def test_every_module_gives_upstreams_numbers(converted_model, output):
    model, expected = converted_model, CORE_EXPECTED
    tokens = model.vision_head(expected[f"mllm_hidden_{output}"])
    assert relative_error(tokens, expected[f"vision_tokens_{output}"]) < 1e-4
    assert relative_error(model.adapter.adapt_vision_tokens(tokens, output), expected[f"adapter_{output}"]) < 1e-4
    source = model.adapter.visual_context_adapter(expected[f"source_latent_{output}"][None])
    assert relative_error(source, expected[f"visual_context_{output}"]) < 1e-4


@pytest.mark.parametrize("case", TASKS)
@torch.no_grad()
def test_contexts_and_decoder_give_upstreams_numbers(converted_model, case):
    model, output = converted_model, kind(case)
    source = CORE_EXPECTED[f"source_latent_{output}"][None] if case in ("v2v", "i2i") else None
    arguments = {"source_latents": source, "output_kind": output}
    states, text = CORE_EXPECTED[f"mllm_hidden_{output}"], CORE_EXPECTED["text_embeds"][None]
    contexts = {
        "cond": ("mixed_context", model.encode_condition(states, text, **arguments)),
        "uncond": ("mixed_context_uncond", model.encode_condition(None, None, **arguments)),
    }
    for branch, (name, context) in contexts.items():
        assert relative_error(context[0], CORE_EXPECTED[f"{case}.{name}"]) < 1e-4
        velocity = model.predict_velocity(CORE_EXPECTED[f"{case}.latents"][None], CORE_EXPECTED["timestep"], context)
        assert relative_error(velocity[0], CORE_EXPECTED[f"{case}.noise_pred_{branch}"]) < 1e-4


@torch.no_grad()
def test_without_markers_as_upstream(converted_model, converted):
    config = OmniVideoAdapter.load_config(converted, subfolder="adapter")
    bare = OmniVideoAdapter.from_config(config, use_markers=False).eval()
    weights = converted_model.adapter.state_dict()
    weights.pop("marker_embeds.weight")
    bare.load_state_dict(weights)
    tokens = converted_model.vision_head(CORE_EXPECTED["mllm_hidden_video"])
    context = bare(tokens, CORE_EXPECTED["text_embeds"][None], CORE_EXPECTED["source_latent_video"][None])
    assert relative_error(context[0], CORE_EXPECTED["v2v_no_special.mixed_context"]) < 1e-4
    velocity = converted_model.predict_velocity(CORE_EXPECTED["v2v.latents"][None], CORE_EXPECTED["timestep"], context)
    assert relative_error(velocity[0], CORE_EXPECTED["v2v_no_special.noise_pred_cond"]) < 1e-4


@pytest.mark.parametrize("case", TASKS)
def test_flow_matching_loss_is_upstreams(converted_model, case):
    output = kind(case)
    expected = {
        key: CORE_EXPECTED[f"train.{case}.{key}"] for key in ("noise", "target", "timestep", "loss", "velocity")
    }
    result = converted_model(
        mllm_hidden_states=CORE_EXPECTED[f"mllm_hidden_{output}"],
        prompt_embeds=CORE_EXPECTED["text_embeds"][None],
        latents=expected["noise"] - expected["target"],
        source_latents=CORE_EXPECTED[f"source_latent_{output}"][None] if case in ("v2v", "i2i") else None,
        noise=expected["noise"],
        timesteps=expected["timestep"],
    )
    assert relative_error(result.velocity, expected["velocity"]) < 1e-4
    assert relative_error(result.flow_matching_loss[None], expected["loss"]) < 1e-4
    assert result.loss is result.flow_matching_loss or torch.equal(result.loss, result.flow_matching_loss)


# --- saving and loading ---------------------------------------------------------------------------------------------


def assert_same(model, other):
    assert torch.equal(run(model), run(other))
    buffers = dict(other.named_buffers())
    assert set(buffers) == set(dict(model.named_buffers()))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("auto", [OmniVideoForConditionalGeneration, AutoModel, AutoModelForImageTextToText])
def test_save_and_load_is_bit_equal(model, saved, auto):
    loaded, report = auto.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())
    assert_same(model, loaded)


def test_rope_tables_survive_loading(model, saved):
    """They are non-persistent, and built on the meta device under `from_pretrained`."""
    loaded = OmniVideoForConditionalGeneration.from_pretrained(saved)
    assert float(loaded.decoder.rope.freqs_cos[0].sum()) == float(model.decoder.rope.freqs_cos[0].sum()) != 0


def test_missing_weights_are_initialised_not_left_as_they_lie_in_memory(model, tmp_path):
    model.save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    parts = ("query_tokens", "marker", "scale_shift_table")
    for file in set(content["weight_map"].values()):
        weights = load_file(tmp_path / file)
        kept = {name: weight for name, weight in weights.items() if not any(part in name for part in parts)}
        assert len(kept) < len(weights)
        save_file(kept, tmp_path / file, {"format": "pt"})
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if not any(part in k for part in parts)}
    index.write_text(json.dumps(content))
    loaded = OmniVideoForConditionalGeneration.from_pretrained(tmp_path)
    assert run(loaded).isfinite().all()
    assert 0 < float(loaded.adapter.marker_embeds().std()) < 0.1
    assert 0 < float(loaded.decoder.scale_shift_table.detach().std()) < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_decoders_float32_parts(model, saved, dtype):
    loaded = OmniVideoForConditionalGeneration.from_pretrained(saved, dtype=dtype)
    kept = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {
        name
        for name, _ in loaded.named_parameters()
        if name.startswith("decoder") and any(part in name for part in ("time_embedder", "scale_shift_table", "norm2"))
    }
    assert relative_error(run(loaded).float(), run(model)) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_a_checkpoint_stored_in_another_format(converted, dtype):
    """Its configurations name float32, those of language model and vision tower too."""
    for folder in (converted, converted / "mllm"):
        loaded = OmniVideoForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.mllm.parameters()} == {dtype}
        assert {parameter.dtype for parameter in loaded.vision_head.parameters()} == {dtype}
        assert loaded.generate(**tiny.mllm_inputs(), max_new_tokens=2).shape[0] == 2


def test_mllm_component_alone(tmp_path):
    part = tiny.model(adapter_config=None, decoder_config=None)
    part.save_pretrained(tmp_path)
    loaded = OmniVideoForConditionalGeneration.from_pretrained(tmp_path)
    inputs = tiny.mllm_inputs()
    with torch.no_grad():
        tokens = part(**inputs, output_vision_tokens=True).vision_tokens
        assert torch.equal(loaded(**inputs, output_vision_tokens=True).vision_tokens, tokens)
        assert torch.equal(loaded(output_vision_tokens=True).vision_tokens, part.vision_head())
    with pytest.raises(ValueError, match="no adapter"):
        loaded.encode_condition(None, None)
    with pytest.raises(ValueError, match="no decoder"):
        loaded.predict_velocity(LATENTS, TIMESTEPS, PROMPT)


# --- placement ------------------------------------------------------------------------------------------------------


def test_device_map_auto(model, saved):
    loaded = OmniVideoForConditionalGeneration.from_pretrained(saved, device_map="auto")
    assert_same(model, loaded)


@pytest.mark.parametrize("part", ["mllm", "vision_head", "adapter", "decoder"])
def test_device_map_splits_every_part_between_blocks_and_gives_the_same(model, saved, tmp_path, part):
    blocks = list(model._no_split_modules)
    inside = tuple(f"{name}." for name, module in model.named_modules() if type(module).__name__ in blocks)
    total = compute_module_sizes(model)[""]
    for share in range(1, 40):
        device_map = infer_auto_device_map(
            model, max_memory={"cpu": total * share // 40, "disk": 10 * total}, no_split_module_classes=blocks
        )
        assert not [entry for entry in device_map if entry.startswith(inside)]
        if len({device for name, device in device_map.items() if name.startswith(part)}) == 2:
            break
    else:
        pytest.fail(f"{part} was never split")
    loaded = OmniVideoForConditionalGeneration.from_pretrained(
        saved, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert torch.allclose(run(loaded), run(model), atol=1e-5)


# --- attention, checkpointing, quantisation -------------------------------------------------------------------------


def test_attention_implementation_reaches_every_part(saved, model):
    for name in ("eager", "sdpa"):
        loaded = OmniVideoForConditionalGeneration.from_pretrained(saved, attn_implementation=name)
        configs = [
            loaded.config,
            loaded.mllm.config,
            loaded.mllm.model.vision_tower.config,
            loaded.mllm.model.language_model.config,
            loaded.vision_head.config,
            loaded.adapter.attention_config,
        ]
        assert {config._attn_implementation for config in configs} == {name}
        assert torch.allclose(run(loaded), run(model), atol=1e-4)


def test_eager_and_sdpa_run_different_code(model):
    """Guards the test above: equality must not come from a setting without effect."""
    assert connectors.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is not connectors.eager_attention_forward
    reference = run(model)
    model.set_attn_implementation("eager")
    try:
        assert model.adapter.query_transformer.decoder_layers[0].cross_attn.config._attn_implementation == "eager"
        changed = run(model)
    finally:
        model.set_attn_implementation("sdpa")
    assert not torch.equal(changed, reference)
    assert torch.allclose(changed, reference, atol=1e-4)
    assert torch.equal(run(model), reference)


def test_decoder_backend_follows_and_the_process_default_does_not(model):
    before = _AttentionBackendRegistry.get_active_backend()[0]
    model.set_attn_implementation("flex_attention")
    try:
        backends = {processor._attention_backend for processor in model.decoder.attn_processors.values()}
        assert backends == {AttentionBackendName.FLEX}
    finally:
        model.set_attn_implementation("sdpa")
    backends = {processor._attention_backend for processor in model.decoder.attn_processors.values()}
    assert backends == {AttentionBackendName.NATIVE}
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
    known = {backend.value for backend in AttentionBackendName}
    assert set(ATTENTION_BACKENDS.values()) <= known


@pytest.mark.skipif("flash_attn" in sys.modules, reason="flash-attn is installed")
@pytest.mark.parametrize(
    ("name", "package"), [("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash-attn-3")]
)
def test_a_missing_kernel_names_its_package(saved, model, name, package):
    with pytest.raises(ImportError, match=f"`{package}`"):
        OmniVideoForConditionalGeneration.from_pretrained(saved, attn_implementation=name)
    with pytest.raises(ImportError, match=f"`{package}`"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"


def training_inputs():
    inputs = tiny.mllm_inputs()
    labels = inputs["input_ids"].clone()
    labels[labels == 160] = -100
    return inputs | {
        "labels": labels,
        "target_features": torch.randn(2, 24, generator=torch.Generator().manual_seed(3)),
        "latents": LATENTS,
        "prompt_embeds": PROMPT,
        "source_latents": LATENTS,
        "noise": torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(4)),
        "timesteps": TIMESTEPS,
    }


def test_forward_gives_every_loss_and_their_sum(model):
    output = model(**training_inputs())
    losses = [output.answer_loss, output.alignment_loss, output.flow_matching_loss]
    assert all(loss.isfinite() and loss > 0 for loss in losses)
    assert torch.allclose(output.loss, sum(losses))
    alone = model(**tiny.mllm_inputs())
    assert alone.loss is None
    assert alone.velocity is None
    assert alone.logits.shape == (2, 13, 160)
    tokens = output.vision_tokens.mean(dim=1)
    target = training_inputs()["target_features"]
    cosine = (tokens * target).sum(1) / (tokens.norm(dim=1) * target.norm(dim=1))
    assert torch.allclose(output.alignment_loss, 1 - cosine.mean(), atol=1e-6)


def test_gradient_checkpointing_reaches_every_part_and_changes_nothing():
    model = tiny.model().train()
    gradients, checkpointed = [], []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
            checkpointed = [type(m).__name__ for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        model.zero_grad()
        model(**training_inputs()).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name
    assert {"WanTransformer3DModel", "OmniVideoEncoderLayer", "OmniVideoDecoderLayer", "LlamaDecoderLayer"} <= set(
        checkpointed
    )


def test_quantization_config(saved, model):
    config = QuantoConfig(weights="int8")
    loaded = OmniVideoForConditionalGeneration.from_pretrained(saved, quantization_config=config)
    quantized = {name.split(".")[0] for name, module in loaded.named_modules() if type(module).__name__ == "QLinear"}
    assert quantized == {"mllm", "vision_head", "adapter", "decoder"}
    assert relative_error(run(loaded).float(), run(model)) < 0.1


# --- text -----------------------------------------------------------------------------------------------------------


def test_generate_equals_the_mllms_own_with_cache_and_left_padding(model):
    inputs = tiny.mllm_inputs()
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ours = model.generate(**inputs, **arguments)
    assert torch.equal(ours, model.mllm.generate(**inputs, **arguments))
    assert torch.equal(ours, model.generate(**inputs, **arguments, use_cache=False))
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (4, 0), value=159),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (4, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    assert torch.equal(model.generate(**padded, **arguments)[:, 4:], ours)


def test_left_padding_does_not_change_hidden_states_or_visual_tokens(model):
    inputs = tiny.mllm_inputs()
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (4, 0), value=159),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (4, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    with torch.no_grad():
        plain = model(**inputs, output_vision_tokens=True).vision_tokens
        assert torch.allclose(model(**padded, output_vision_tokens=True).vision_tokens, plain, atol=1e-4)
        states = model.get_mllm_hidden_states(**padded)[:, 4:]
        assert torch.allclose(states, model.get_mllm_hidden_states(**inputs), atol=1e-4)


def test_beams_samples_and_new_tokens():
    model, inputs = tiny.model(), tiny.mllm_inputs()
    assert model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=3).shape[0] == 2
    assert model.generate(**inputs, num_return_sequences=2, do_sample=True, max_new_tokens=3).shape[0] == 4
    model.resize_token_embeddings(170, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape[0] == model.config.get_text_config().vocab_size == 170
    assert model(**inputs).logits.shape[-1] == 170


def test_transformers_pipeline_answers_about_an_image(model):
    answerer = pipeline("image-text-to-text", model=model, processor=tiny.processor())
    image = Image.new("RGB", (30, 20), (200, 30, 30))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]
    answer = answerer(text=[{"role": "user", "content": content}], max_new_tokens=4)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_config_on_disk_names_the_class(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["OmniVideoForConditionalGeneration"]
    assert config["model_type"] == "omni_video"
