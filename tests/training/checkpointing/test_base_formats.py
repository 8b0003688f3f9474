"""What `save_model` of a trainer writes: the base's number formats for what was not trained, and no token."""

import logging

import pytest
import tiny
import torch
from safetensors import safe_open
from training import sample, trainer

from omni_video_hf.models.modeling_omni_video import OmniVideoForConditionalGeneration

TOKEN = "hf_" + "aBcDeFgHiJ" * 4


def stored(folder):
    """Format of every weight in a folder, by its component and name, and the weights themselves."""
    found = {}
    for file in folder.glob("*/*.safetensors"):
        with safe_open(file, "pt") as handle:
            found |= {f"{file.parent.name}/{name}": handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def place_of(name):
    """Where a weight of the whole model is stored."""
    part, _, rest = name.partition(".")
    folder = {"decoder": "transformer", "adapter": "adapter"}.get(part)
    return f"{folder}/{rest}" if folder else f"mllm/{name}"


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model whose repository stores half of its formats in another one than the other half."""
    folder = tmp_path_factory.mktemp("base") / "half"
    model = tiny.model()
    model.mllm.to(torch.float16)
    model.vision_head.to(torch.float16)
    model.adapter.to(torch.bfloat16)
    model.decoder.to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def trained(half, folder, **settings):
    model = OmniVideoForConditionalGeneration.from_pretrained(half, dtype=torch.float32)
    run = trainer(folder, [sample("t2v", n) for n in range(2)], model, max_steps=1, **settings)
    run.train()
    return run


def test_what_was_not_trained_keeps_the_format_and_the_bits_of_the_base(half, tmp_path):
    run = trained(half, tmp_path, hub_token=TOKEN)
    changed = next(name for name in run.model.state_dict() if name.startswith("mllm.") and "norm" in name)
    with torch.no_grad():
        run.model.state_dict()[changed].mul_(1.0001)  # by hand: no float16 holds it
    run.save_model(str(tmp_path / "saved"))
    before, after = stored(half), stored(tmp_path / "saved")
    assert before.keys() == after.keys()
    dtypes = {name: value.dtype for name, value in after.items()}
    trained_names = {place_of(name) for name in run.trained_names}
    assert trained_names
    for name, value in before.items():
        if name in trained_names or name == f"mllm/{changed}":
            assert dtypes[name] == torch.float32
        else:
            assert dtypes[name] == value.dtype
            assert torch.equal(after[name], value)
    assert torch.float16 in dtypes.values()
    assert torch.bfloat16 in dtypes.values()
    assert any(not torch.equal(after[name], before[name].float()) for name in trained_names)
    loaded = OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, value in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name

    arguments = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert arguments.hub_token is None
    assert arguments.learning_rate == run.args.learning_rate
    assert run.args.hub_token == TOKEN
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_result_dtype_and_a_base_that_is_gone(half, tmp_path, caplog):
    run = trained(half, tmp_path, result_dtype="bfloat16")
    run.model.config._name_or_path = "lab/gone"
    with caplog.at_level(logging.WARNING):
        run.save_model(str(tmp_path / "saved"))
    assert "lab/gone is not on this machine" in caplog.text
    after = stored(tmp_path / "saved")
    assert {value.dtype for name, value in after.items() if name.startswith("mllm/")} == {torch.float32}
    assert {value.dtype for name, value in after.items() if name.startswith("transformer/")} >= {torch.bfloat16}
