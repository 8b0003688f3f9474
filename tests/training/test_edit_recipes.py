"""The recipes for edits that keep their source, on a tiny model with source channels."""

import pytest
import tiny
import torch
import training
from safetensors.torch import load_file

from omni_video_hf.models.source_channels import add_source_channels
from omni_video_hf.training.lora import add_lora, save_lora
from omni_video_hf.training.recipe import read_recipe
from omni_video_hf.training.stages import freeze_all_but

NEEDED = ["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu", "--bf16", "false", "--report_to", "none"]


def grown(source_conditioning):
    adapter = tiny.ADAPTER | {"source_conditioning": source_conditioning}
    return tiny.model(adapter_config=adapter, decoder_config=tiny.DECODER | {"in_channels": 32})


@pytest.mark.parametrize("source_conditioning", ["channels", "both"])
def test_the_recipe_trains_the_decoder_and_what_reads_the_source(source_conditioning):
    _, args = read_recipe("edit", NEEDED)
    names = freeze_all_but(grown(source_conditioning), args.training_stage, args.loss_config)
    assert "decoder.patch_embedding.weight" in names
    assert any("visual_context_adapter" in name for name in names) is (source_conditioning == "both")
    assert all(name.startswith(("decoder.", "adapter.visual_context_adapter.")) for name in names)
    assert args.source_dropout > 0


def test_source_dropout_is_drawn_per_sample_and_changes_nothing_else(tmp_path):
    samples = [training.sample("v2v", number) for number in range(8)]
    seen = []

    def run(name, **settings):
        model, trained = grown("channels"), []
        trainer = training.trainer(tmp_path / name, samples, model, max_steps=8, condition_dropout=0.5, **settings)
        forward = model.forward
        model.forward = lambda **inputs: trained.append(inputs) or forward(**inputs)
        trainer.train()
        seen.append(trained)

    run("without")
    run("with", source_dropout=0.5)
    without, with_dropout = seen
    assert all("drop_source" not in inputs for inputs in without)
    dropped = torch.cat([inputs["drop_source"] for inputs in with_dropout])
    assert 0 < dropped.sum() < len(dropped)
    for before, after in zip(without, with_dropout, strict=True):
        assert torch.equal(before["drop_instruction"], after["drop_instruction"])


def test_a_probability_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`source_dropout` must be between 0 and 1, got 1\.5"):
        training.trainer(tmp_path, [training.sample("v2v")], grown("channels"), source_dropout=1.5)


def test_the_lora_trains_the_patch_embedding_in_full_and_loads_from_one_file(tmp_path):
    _, args = read_recipe("edit_lora", NEEDED)
    model = grown("both")
    add_lora(model, args.lora)
    layer = model.decoder.patch_embedding
    assert layer.lora_A["default"].weight.shape[0] == 24  # the rank of any 24 x 128 matrix
    assert layer.scaling["default"] == 1.0
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_()
        layer.lora_B["default"].weight.normal_()
    save_lora(model, tmp_path)
    (file,) = tmp_path.iterdir()
    assert any("patch_embedding" in name for name in load_file(file))
    pipe = tiny.pipeline()
    pipe.register_modules(transformer=add_source_channels(pipe.transformer))
    pipe.adapter.register_to_config(source_conditioning="both")
    weight = pipe.transformer.patch_embedding.weight.detach().clone()
    pipe.load_lora_weights(file)
    loaded = pipe.transformer.patch_embedding
    difference = loaded.get_delta_weight("default_0")
    torch.testing.assert_close(difference, layer.get_delta_weight("default"))
    assert difference[:, 16:].abs().sum() > 0
    pipe.unload_lora_weights()
    assert torch.equal(pipe.transformer.patch_embedding.weight, weight)


def test_the_lora_is_refused_by_a_decoder_without_source_channels(tmp_path):
    _, args = read_recipe("edit_lora", NEEDED)
    model = grown("both")
    add_lora(model, args.lora)
    with torch.no_grad():
        model.decoder.patch_embedding.lora_B["default"].weight.normal_()
    save_lora(model, tmp_path)
    with pytest.raises(ValueError, match="patch_embedding"):
        tiny.pipeline().load_lora_weights(tmp_path)


def test_a_lora_of_a_model_without_source_channels_leaves_the_patch_embedding_alone():
    model = tiny.model()
    add_lora(model, {"parts": ["decoder"]})
    assert not hasattr(model.decoder.patch_embedding, "lora_A")
