import pytest
import tiny
import torch
import training

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.models.source_channels import add_source_channels, with_source_channels
from omni_video_hf.shapes import CHECKPOINT

WIDE = tiny.DECODER | {"in_channels": 32}


def grown(source_conditioning="both", trained=False):
    """A tiny model and the same with source channels, whose new weights are zero, or `trained` random ones."""
    origin = tiny.model()
    model = tiny.model(
        adapter_config=tiny.ADAPTER | {"source_conditioning": source_conditioning}, decoder_config=dict(WIDE)
    )
    state = origin.state_dict() | {
        f"decoder.{name}": tensor for name, tensor in add_source_channels(origin.decoder).state_dict().items()
    }
    model.load_state_dict(state)
    if trained:
        with torch.no_grad():
            model.decoder.patch_embedding.weight[:, 16:].normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    return origin, model


@torch.no_grad()
def velocity(model, task, **changes):
    batch = {name: value[None] for name, value in training.sample(task).items() if name != "task"}
    if task == "i2v":
        batch["reference_latents"] = batch.pop("source_latents")
    noise = {"noise": torch.ones_like(batch["latents"]), "timesteps": torch.tensor([500.0])}
    return model(**(batch | noise | changes)).velocity


@pytest.mark.parametrize("task", ["t2i", "t2v", "i2i", "v2v", "i2v"])
def test_before_training_velocities_are_those_of_the_origin(task):
    origin, model = grown()
    assert torch.equal(velocity(model, task), velocity(origin, task))


@pytest.mark.parametrize("task", ["i2i", "v2v", "i2v"])
def test_with_channels_alone_the_source_reaches_the_decoder_by_its_channels(task):
    _, model = grown("channels", trained=True)
    name = "reference_latents" if task == "i2v" else "source_latents"
    source = training.sample(task)["source_latents"][None]
    given = velocity(model, task)
    assert not torch.allclose(velocity(model, task, **{name: source + 1}), given, atol=1e-3)
    dropped = velocity(model, task, drop_source=torch.tensor([True]))
    assert torch.equal(dropped, velocity(model, task, **{name: None}))
    assert not torch.allclose(dropped, given, atol=1e-3)


def test_a_dropped_source_is_dropped_from_the_context_as_well_and_for_its_sample_alone():
    _, model = grown("both", trained=True)
    batch = {name: torch.stack([value, value]) for name, value in training.sample("v2v").items() if name != "task"}
    fixed = {"noise": torch.ones_like(batch["latents"]), "timesteps": torch.tensor([500.0, 500.0])}
    with torch.no_grad():
        both = model(**batch, **fixed, drop_source=torch.tensor([True, False])).velocity
    torch.testing.assert_close(both[:1], velocity(model, "v2v", source_latents=None), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1:], velocity(model, "v2v"), atol=1e-5, rtol=1e-5)


def test_the_source_takes_no_context_tokens_with_channels_alone():
    _, both = grown("both")
    _, channels = grown("channels")
    arguments = {"mllm_hidden_states": torch.zeros(1, 7, 48), "prompt_embeds": torch.zeros(1, 5, 32)}
    long = torch.zeros(1, 16, 60, 8, 4)
    assert channels.encode_condition(source_latents=long, **arguments).shape[1] == 6 * 4 + 5 + 4
    with pytest.raises(ValueError, match="max_context_length"):
        both.encode_condition(source_latents=long, **arguments)


def test_what_the_channels_hold():
    noise = torch.randn(2, 16, 3, 4, 4)
    source = torch.randn(2, 16, 3, 4, 4)
    given = with_source_channels(noise, source)
    assert torch.equal(given[:, :16], noise)
    assert torch.equal(given[:, 16:], source)
    assert not with_source_channels(noise)[:, 16:].any()
    first = with_source_channels(noise, reference_latents=source[:1, :, :1])[:, 16:]
    assert torch.equal(first[:, :, :1], source[:1, :, :1].expand(2, -1, -1, -1, -1))
    assert not first[:, :, 1:].any()
    dropped = with_source_channels(noise, source, drop_source=torch.tensor([True, False]))[:, 16:]
    assert not dropped[0].any()
    assert torch.equal(dropped[1], source[1])


def test_the_channels_keep_the_dtype_of_the_noisy_latents():
    assert with_source_channels(torch.zeros(1, 16, 1, 2, 2).bfloat16(), torch.zeros(1, 16, 1, 2, 2)).dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_latents": torch.zeros(1, 16, 2, 4, 4)}, r"`source_latents` must be \(2, 16, 3, 4, 4\)"),
        ({"source_latents": torch.zeros(3, 16, 3, 4, 4)}, "`source_latents` must be"),
        ({"reference_latents": torch.zeros(2, 16, 3, 4, 4)}, r"`reference_latents` must be \(2, 16, 1, 4, 4\)"),
        (
            {"source_latents": torch.zeros(2, 16, 3, 4, 4), "reference_latents": torch.zeros(2, 16, 1, 4, 4)},
            "not both",
        ),
    ],
)
def test_latents_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        with_source_channels(torch.zeros(2, 16, 3, 4, 4), **arguments)


def test_no_source_is_told_from_a_black_one():
    """The VAE of the shipped checkpoint gives no zeros for black, nor for any plain colour."""
    pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32, transformer=None, text_encoder=None)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    for level in (-1.0, 0.0, 1.0):
        pixels = torch.full((1, 3, 1, 64, 64), level)
        with torch.no_grad():
            latents = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std
        assert latents.abs().mean() > 0.1


def test_decoders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must take 32 input channels"):
        tiny.config(adapter_config=tiny.ADAPTER | {"source_conditioning": "both"})
    with pytest.raises(ValueError, match="must take 16 input channels"):
        tiny.config(decoder_config=dict(WIDE))
    with pytest.raises(ValueError, match="one of 'context', 'channels', 'both', got 'tokens'"):
        tiny.config(adapter_config=tiny.ADAPTER | {"source_conditioning": "tokens"})
    with pytest.raises(ValueError, match="may have them already"):
        add_source_channels(add_source_channels(tiny.decoder()))


def test_the_new_weights_learn():
    _, model = grown()
    batch = {name: value[None] for name, value in training.sample("v2v").items() if name != "task"}
    model(**batch, noise=torch.ones_like(batch["latents"]), timesteps=torch.tensor([500.0])).loss.backward()
    assert model.decoder.patch_embedding.weight.grad[:, 16:].abs().sum() > 0
