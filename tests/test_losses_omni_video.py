import pytest
import tiny
import torch
from golden import CORE_EXPECTED, relative_error

from omni_video_hf import OmniVideoConfig, OmniVideoForConditionalGeneration
from omni_video_hf.losses_omni_video import (
    OmniVideoLossConfig,
    alignment_loss,
    draw_timestep_indices,
    mean_token,
    timestep_tables,
)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def batch(size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "mllm_hidden_states": torch.randn(size, 7, 48, generator=generator),
        "prompt_embeds": torch.randn(size, 5, 32, generator=generator),
        "latents": torch.randn(size, 16, 2, 8, 4, generator=generator),
        "source_latents": torch.randn(size, 16, 2, 8, 4, generator=generator),
        "target_features": torch.randn(size, 24, generator=generator),
    }


@pytest.fixture(scope="module")
def model():
    return tiny.model(enable_mllm=False)


# --- tables and draws -----------------------------------------------------------------------------------------------


def test_default_tables_are_upstreams():
    timesteps, weights = timestep_tables(OmniVideoLossConfig())
    assert torch.equal(timesteps, CORE_EXPECTED["train.timesteps_table"])
    assert relative_error(weights, CORE_EXPECTED["train.weights_table"]) < 1e-5


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_other_tables(weighting):
    timesteps, weights = timestep_tables(OmniVideoLossConfig(timestep_weighting=weighting, timestep_shift=1.0))
    sigmas = timesteps / 1000
    assert torch.allclose(sigmas, torch.linspace(1, 0.001, 1000))
    expected = {
        "none": torch.ones(1000),
        "sigma_sqrt": 1 / sigmas**2,
        "cosmap": 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
    }
    assert torch.allclose(weights, expected[weighting])


def test_draws_follow_their_distribution():
    def quartiles(**settings):
        generator = torch.Generator().manual_seed(0)
        indices = draw_timestep_indices(20_000, OmniVideoLossConfig(**settings), generator)
        assert 0 <= int(indices.min()) <= int(indices.max()) <= 999
        return torch.quantile(indices.float(), torch.tensor([0.25, 0.5, 0.75]))

    assert torch.allclose(quartiles(), torch.tensor([250.0, 500.0, 750.0]), atol=12)
    # The quartiles of a normal distribution lie 0.6745 deviations from its mean.
    expected = 1000 * torch.sigmoid(1.0 + 0.5 * torch.tensor([-0.6745, 0.0, 0.6745]))
    drawn = quartiles(timestep_sampling="logit_normal", logit_mean=1.0, logit_std=0.5)
    assert torch.allclose(drawn, expected, atol=12)
    assert not torch.allclose(quartiles(timestep_sampling="mode"), torch.tensor([250.0, 500.0, 750.0]), atol=12)


def test_a_samples_draw_does_not_depend_on_its_batch():
    config = OmniVideoLossConfig()
    together = draw_timestep_indices(3, config, generators(5, 6, 7))
    alone = [draw_timestep_indices(1, config, generators(seed)) for seed in (5, 6, 7)]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(together.tolist())) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment": "l1"}, "`alignment` must be one of cosine, squared_l2, got 'l1'"),
        ({"timestep_sampling": "beta"}, "`timestep_sampling` must be one of uniform"),
        ({"timestep_weighting": "snr"}, "`timestep_weighting` must be one of bell"),
        ({"answer_weight": -1.0}, "`answer_weight` must be 0"),
        ({"timestep_shift": 0.0}, "`timestep_shift` must be more than 0, got 0.0"),
    ],
)
def test_unknown_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OmniVideoLossConfig(**settings)


# --- alignment ------------------------------------------------------------------------------------------------------


def test_alignments():
    features, target = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert torch.allclose(alignment_loss(features, target), torch.tensor(0.5))
    assert torch.allclose(alignment_loss(features, target, "squared_l2"), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"must be \(2, 2\), got \(1, 2\)"):
        alignment_loss(features, target[:1])


def test_mean_token_leaves_padding_out():
    tokens = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert torch.allclose(mean_token(tokens, mask), torch.stack([tokens[0].mean(0), tokens[1, 0]]))
    assert torch.allclose(mean_token(tokens), tokens.mean(1))


