import pytest
import tiny
import torch
import training
from safetensors.torch import load_file

from omni_video_hf import OmniVideoForConditionalGeneration
from omni_video_hf.training.checkpointing.result import lora_deltas, write_pipeline
from omni_video_hf.training.lora import add_lora, save_lora

PARTS = ("mllm", "vision_head", "adapter", "decoder")
SETTINGS = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.1}


@torch.no_grad()
def run(model):
    """One pass through every part."""
    sample = training.instructed("v2v")
    inputs = {key: value[None] for key, value in sample.items() if key not in ("task", "labels", "pixel_values")}
    inputs["pixel_values"] = sample["pixel_values"][None]
    output = model.eval()(**inputs, noise=torch.ones(1, 16, 2, 8, 4), timesteps=torch.tensor([500.0]))
    return output.velocity, output.logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model after two steps, with matrices in every part."""
    model = tiny.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, SETTINGS)
    samples = [training.instructed("v2v", number) for number in range(4)]
    folder = tmp_path_factory.mktemp("lora")
    training.trainer(folder, samples, model, stage="lora", lora=SETTINGS, learning_rate=0.05, max_steps=2).train()
    return model, before


def test_only_matrices_train_in_every_part(trained):
    model, before = trained
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in names)
    assert {name.split(".")[0] for name in names} == set(PARTS)
    assert not any("vision_tower" in name for name in names)
    after = {
        name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name
    }
    assert set(after) == set(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for part in PARTS:
        matrices = [p for n, p in model.named_parameters() if n.startswith(part) and "lora_B" in n]
        assert any(matrix.abs().sum() > 0 for matrix in matrices), part
    assert not torch.allclose(run(model)[0], run(tiny.model())[0], atol=1e-3)


def whole(pipe):
    """The parts of a pipeline as one model."""
    model = tiny.model()
    model.mllm, model.vision_head = pipe.mllm.mllm, pipe.mllm.vision_head
    model.adapter, model.decoder = pipe.adapter, pipe.transformer
    return model


def test_the_file_is_small_loads_with_the_same_outputs_and_merges(trained, tmp_path):
    model, _ = trained
    save_lora(model, tmp_path)
    (file,) = tmp_path.iterdir()
    assert {name.split(".")[0] for name in load_file(file)} == {"mllm", "vision_head", "adapter", "transformer"}
    matrices = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert sum(value.numel() for value in load_file(file).values()) == matrices
    pipe = tiny.pipeline()
    pipe.load_lora_weights(tmp_path)
    for value, expected in zip(run(whole(pipe)), run(model), strict=True):
        assert torch.allclose(value, expected, atol=1e-5)
    tiny.pipeline().save_pretrained(tmp_path / "base")
    write_pipeline(tmp_path / "base", tmp_path / "merged", {}, deltas=lora_deltas(model))
    merged = OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "merged")
    for value, expected in zip(run(merged), run(model), strict=True):
        assert torch.allclose(value, expected, atol=1e-3)


def test_parts_can_be_chosen(trained):
    model = tiny.model(enable_mllm=False)
    add_lora(model, SETTINGS | {"parts": ["decoder"]})
    names = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"decoder"}
    with pytest.raises(ValueError, match=r"`lora\.parts` has mllm, but this model has only"):
        add_lora(tiny.model(enable_mllm=False), {"parts": ["mllm"]})
    with pytest.raises(ValueError, match=r"`lora`: unknown 'alpha' \(did you mean 'lora_alpha'\?\)"):
        add_lora(tiny.model(), {"alpha": 3})


def test_a_lora_run_resumes_bit_equal_with_dropout(tmp_path):
    samples = [training.instructed("v2v", number) for number in range(8)]
    weights = []
    for folder, stop in ((tmp_path / "a", None), (tmp_path / "b", 2)):
        for steps in ([stop] if stop else []) + [4]:
            torch.manual_seed(0)
            model = tiny.model()
            add_lora(model, SETTINGS | {"lora_dropout": 0.3})
            saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
            sampler = training.BatchesInOrder([[i, i + 1] for i in range(0, 8, 2)], seed=1)
            trainer = training.trainer(folder, samples, model, sampler, stage="lora", max_steps=steps, **saving)
            torch.manual_seed(steps)  # what the global generator did before must not matter
            trainer.train(resume_from_checkpoint=steps == 4 and stop is not None)
        weights.append(trainer.trained_parameters())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
