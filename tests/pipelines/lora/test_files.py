"""LoRA of every naming: the numbers are those of weights changed by hand; what does not fit is refused whole."""

import json
import math

import pytest
import tiny
import torch
import training
from lora import outputs, tuned_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from omni_video_hf import OmniVideoPipeline, collect_lora_layers
from omni_video_hf.pipelines.lora.files import WAN_NAMES, read_lora_file, split_lora
from omni_video_hf.pipelines.lora.layers import LoraFile
from omni_video_hf.training.lora import add_lora

LAYERS = (
    "blocks.0.attn1.to_q",
    "blocks.0.attn2.to_out.0",
    "blocks.1.attn2.to_k",
    "blocks.1.ffn.net.0.proj",
    "blocks.1.ffn.net.2",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_2",
    "proj_out",
)
RANK, ALPHA = 3, 12.0


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(autouse=True)
def nothing_stays(request):
    """The shared pipeline is the same before and after every test."""
    yield
    if "pipe" in request.fixturenames:
        request.getfixturevalue("pipe").unload_lora_weights()


def matrices(decoder):
    """Random matrices for `LAYERS`, by name."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in LAYERS:
        linear = decoder.get_submodule(name)
        layers[name] = (
            torch.randn(RANK, linear.in_features, generator=generator) * 0.3,
            torch.randn(linear.out_features, RANK, generator=generator) * 0.3,
        )
    return layers


@torch.no_grad()
def velocity(decoder):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    context = torch.randn(1, 5, 32, generator=generator)
    return decoder(latents, torch.tensor([500.0]), context, return_dict=False)[0]


@torch.no_grad()
def by_hand(layers, scale, biases=None):
    """The velocity of a decoder whose weights were changed without any library."""
    decoder = tiny.pipeline().transformer
    for name, (down, up) in layers.items():
        decoder.get_submodule(name).weight += scale * up @ down
    for name, bias in (biases or {}).items():
        decoder.get_submodule(name).bias += bias
    return velocity(decoder)


def wan(name):
    for ours, theirs in WAN_NAMES:
        name = name.replace(ours, theirs)
    return name


def peft(layers, prefix, adapter=""):
    return {
        f"{prefix}{name}.lora_{kind}{adapter}.weight": value
        for name, pair in layers.items()
        for kind, value in zip("AB", pair, strict=True)
    }


def kohya(layers, prefix="lora_unet_", rename=lambda name: wan(name).replace(".", "_")):
    tensors = {}
    for name, (down, up) in layers.items():
        key = prefix + rename(name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
    return tensors


def by_wan_name(layers):
    return {wan(name): pair for name, pair in layers.items()}


# Weights as a tool writes them, and the scale that the tool gives them.
NAMINGS = {
    "diffusers": (lambda layers: peft(layers, "transformer."), 1.0),
    "decoder alone": (lambda layers: peft(layers, ""), 1.0),
    "peft of the decoder": (lambda layers: peft(layers, "base_model.model."), 1.0),
    "peft of the whole model": (lambda layers: peft(layers, "base_model.model.decoder."), 1.0),
    "peft of the pipeline's parts": (lambda layers: peft(layers, "base_model.model.transformer."), 1.0),
    "diffsynth": (lambda layers: peft(by_wan_name(layers), "", ".default"), 1.0),
    "diffsynth with its prefix": (lambda layers: peft(by_wan_name(layers), "pipe.dit.", ".default"), 1.0),
    "comfyui": (lambda layers: peft(by_wan_name(layers), "diffusion_model."), 1.0),
    "comfyui with alpha": (lambda layers: kohya(layers, "diffusion_model.", wan), ALPHA / RANK),
    "kohya": (kohya, ALPHA / RANK),
    "kohya of diffusers names": (lambda layers: kohya(layers, rename=lambda n: n.replace(".", "_")), ALPHA / RANK),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_numbers_of_a_lora_applied_by_hand(pipe, naming):
    layers = matrices(pipe.transformer)
    write, scale = NAMINGS[naming]
    tensors = write(layers)
    kept = {key: value.clone() for key, value in tensors.items()}
    plain = velocity(pipe.transformer)
    pipe.load_lora_weights(tensors)
    expected = by_hand(layers, scale)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(velocity(pipe.transformer), expected, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(value, kept[key]) for key, value in tensors.items()), "the caller's tensors were changed"


def test_a_musubi_file_of_some_layers_with_ranks_of_their_own(pipe, tmp_path):
    layers = {name: pair for name, pair in matrices(pipe.transformer).items() if "attn" in name}
    tensors = kohya(layers)
    key = "lora_unet_blocks_0_self_attn_q"
    tensors[f"{key}.lora_down.weight"] = tensors[f"{key}.lora_down.weight"][:2]
    tensors[f"{key}.lora_up.weight"] = tensors[f"{key}.lora_up.weight"][:, :2]
    tensors[f"{key}.alpha"] = torch.tensor(0.5)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "fox.safetensors")
    pipe.load_lora_weights(tmp_path)  # the only safetensors file of the folder
    down, up = layers.pop("blocks.0.attn1.to_q")
    scaled = {name: (down * ALPHA / RANK, up) for name, (down, up) in layers.items()}
    expected = by_hand(scaled | {"blocks.0.attn1.to_q": (down[:2] * 0.25, up[:, :2])}, 1.0)
    torch.testing.assert_close(velocity(pipe.transformer), expected, atol=2e-5, rtol=1e-4)


def test_differences_of_weights_and_biases_are_applied_exactly(pipe):
    layers = matrices(pipe.transformer)
    down, up = layers.pop("proj_out")
    tensors = kohya(layers, "diffusion_model.", wan)
    bias = torch.linspace(-1, 1, 48)
    tensors |= {
        "diffusion_model.head.head.diff": up @ down,
        "diffusion_model.blocks.0.ffn.0.diff_b": bias,  # a layer that has no matrices
        "diffusion_model.blocks.1.ffn.0.diff_b": bias,  # one that has
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(24),
    }
    pipe.load_lora_weights(tensors)
    layers = {name: (down * ALPHA / RANK, up) for name, (down, up) in layers.items()}
    biases = {"blocks.0.ffn.net.0.proj": bias, "blocks.1.ffn.net.0.proj": bias}
    expected = by_hand(layers | {"proj_out": (down, up)}, 1.0, biases)
    torch.testing.assert_close(velocity(pipe.transformer), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"norm3 changes transformer\.blocks\.0\.norm3, a \w+; LoRA is supported"):
        pipe.load_lora_weights(tensors | {"diffusion_model.blocks.0.norm3.diff": torch.ones(24)})


def test_a_few_step_lora_runs_at_its_timesteps_without_guidance(pipe):
    """As lightx2v and CausVid distribute them: matrices, alpha and biases under Wan's names, zeros for norms."""
    layers, bias = matrices(pipe.transformer), torch.linspace(-1, 1, 48)
    tensors = kohya(layers, "diffusion_model.", wan) | {
        "diffusion_model.blocks.0.ffn.0.diff_b": bias,
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(24),
    }

    def call(own):
        own.set_progress_bar_config(disable=True)
        few = {"timesteps": [1000, 750, 500, 250], "guidance_scale": 1.0, "output_type": "latent"}
        return own("a cat", task="t2v", generator=torch.Generator().manual_seed(0), **few).frames

    changed, passes = tiny.pipeline(), []
    with torch.no_grad():
        for name, (down, up) in layers.items():
            changed.transformer.get_submodule(name).weight += ALPHA / RANK * up @ down
        changed.transformer.blocks[0].ffn.net[0].proj.bias += bias
    plain = call(pipe)
    pipe.load_lora_weights(tensors)
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    tuned = call(pipe)
    hook.remove()
    assert len(passes) == 4
    assert not torch.allclose(tuned, plain, atol=0.1)
    torch.testing.assert_close(tuned, call(changed), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_has_its_scales(pipe, tmp_path, rslora):
    decoder = tiny.pipeline().transformer
    patterns = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {r"blocks\.1\..*to_q": 9, "ffn.net.2": 3}}
    targets = ["to_q", "to_k", "ffn.net.2"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, use_rslora=rslora, **patterns
    )
    wrapped = get_peft_model(decoder, config)
    expected = velocity(wrapped)
    wrapped.save_pretrained(tmp_path)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(velocity(pipe.transformer), expected, atol=2e-5, rtol=1e-4)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(velocity(pipe.transformer), expected, atol=2e-5, rtol=1e-4)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        pipe.load_lora_weights(tmp_path)