@torch.no_grad()
def test_text_alignment_compares_adapter_tokens_with_real_prompt_tokens(model):
    inputs = {key: value for key, value in batch().items() if key in ("mllm_hidden_states", "prompt_embeds")}
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    config = OmniVideoLossConfig(text_alignment_weight=2.0, alignment="squared_l2")
    output = model(**inputs, prompt_embeds_mask=mask, loss_config=config, output_kind="image")
    adapted = model.adapter.adapt_vision_tokens(model.vision_head(inputs["mllm_hidden_states"]), "image").mean(1)
    prompts = torch.stack([inputs["prompt_embeds"][0].mean(0), inputs["prompt_embeds"][1, :2].mean(0)])
    assert torch.allclose(output.text_alignment_loss, (adapted - prompts).square().sum(1).mean())
    assert torch.allclose(output.loss, 2 * output.text_alignment_loss)
    assert output.flow_matching_loss is None


@torch.no_grad()
def test_weights_scale_losses_and_zero_leaves_them_out(model):
    def losses(**weights):
        config = OmniVideoLossConfig(**weights)
        return model(**batch(), loss_config=config, generator=generators(0, 1))

    plain, weighted = losses(), losses(alignment_weight=0.5, flow_matching_weight=3.0, text_alignment_weight=2.0)
    expected = 0.5 * plain.alignment_loss + 3 * plain.flow_matching_loss + 2 * weighted.text_alignment_loss
    assert torch.allclose(weighted.loss, expected)
    without = losses(flow_matching_weight=0.0)
    assert without.velocity is without.flow_matching_loss is None
    assert torch.equal(without.loss, plain.alignment_loss)
    assert losses(alignment_weight=0.0).alignment_loss is None


# --- noise and condition dropout ------------------------------------------------------------------------------------


@torch.no_grad()
def test_generators_decide_what_is_drawn(model):
    first = model(**batch(), generator=generators(0, 1))
    torch.manual_seed(99)
    assert torch.equal(model(**batch(), generator=generators(0, 1)).velocity, first.velocity)
    assert not torch.allclose(model(**batch(), generator=generators(0, 2)).velocity[1], first.velocity[1])


@torch.no_grad()
def test_dropped_conditions_are_the_stored_null_states(model):
    inputs = batch() | {"noise": torch.randn(2, 16, 2, 8, 4), "timesteps": torch.tensor([500.0, 100.0])}
    inputs.pop("target_features")

    def velocity(instruction, prompt, **changed):
        drops = {"drop_instruction": torch.tensor(instruction), "drop_prompt": torch.tensor(prompt)}
        return model(**(inputs | changed), **drops).velocity

    plain = model(**inputs).velocity
    assert torch.allclose(velocity([False] * 2, [False] * 2), plain, atol=1e-5)
    null = model(**(inputs | {"mllm_hidden_states": None, "prompt_embeds": None})).velocity
    dropped = velocity([False, True], [False, True])
    assert torch.allclose(dropped, torch.stack([plain[0], null[1]]), atol=1e-5)
    assert not torch.allclose(null[1], plain[1], atol=1e-3)
    only_text = model(**(inputs | {"prompt_embeds": None})).velocity
    assert torch.allclose(velocity([False] * 2, [True, False]), torch.stack([only_text[0], plain[1]]), atol=1e-5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    masked = velocity([False] * 2, [True, False], prompt_embeds_mask=mask)
    shorter = inputs["prompt_embeds"][1, :3]
    expected = model(**(inputs | {"prompt_embeds": [model.adapter.null_prompt_embeds(), shorter]})).velocity
    assert torch.allclose(masked, expected, atol=1e-5)


@torch.no_grad()
def test_alignment_sees_the_samples_own_tokens_though_dropped(model):
    drops = {"drop_instruction": torch.tensor([True, True]), "drop_prompt": torch.tensor([True, True])}
    plain, dropped = model(**batch()), model(**batch(), **drops)
    assert torch.equal(plain.alignment_loss, dropped.alignment_loss)


# --- parts that are not there ---------------------------------------------------------------------------------------


def test_without_mllm_precomputed_states_train_and_ids_are_refused(model):
    model(**batch(), generator=generators(0, 1)).loss.backward()
    assert model.decoder.proj_out.weight.grad.abs().sum() > 0
    model.zero_grad()
    with pytest.raises(ValueError, match=r"no mllm \(`config.enable_mllm` is False\)"):
        model(**tiny.mllm_inputs())


def test_parts_left_out_by_the_config_are_not_loaded(converted):
    config = OmniVideoConfig.from_pretrained(converted)
    whole = OmniVideoForConditionalGeneration.from_pretrained(converted)
    config.enable_mllm, config.decoder_config = False, None
    part, report = OmniVideoForConditionalGeneration.from_pretrained(
        converted, config=config, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert {name.split(".")[0] for name, _ in part.named_parameters()} == {"vision_head", "adapter"}
    weights = whole.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in part.state_dict().items())
