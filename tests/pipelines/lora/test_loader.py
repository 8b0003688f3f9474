import json
import threading
import time

import pytest
import tiny
import torch
from accelerate import cpu_offload
from lora import outputs, tuned_model, with_parts
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omni_video_hf import OmniVideoPipeline, collect_lora_layers
from omni_video_hf.utils.turns import _WAITING, turn


@pytest.fixture
def file(tmp_path):
    model = tuned_model()
    OmniVideoPipeline.save_lora_weights(tmp_path / "lora", **collect_lora_layers(model))
    return tmp_path / "lora" / "pytorch_lora_weights.safetensors"


def test_one_file_holds_all_parts_and_their_alpha(file):
    keys = load_file(file)
    assert {key.partition(".")[0] for key in keys} == {"transformer", "adapter", "mllm", "vision_head"}
    with safe_open(file, "pt") as handle:
        metadata = json.loads(handle.metadata()["lora_adapter_metadata"])
    for component in ("transformer", "adapter", "mllm"):
        assert metadata[f"{component}.lora_alpha"] == 6
    assert set(metadata["transformer.rank_pattern"].values()) | {metadata["transformer.r"]} == {2, 4}


def test_a_loaded_file_gives_the_trained_outputs(file):
    expected_frames, expected_logits = outputs(with_parts(tuned_model()))
    pipe = tiny.pipeline()
    plain_frames, plain_logits = outputs(pipe)
    pipe.load_lora_weights(file.parent)
    assert pipe.get_list_adapters() == {part: ["default_0"] for part in ("transformer", "adapter", "mllm")}
    frames, logits = outputs(pipe)
    assert torch.equal(frames, expected_frames)
    assert torch.equal(logits, expected_logits)
    assert (frames - plain_frames).abs().max() > 1e-2
    assert (logits - plain_logits).abs().max() > 1e-2

    pipe.disable_lora()
    assert torch.equal(outputs(pipe)[0], plain_frames)
    pipe.enable_lora()
    pipe.set_adapters("default_0", 0.0)
    assert torch.allclose(outputs(pipe)[1], plain_logits)
    pipe.set_adapters("default_0", 1.0)
    assert torch.equal(outputs(pipe)[0], expected_frames)

    pipe.fuse_lora()
    assert torch.allclose(outputs(pipe)[0], expected_frames, atol=1e-5)
    pipe.unfuse_lora()
    assert torch.allclose(outputs(pipe)[0], expected_frames, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.allclose(outputs(pipe)[0], plain_frames, atol=1e-5)
    assert pipe.get_list_adapters() == {}


def test_merged_weights_are_saved_and_unmerged_ones_are_not(file, tmp_path):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(file, adapter_name="style")
    with pytest.raises(ValueError, match=r"`transformer` has LoRA layers"):
        pipe.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = outputs(pipe)[0]
    pipe.save_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(OmniVideoPipeline.from_pretrained(tmp_path / "merged"))[0], expected)
    with pytest.raises(ValueError, match="The model has LoRA layers"):
        tuned_model().save_pretrained(tmp_path / "model")


def test_two_adapters_are_mixed_and_removed(file, tmp_path):
    other = tuned_model(("decoder", "adapter"), lora_alpha=2)
    OmniVideoPipeline.save_lora_weights(tmp_path / "other", **collect_lora_layers(other))
    pipe = tiny.pipeline()
    pipe.load_lora_weights(file, adapter_name="first")
    pipe.load_lora_weights(tmp_path / "other", adapter_name="second")
    pipe.set_adapters(["first", "second"], [1.0, 0.5])
    both = outputs(pipe)[0]
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {part: ["first"] for part in ("transformer", "adapter", "mllm")}
    pipe.set_adapters("first")
    alone = outputs(pipe)[0]
    assert (both - alone).abs().max() > 1e-3
    assert torch.equal(alone, outputs(with_parts(tuned_model()))[0])
    with pytest.raises(ValueError, match="already in use"):
        pipe.load_lora_weights(file, adapter_name="first")


def test_without_metadata_alpha_is_the_rank(file):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(load_file(file))
    scales = {
        module.scaling["default_0"]
        for part in (pipe.mllm, pipe.adapter, pipe.transformer)
        for module in part.modules()
        if hasattr(module, "lora_A")
    }
    assert scales == {1.0}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("transformer.blocks.9.attn1.to_q.lora_A.weight", "match no layer"),
        ("unet.blocks.0.attn1.to_q.lora_A.weight", "match no layer"),
        ("blocks.0.attn1.to_q.lora_A.weight", "match no layer"),
        (None, "contains no LoRA weights"),
    ],
)
def test_an_adapter_of_another_model_is_refused_whole(file, tmp_path, key, message):
    tensors = {key: torch.zeros(2, 2)} | load_file(file) if key else {}
    save_file(tensors, tmp_path / "wrong.safetensors")
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path / "wrong.safetensors")
    assert pipe.get_list_adapters() == {}


