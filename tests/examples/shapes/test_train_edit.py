"""Pairs of edits, and the decoder's training on them in a few steps, from the shipped checkpoint."""

import copy
import shutil
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
import typer
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from examples.shapes import assemble
from examples.shapes.training import edit_pairs, train_edit
from examples.shapes.training.edit_pairs import STREAMS, EditFeatures, make_pair
from examples.shapes.training.wide_decoder import merge, widen
from omni_video_hf import OmniVideoPipeline
from omni_video_hf.models.source_channels import add_source_channels
from omni_video_hf.shapes import CHECKPOINT
from omni_video_hf.shapes.dataset import ShapesDataset
from omni_video_hf.shapes.judge import find_centers
from omni_video_hf.shapes.scene import HELD_OUT

SHORTEN = 1500
SMALL = {
    name: replace(phase, steps=2, image_batch_size=8, video_batch_size=4) for name, phase in train_edit.PHASES.items()
}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """The shipped checkpoint as it was before it learned edits, in `base`, and pairs."""
    folder = tmp_path_factory.mktemp("edit")
    pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    if pipe.adapter.takes_source_in_channels:
        pipe.transformer = without_source_channels(pipe.transformer)
        pipe.adapter.register_to_config(source_conditioning="context")
    pipe.save_pretrained(folder / "base")
    edit_pairs.main(folder / "base", folder / "edit_pairs", shorten=SHORTEN)
    return folder


@torch.no_grad()
def without_source_channels(decoder):
    config = {name: value for name, value in decoder.config.items() if not name.startswith("_")}
    plain = WanTransformer3DModel(**config | {"in_channels": config["out_channels"]})
    state = decoder.state_dict()
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, : config["out_channels"]]
    plain.load_state_dict(state)
    return plain


def train(folder, output):
    with patch.dict(train_edit.PHASES, SMALL):
        train_edit.train(folder / "base", folder / "edit_pairs", output, shorten=1, seed=21, save_steps=1)


@pytest.fixture(scope="module")
def trained(encoded):
    train(encoded, encoded / "edit")
    return encoded


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("stream", STREAMS)
def test_pairs_are_a_function_of_their_number(stream, kind):
    first, again, other = (make_pair(stream, kind, index) for index in (0, 0, 1))
    assert first.prompt == again.prompt
    assert np.array_equal(first.target, again.target)
    assert not np.array_equal(first.target, other.target)
    assert first.target.shape == (17 if kind == "video" else 1, 64, 64, 3)
    assert (first.source is None) == (stream == "texts")


def test_sources_of_any_look_change_in_what_is_asked_for_alone():
    dataset = ShapesDataset("i2i", "train", 200, edit_pairs.SEEDS["others"])
    seen = set()
    for index in range(60):
        example, pair = dataset.example(index), make_pair("others", "image", index)
        assert not np.array_equal(pair.source, pair.target), example
        if example.attribute == "color":
            assert np.array_equal(pair.source[0, 0, 0], pair.target[0, 0, 0])  # the background
        if example.attribute in ("color", "background"):
            centers = find_centers(pair.source), find_centers(pair.target)
            if np.isfinite(centers).all():
                assert np.abs(centers[0] - centers[1]).max() < 1
                seen.add(example.attribute)
        assert (example.target.color, example.target.shape) not in HELD_OUT
    assert seen == {"color", "background"}


def test_what_asks_for_nothing_new_changes_nothing():
    for index in range(20):
        pair = make_pair("keep", "video", index)
        assert np.array_equal(pair.source, pair.target)


def test_features_are_those_of_the_pipeline(encoded):
    pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    features = EditFeatures(encoded / "edit_pairs", "edits", "video").tensors
    pair = make_pair("edits", "video", 1)
    latents = edit_pairs.encode(pipe, [pair.source])
    torch.testing.assert_close(features["source"][1:2].float(), latents, atol=2e-3, rtol=2e-3)
    (text,) = pipe.encode_prompt(pair.prompt)
    assert features["prompt_length"][1] == len(text)
    torch.testing.assert_close(features["prompt_embeds"][1, : len(text)].float(), text.detach(), atol=2e-3, rtol=2e-3)


def test_missing_pairs_are_refused(encoded, tmp_path):
    shutil.copytree(encoded / "edit_pairs", tmp_path / "pairs")
    (tmp_path / "pairs" / "videos.json").unlink()
    with pytest.raises(ValueError, match="pairs of videos are missing"):
        EditFeatures(tmp_path / "pairs", "edits", "video")


def test_the_decoder_learns_from_every_phase_and_resumes_bit_for_bit(trained, tmp_path):
    weights = load_file(trained / "edit" / "transformer" / "diffusion_pytorch_model.safetensors")
    before = load_file(trained / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["patch_embedding.weight"].shape[1] == 32
    assert weights["patch_embedding.weight"][:, 16:].abs().sum() > 0
    for name, old in before.items():  # what the decoder knew is there unchanged, and new neurons have learned
        where = tuple(slice(size) for size in old.shape)
        assert torch.equal(weights[name][where], old), name
        if name.endswith("ffn.net.2.weight"):
            assert weights[name].shape[1] == old.shape[1] + train_edit.NEURONS
            assert weights[name][:, old.shape[1] :].abs().sum() > 0
    shutil.copytree(trained / "edit", tmp_path / "edit")
    shutil.rmtree(tmp_path / "edit" / "transformer")
    last = list(SMALL)[-1]
    shutil.rmtree(tmp_path / "edit" / last / "checkpoint-2")
    train(trained, tmp_path / "edit")
    again = load_file(tmp_path / "edit" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_model_with_source_channels_is_refused(trained, tmp_path):
    pipe = OmniVideoPipeline.from_pretrained(trained / "base")
    pipe.transformer = add_source_channels(pipe.transformer)
    pipe.adapter.register_to_config(source_conditioning="both")
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has source channels already"):
        train_edit.train(tmp_path / "model", trained / "edit_pairs", tmp_path / "edit")


@torch.no_grad()
def test_new_neurons_begin_silent_and_the_merged_decoder_is_the_same():
    plain = tiny.decoder()
    before = copy.deepcopy(plain)
    wide = widen(plain, 8)
    noisy, source = torch.randn(2, 1, plain.config.in_channels, 2, 4, 4)
    rest = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.randn(1, 5, plain.config.text_dim)}
    assert torch.equal(wide(torch.cat([noisy, source], 1), **rest).sample, before(noisy, **rest).sample)
    for parameter in wide.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1)
    expected = wide(torch.cat([noisy, source], 1), **rest).sample
    torch.testing.assert_close(merge(wide)(torch.cat([noisy, source], 1), **rest).sample, expected)


def test_another_seed_does_not_go_on_with_this_training(trained):
    with patch.dict(train_edit.PHASES, SMALL), pytest.raises(typer.BadParameter, match="began with seed 21, not 22"):
        train_edit.train(trained / "base", trained / "edit_pairs", trained / "edit", shorten=1, seed=22, save_steps=1)


def test_the_finished_repository_edits_through_its_source_channels(trained, tmp_path):
    assemble.finished(trained / "base", tmp_path / "omni-video-shapes", trained / "edit" / "transformer")
    pipe = OmniVideoPipeline.from_pretrained(tmp_path / "omni-video-shapes")
    assert pipe.adapter.takes_source_in_channels
    item = ShapesDataset("v2v", "seen", 1)[0]
    output = pipe(item["prompt"], video=item["source"], task="v2v", num_inference_steps=1, output_type="np")
    assert output.frames.shape == (1, 17, 64, 64, 3)