def test_a_peft_model_of_everything(tmp_path):
    model = tiny.model()
    targets = r".*\.(q_proj|fc1|to_v)"
    settings = {"r": 2, "lora_alpha": 7, "target_modules": targets, "init_lora_weights": False}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(tmp_path)
    parts = model.pipeline_components()
    pipe = tiny.pipeline()
    expected = outputs(OmniVideoPipeline(**(pipe.components | parts), presets=pipe.config.presets))
    pipe.load_lora_weights(tmp_path)
    for value, wanted in zip(outputs(pipe), expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-4)


def test_checkpoints_of_a_run_load_with_their_scale(tmp_path):
    model = tiny.model()
    settings = {"r": 2, "lora_alpha": 8}
    add_lora(model, settings)
    samples = [training.instructed("v2v", number) for number in range(4)]
    saving = {"save_steps": 1, "save_strategy": "steps", "ema_decay": 0.5}
    options = {"stage": "lora", "lora": settings, "learning_rate": 0.05, "max_steps": 2}
    trainer = training.trainer(tmp_path, samples, model, **(options | saving))
    trainer.train()
    pipe = tiny.pipeline()
    parts = model.pipeline_components()
    of_run = OmniVideoPipeline(**(pipe.components | parts), presets=pipe.config.presets)
    last = outputs(of_run)
    with trainer.averaged_weights():
        averaged = outputs(of_run)
    assert not torch.equal(last[0], averaged[0])
    checkpoint = tmp_path / "checkpoint-2"
    pipe.load_lora_weights(checkpoint)  # the average, as in the result of the run
    torch.testing.assert_close(outputs(pipe), averaged, atol=1e-5, rtol=1e-4)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(checkpoint, weight_name="trained.safetensors")
    torch.testing.assert_close(outputs(pipe), last, atol=1e-5, rtol=1e-4)
    pipe.unload_lora_weights()
    (tmp_path / "run").mkdir()
    checkpoint.rename(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"\['checkpoint-2'\]: pass one of them"):
        pipe.load_lora_weights(tmp_path / "run")