def test_an_adapter_of_other_widths_is_refused_whole(file, tmp_path):
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("vision_head") and "lora_A" in name)
    tensors[name] = torch.zeros(tensors[name].shape[0], 7)
    save_file(tensors, tmp_path / "wrong.safetensors")
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match=r"vision_head.*7"):
        pipe.load_lora_weights(tmp_path / "wrong.safetensors")
    assert pipe.get_list_adapters() == {}


def test_a_pickle_is_not_opened(tmp_path):
    torch.save({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises((OSError, ValueError)):
        tiny.pipeline().load_lora_weights(tmp_path)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers of the adapter 'style'"):
        collect_lora_layers(tuned_model(), "style")
    with pytest.raises(ValueError, match="no LoRA layers"):
        OmniVideoPipeline.save_lora_weights(tmp_path)


def test_a_lora_on_an_offloaded_pipeline(file):
    expected = outputs(with_parts(tuned_model()))[0]
    pipe = tiny.pipeline()
    pipe.load_lora_weights(file)
    for name in ("mllm", "adapter", "transformer"):
        cpu_offload(getattr(pipe, name), torch.device("cpu"), offload_buffers=True)
    assert torch.equal(outputs(pipe)[0], expected)


# --- what diffusers promises of every pipeline's LoRA --------------------------------------------------------------

COMPONENT_TARGETS = {"mllm": r".*\.(q_proj|fc1)", "adapter": r".*\.v_proj", "transformer": r".*\.(to_q|to_k)"}


@pytest.fixture
def pipe():
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_adapters(pipe, name="default", seed=0, **settings):
    """Random LoRA in every component, by the components' own method."""
    for component, targets in COMPONENT_TARGETS.items():
        torch.manual_seed(seed)
        options = {"r": 4, "lora_alpha": 4, "target_modules": targets, "init_lora_weights": False} | settings
        getattr(pipe, component).add_adapter(LoraConfig(**options), adapter_name=name)
    return {component: getattr(pipe, component) for component in COMPONENT_TARGETS}


def frames_of(pipe, **arguments):
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 1, "output_type": "latent"}
    return pipe("a", task="t2v", generator=generator, **(size | arguments)).frames


def close(value, expected):
    return torch.allclose(value, expected, atol=1e-4, rtol=1e-3)


def test_weights_by_the_names_of_the_components_are_loaded(pipe):
    plain = frames_of(pipe)
    layers = {
        f"{component}.{name}": value
        for component, module in add_adapters(pipe).items()
        for name, value in get_peft_model_state_dict(module).items()
    }
    assert {name.rpartition(".lora_")[0].split(".")[1] for name in layers if name[0] == "m"} == {"mllm", "vision_head"}
    expected = frames_of(pipe)
    pipe.unload_lora_weights()
    assert close(frames_of(pipe), plain)
    pipe.load_lora_weights(layers)
    assert close(frames_of(pipe), expected)
    assert not close(expected, plain)


def test_several_adapters_are_listed_weighted_and_deleted(pipe, tmp_path):
    plain = frames_of(pipe)
    add_adapters(pipe, "one")
    assert pipe.get_active_adapters() == ["one"]
    add_adapters(pipe, "two", seed=1)
    assert pipe.get_active_adapters() == ["two"]
    assert pipe.get_list_adapters() == {part: ["one", "two"] for part in ("transformer", "adapter", "mllm")}
    alone = {}
    for name in ("one", "two"):
        pipe.set_adapters(name)
        alone[name] = frames_of(pipe)
    pipe.set_adapters(["one", "two"])
    both = frames_of(pipe)
    pipe.set_adapters(["one", "two"], [0.5, 0.6])
    results = [plain, *alone.values(), both, frames_of(pipe)]
    assert not any(close(a, b) for i, a in enumerate(results) for b in results[:i])
    pipe.disable_lora()
    assert close(frames_of(pipe), plain)
    pipe.enable_lora()
    for wrong in (pipe.set_adapters, pipe.delete_adapters):
        with pytest.raises(ValueError, match="not in the list of present adapters"):
            wrong("three")
    pipe.set_adapters(["one", "two"])
    pipe.delete_adapters("one")
    assert close(frames_of(pipe), alone["two"])
    pipe.delete_adapters(["two"])
    assert torch.equal(frames_of(pipe), plain)
    assert pipe.get_list_adapters() == {}
    pipe.save_pretrained(tmp_path)  # nothing is left that would refuse it
    add_adapters(pipe, "one")
    pipe.unload_lora_weights()
    add_adapters(pipe, "one")
    assert close(frames_of(pipe), alone["one"])


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_fused_at_a_scale_is_the_scale_of_a_call(pipe, scale):
    add_adapters(pipe, "one")
    add_adapters(pipe, "two", seed=1)
    pipe.set_adapters(["one", "two"])
    both = frames_of(pipe)
    pipe.set_adapters(["one"])
    scaled = frames_of(pipe, attention_kwargs={"scale": scale})
    pipe.fuse_lora(adapter_names=["one"], lora_scale=scale)
    assert pipe.num_fused_loras == 1
    assert close(frames_of(pipe), scaled)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    pipe.fuse_lora(components=pipe._lora_loadable_modules, adapter_names=["two", "one"])
    assert pipe.num_fused_loras == 2
    assert close(frames_of(pipe), both)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0


@pytest.mark.parametrize(("alpha", "excluded"), [(4, None), (16, r".*blocks\.0.*|.*layers\.0.*")])
def test_what_peft_returns_is_saved_and_loaded(pipe, tmp_path, alpha, excluded):
    components = add_adapters(pipe, lora_alpha=alpha, exclude_modules=excluded)
    expected = frames_of(pipe)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(module) for name, module in components.items()}
    settings = {
        f"{name}_lora_adapter_metadata": module.peft_config["default"].to_dict() for name, module in components.items()
    }
    with pytest.raises(ValueError, match="safe_serialization"):
        pipe.save_lora_weights(tmp_path, **layers, safe_serialization=False)
    pipe.save_lora_weights(tmp_path, **layers, **settings, safe_serialization=True)
    _, metadata = pipe.lora_state_dict(tmp_path, return_lora_metadata=True)
    for name in components:
        written = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(f"{name}.")}
        assert written["lora_alpha"] == alpha
    pipe.delete_adapters("default")
    for low_cpu_mem_usage in (False, True):
        pipe.load_lora_weights(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert close(frames_of(pipe), expected)
        pipe.unload_lora_weights()
    if alpha == 4:  # alpha is the rank: the settings can be left out
        pipe.save_lora_weights(tmp_path / "bare", **layers)
        pipe.load_lora_weights(tmp_path / "bare")
        assert close(frames_of(pipe), expected)


CHANGES = {
    "load": lambda pipe, file, _: pipe.load_lora_weights(file, adapter_name="second"),
    "choose": lambda pipe, *_: pipe.set_adapters("first", 0.5),
    "disable": lambda pipe, *_: pipe.disable_lora(),
    "fuse": lambda pipe, *_: pipe.fuse_lora(),
    "delete": lambda pipe, *_: pipe.delete_adapters("first"),
    "unload": lambda pipe, *_: pipe.unload_lora_weights(),
}


def waits(component, job):
    """Whether a job of another thread asks for its turn, and is done only after this one stopped using a component."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (job(), done.set()), daemon=True)
    with turn(component):
        thread.start()
        while not done.is_set() and thread.ident not in dict(_WAITING):
            time.sleep(0.001)
        waited = not done.is_set()
    thread.join()
    return waited and done.is_set()


@pytest.mark.parametrize("name", CHANGES)
def test_lora_changes_wait_for_the_call_of_another_thread(file, tmp_path, name):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(file, adapter_name="first")
    assert waits(pipe.transformer, lambda: CHANGES[name](pipe, file, tmp_path))


def test_saving_waits_for_the_call_of_another_thread(tmp_path):
    pipe, model = tiny.pipeline(), tiny.model()
    assert waits(pipe.vae, lambda: pipe.save_pretrained(tmp_path / "pipe"))
    assert waits(model.decoder, lambda: model.save_pretrained(tmp_path / "model"))


def test_a_part_that_is_not_loaded_is_named(file):
    pipe = tiny.pipeline()
    pipe.transformer = None
    with pytest.raises(ValueError, match="`transformer`, which this pipeline does not have"):
        pipe.load_lora_weights(file)
    assert pipe.get_list_adapters() == {}
    tensors = {name: value for name, value in load_file(file).items() if not name.startswith("transformer.")}
    pipe.load_lora_weights(tensors)
    assert set(pipe.get_list_adapters()) == {"adapter", "mllm"}