def test_checkpoints_without_lora_or_scale_are_refused(tmp_path):
    for metadata, message in (({"stage": '"decoder"'}, "trained weights of the stage 'decoder', not a LoRA"),
                              ({"stage": '"lora"'}, "without the alpha of its layers")):  # fmt: skip
        save_file({"decoder.proj_out.weight": torch.zeros(2)}, tmp_path / "trained.safetensors", metadata)
        with pytest.raises(ValueError, match=message):
            read_lora_file(tmp_path)


# --- refused, and nothing is left ---------------------------------------------------------------------------------


def state(pipe):
    """All that a load could leave behind."""
    found = {}
    for name in ("transformer", "adapter", "mllm"):
        module = getattr(pipe, name)
        found[name] = (
            {key: value.clone() for key, value in module.state_dict().items()},
            {key: type(child).__name__ for key, child in module.named_modules()},
            {key: list(child.active_adapters) for key, child in module.named_modules() if hasattr(child, "lora_A")},
            {key: dict(child.scaling) for key, child in module.named_modules() if hasattr(child, "lora_A")},
            set(getattr(module, "peft_config", {})),
            hasattr(module, "peft_config"),
            getattr(module, "_hf_peft_config_loaded", False),
        )
    return found


def check_unchanged(pipe, before):
    for name, values in state(pipe).items():
        weights, *rest = values
        expected, *wanted = before[name]
        assert weights.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in weights.items())
        assert rest == wanted, name


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    OmniVideoPipeline.save_lora_weights(folder, **collect_lora_layers(tuned_model()))
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("loaded_before", [False, True])
@pytest.mark.parametrize("part", ["transformer", "adapter", "mllm"])
def test_a_load_that_fails_midway_leaves_nothing(whole_file, tmp_path, monkeypatch, part, loaded_before):
    pipe = tiny.pipeline()
    if loaded_before:
        pipe.load_lora_weights(whole_file, adapter_name="first")
        pipe.set_adapters("first", 0.25)
    before = state(pipe)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    if part == "mllm":
        monkeypatch.setattr("peft.set_peft_model_state_dict", fails)  # after the layers were put in
        monkeypatch.setattr(type(pipe.transformer), "load_lora_adapter", type(pipe.transformer).load_lora_adapter)
    else:
        load = type(getattr(pipe, part)).load_lora_adapter

        def load_then_fail(self, *args, **kwargs):
            load(self, *args, **kwargs)
            if self is getattr(pipe, part):
                fails()

        monkeypatch.setattr(type(getattr(pipe, part)), "load_lora_adapter", load_then_fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe.load_lora_weights(whole_file, adapter_name="second")
    monkeypatch.undo()
    check_unchanged(pipe, before)
    if not loaded_before:
        pipe.save_pretrained(tmp_path / "saved")  # nothing refuses it
    pipe.load_lora_weights(whole_file, adapter_name="second")
    assert all("second" in names for names in pipe.get_list_adapters().values())


def test_an_exchange_that_fails_midway_leaves_the_old_values(tmp_path, monkeypatch):
    parts = ("decoder", "adapter")
    alphas = {"lora_alpha": 5, "alpha_pattern": {"to_v": 9}}
    for name, factor, settings in (("old", 1.0, {}), ("new", 2.0, alphas)):
        layers = collect_lora_layers(tuned_model(parts, **settings))
        for key in [key for key in layers if key.endswith("_lora_layers")]:
            layers[key] = {weight: value * factor for weight, value in layers[key].items()}
        OmniVideoPipeline.save_lora_weights(tmp_path / name, **layers)
    pipe = tiny.pipeline()
    pipe.load_lora_weights(tmp_path / "old", adapter_name="style")
    before = state(pipe)
    load = type(pipe.adapter).load_lora_adapter

    def load_then_fail(self, *args, **kwargs):
        load(self, *args, **kwargs)
        if self is pipe.adapter:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.adapter), "load_lora_adapter", load_then_fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            pipe.load_lora_weights(tmp_path / "new", adapter_name="style", hotswap=True)
    check_unchanged(pipe, before)
    with monkeypatch.context() as patch:  # diffusers deletes the adapter when an exchange is refused
        patch.setattr("peft.utils.hotswap.hotswap_adapter_from_state_dict", load_then_fail)
        with pytest.raises(TypeError):
            pipe.load_lora_weights(tmp_path / "new", adapter_name="style", hotswap=True)
    check_unchanged(pipe, before)
    pipe.load_lora_weights(tmp_path / "new", adapter_name="style", hotswap=True)
    exchanged = outputs(pipe)[0]
    pipe.set_adapters("style", 0.5)
    half = outputs(pipe)[0]
    pipe.save_lora_weights(tmp_path / "again", **collect_lora_layers(pipe, "style"))
    for folder in ("new", "again"):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path / folder)
        assert torch.equal(outputs(pipe)[0], exchanged)
    pipe.set_adapters("default_0", 0.5)
    assert torch.equal(outputs(pipe)[0], half)


def broken(change):
    """A function of a file's tensors that changes the last layer of the MLLM, which is loaded last."""

    def apply(tensors):
        tensors = dict(tensors)
        change(tensors, next(key for key in sorted(tensors, reverse=True) if key.startswith("vision_head")))
        return tensors

    return apply


def put(value):
    return broken(lambda tensors, key: tensors.__setitem__(key, torch.full_like(tensors[key], value)))


REFUSED = {
    "nan": (put(math.nan), r"vision_head.* contains \d+ values that are NaN or infinite"),
    "inf": (put(math.inf), "NaN or infinite"),
    "half": (broken(lambda tensors, key: tensors.pop(key)), "must have both matrices"),
    "integers": (broken(lambda t, key: t.__setitem__(key, t[key].int())), "is torch.int32"),
    "shape": (broken(lambda t, key: t.__setitem__(key, torch.zeros(7, 7))), "does not fit"),
    "norm": (
        lambda t: t | peft({"blocks.0.norm2": (torch.ones(2, 24), torch.ones(24, 2))}, "transformer."),
        "LoRA is supported for linear",
    ),
    "dora": (lambda t: t | {"transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(24)}, "is a DoRA file"),
    "lokr": (lambda t: t | {"transformer.blocks.0.attn1.to_q.lokr_w1": torch.ones(2, 2)}, "is a LyCORIS file"),
    "text encoder": (
        lambda t: t | kohya({"x": (torch.ones(1, 2), torch.ones(2, 1))}, "lora_te_"),
        "match no layer.*'lora_te_x",
    ),
    "two namings": (
        lambda t: t | kohya({"blocks.0.attn1.to_q": (torch.ones(1, 24), torch.ones(24, 1))}),
        "These names are kohya's",
    ),
    "two adapters": (
        lambda t: t | peft({"blocks.0.attn1.to_q": (torch.ones(1, 24), torch.ones(24, 1))}, "transformer.", ".b"),
        "contains several adapters",
    ),
    "nothing": (lambda _: {}, "contains no LoRA weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_with_one_bad_weight_is_refused_whole(pipe, whole_file, tmp_path, case):
    change, message = REFUSED[case]
    before = state(pipe)
    tensors = {name: value.contiguous() for name, value in change(load_file(whole_file)).items()}
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        pipe.load_lora_weights(tmp_path / "wrong.safetensors")
    assert "wrong.safetensors" in str(error.value)
    check_unchanged(pipe, before)


def test_arguments_are_refused_before_anything_is_loaded(pipe, whole_file):
    before = state(pipe)
    for arguments, error, message in (
        ({"hotswap": True}, ValueError, "cannot replace LoRA layers of the MLLM"),
        ({"adapter_name": "a.b"}, ValueError, "without a dot"),
        ({"weight": "x"}, TypeError, r"no arguments \['weight'\]"),
        ({"use_safetensors": False}, ValueError, "pickles are not opened"),
    ):
        with pytest.raises(error, match=message):
            pipe.load_lora_weights(whole_file, **arguments)
        check_unchanged(pipe, before)


SETTINGS = {"r": 3, "lora_alpha": 6}
BAD_SETTINGS = [
    ({"lora_alpha": math.nan}, "the setting `lora_alpha` must be a number, got nan"),
    ({"lora_alpha": "6"}, "must be a number, got '6'"),
    ({"r": 5}, "the rank 5, but its matrices have 3"),
    ({"use_dora": True}, "the setting `use_dora` is True"),
    ({"init_lora_weights": "pissa_niter_4"}, "also changed the model's weights"),
    ({"init_lora_weights": "pissa_niter_1000000"}, "also changed the model's weights"),
    ({"init_lora_weights": "loftq"}, "also changed the model's weights"),
    ({"alpha_pattern": {"(a+)+b": 1}}, "too complex to be matched safely"),
    ({"alpha_pattern": {".*.*.*x": 1}}, "too complex to be matched safely"),
    ({"alpha_pattern": {"a|(": 1}}, "is not a regular expression"),
    ({"alpha_pattern": {f"x|{i}": 1 for i in range(17)}}, "more than 16 patterns"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_that_cannot_be_followed_are_refused(pipe, settings, message):
    tensors = peft({"proj_out": matrices(pipe.transformer)["proj_out"]}, "transformer.")
    said = {f"transformer.{key}": value for key, value in (SETTINGS | settings).items()}
    with pytest.raises(ValueError) as error:
        split_lora(LoraFile(tensors, "fox.safetensors", said), {"transformer": pipe.transformer})
    assert message in str(error.value)


def test_folders_without_one_lora_file_are_refused(tmp_path, whole_file):
    with pytest.raises(ValueError, match=r"contains no LoRA: there is no \.safetensors file"):
        read_lora_file(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_lora_file(tmp_path / "nowhere" / "of" / "this" / "name")
    for name in ("a", "b"):
        save_file(load_file(whole_file), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"choose one of \['a.safetensors', 'b.safetensors'\] with `weight_name`"):
        read_lora_file(tmp_path)
    assert read_lora_file(tmp_path, weight_name="b.safetensors").tensors.keys() == load_file(whole_file).keys()
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.safetensors: not a safetensors file"):
        read_lora_file(tmp_path, weight_name="a.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is a whole pipeline"):
        read_lora_file(tmp_path)
