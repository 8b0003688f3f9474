import contextlib

import pytest
import tiny
import torch
from golden import CORE_EXPECTED, assert_equal_but_rounding, relative_error
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)

from omni_video_hf import OmniVideoConfig, OmniVideoForConditionalGeneration
from omni_video_hf.diffusion.losses import (
    OmniVideoLossConfig,
    alignment_loss,
    draw_timestep_indices,
    mean_token,
    timestep_tables,
    without_directions,
)
from omni_video_hf.models import modeling_omni_video


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


# --- tables and sampling of timesteps --------------------------------------------------------------------------------


def test_default_tables_are_upstreams():
    timesteps, weights = timestep_tables(OmniVideoLossConfig())
    assert_equal_but_rounding(timesteps, CORE_EXPECTED["train.timesteps_table"])
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


def test_timesteps_follow_their_distribution():
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


def test_the_timestep_of_a_sample_does_not_depend_on_its_batch():
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
def test_text_alignment_changes_nothing_that_the_decoder_is_shown(model):
    """The adapter runs once for both, and what is dropped is dropped all the same."""
    inputs, drawn = (
        batch(),
        {"timesteps": torch.tensor([500.0, 600.0]), "drop_instruction": torch.tensor([True, False])},
    )
    drawn["noise"] = torch.randn_like(inputs["latents"])
    plain, aligned = (
        model(**inputs, **drawn, loss_config=OmniVideoLossConfig(text_alignment_weight=weight))
        for weight in (0.0, 1.0)
    )
    torch.testing.assert_close(aligned.velocity, plain.velocity)
    kept = model(**inputs, **drawn | {"drop_instruction": torch.zeros(2, dtype=torch.bool)})
    assert not torch.allclose(kept.velocity[0], plain.velocity[0])


@torch.no_grad()
def test_text_alignment_with_a_text_on_the_target_instead_of_the_prompt(model):
    """An edit's prompt does not say what there will be to see; the decoder is shown the prompt all the same."""
    inputs, config = batch(), OmniVideoLossConfig(text_alignment_weight=1.0)
    text, mask = torch.randn_like(inputs["prompt_embeds"]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    seeds = {"noise": torch.randn_like(inputs["latents"]), "timesteps": torch.tensor([500.0, 600.0])}
    plain = model(**inputs, **seeds, loss_config=config)
    other = model(**inputs, **seeds, target_prompt_embeds=text, target_prompt_embeds_mask=mask, loss_config=config)
    said = model(**inputs | {"prompt_embeds": text}, **seeds, prompt_embeds_mask=mask, loss_config=config)
    assert torch.equal(other.velocity, plain.velocity)
    assert torch.equal(other.text_alignment_loss, said.text_alignment_loss)
    assert not torch.allclose(other.text_alignment_loss, plain.text_alignment_loss)


@torch.no_grad()
def test_text_alignment_ignores_the_given_directions(model):
    inputs = {key: value for key, value in batch().items() if key in ("mllm_hidden_states", "prompt_embeds")}
    config = OmniVideoLossConfig(text_alignment_weight=1.0, alignment="squared_l2")
    width = inputs["prompt_embeds"].shape[-1]
    torch.manual_seed(0)
    rows = torch.nn.init.orthogonal_(torch.empty(3, width))
    unsaid = torch.stack([rows, torch.zeros_like(rows)])

    def loss(texts):
        inputs["prompt_embeds"] = texts
        return model(
            **inputs, target_prompt_unsaid=unsaid, loss_config=config, output_kind="image"
        ).text_alignment_loss

    texts = inputs["prompt_embeds"]
    adapted = model.adapter.adapt_vision_tokens(model.vision_head(inputs["mllm_hidden_states"]), "image").mean(1)
    gap = adapted - texts.mean(1)
    expected = (gap[0].square().sum() - (rows @ gap[0]).square().sum() + gap[1].square().sum()) / 2
    torch.testing.assert_close(loss(texts), expected)
    torch.testing.assert_close(loss(texts + torch.stack([20 * rows[:1], 0 * rows[:1]])), expected)
    assert loss(texts + torch.stack([0 * rows[:1], 20 * rows[:1]])) > 2 * expected
    with pytest.raises(ValueError, match=rf"\[2, number, {width}\], got \(2, {width}\)"):
        model(**inputs, target_prompt_unsaid=rows[:2], loss_config=config, output_kind="image")


def test_what_is_left_across_directions_is_in_float32_under_autocast():
    torch.manual_seed(0)
    features = torch.randn(2, 16, dtype=torch.bfloat16)
    rows = torch.nn.init.orthogonal_(torch.empty(2 * 3, 16)).unflatten(0, (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        left = without_directions(features, rows)
    assert left.dtype == torch.float32
    for feature, row, rest in zip(features.float(), rows, left, strict=True):
        torch.testing.assert_close(rest + row.T @ (row @ feature), feature)
        torch.testing.assert_close(row @ rest, torch.zeros(3), atol=1e-5, rtol=0)


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
def test_generators_determine_noise_and_timesteps(model):
    first = model(**batch(), generator=generators(0, 1))
    torch.manual_seed(99)
    assert torch.equal(model(**batch(), generator=generators(0, 1)).velocity, first.velocity)
    assert not torch.allclose(model(**batch(), generator=generators(0, 2)).velocity[1], first.velocity[1])


@torch.no_grad()
def test_every_frame_may_have_its_own_noise(model):
    inputs = batch() | {"noise": torch.randn(2, 16, 2, 8, 4)}
    config = OmniVideoLossConfig(alignment_weight=0.0, timestep_weighting="none")

    def output(timesteps):
        return model(**inputs, timesteps=torch.tensor(timesteps), loss_config=config)

    once, of_frames = output([500.0, 100.0]), output([[500.0, 500.0], [100.0, 100.0]])
    torch.testing.assert_close(of_frames.velocity, once.velocity)
    torch.testing.assert_close(of_frames.loss, once.loss)
    uneven = output([[500.0, 900.0], [100.0, 100.0]])
    torch.testing.assert_close(uneven.velocity[1], once.velocity[1])
    assert not torch.allclose(uneven.velocity[0], once.velocity[0], atol=1e-3)


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


# --- exact savings --------------------------------------------------------------------------------------------------


def loss_and_gradients(model, inputs, **settings):
    model.zero_grad()
    output = model(
        **inputs, generator=generators(1, 2), loss_config=OmniVideoLossConfig(alignment_weight=0), **settings
    )
    output.loss.backward()
    return output.loss.detach(), {n: p.grad for n, p in model.decoder.named_parameters() if p.grad is not None}


def assert_same_training(found, wanted):
    assert relative_error(found[0], wanted[0]) < 1e-6
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("dropped", [None, [True, False]])
def test_precomputed_vision_embeds_train_the_decoder_as_states_do(model, dropped):
    inputs = batch()
    del inputs["target_features"]
    drop = {} if dropped is None else {"drop_instruction": torch.tensor(dropped)}
    wanted = loss_and_gradients(model, inputs | drop)
    with torch.no_grad():
        embeds = model.adapter.adapt_vision_tokens(model.vision_head(inputs.pop("mllm_hidden_states")))
    inputs["vision_embeds"] = embeds
    runs = []
    hook = model.adapter.query_transformer.register_forward_hook(lambda *_: runs.append(1))
    found = loss_and_gradients(model, inputs | drop)
    hook.remove()
    assert_same_training(found, wanted)
    assert len(runs) == (0 if dropped is None else 1)


def test_vision_embeds_do_not_stand_for_states_or_come_with_tokens(model):
    inputs = batch()
    embeds = torch.zeros(2, 24, 32)
    states = inputs.pop("mllm_hidden_states")
    with pytest.raises(ValueError, match="pass `mllm_hidden_states` as well"):
        model(**inputs, vision_embeds=embeds)
    assert model(**inputs, vision_embeds=embeds, mllm_hidden_states=states).alignment_loss is not None
    for arguments in ({}, {"vision_tokens": torch.zeros(2, 4, 24), "vision_embeds": embeds}):
        with pytest.raises(ValueError, match="one of the two"):
            model.adapter(**arguments)


@pytest.mark.parametrize("checkpointing", ["none", "diffusers'", "transformers'", "reentrant"])
def test_padding_is_folded_in_training_with_the_same_gradients(checkpointing):
    model, inputs = tiny.model(enable_mllm=False), batch()
    del inputs["target_features"]
    lengths, processors = [], [block.attn2.processor for block in model.decoder.blocks]
    model.decoder.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[1].shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_omni_video, "folded_context", padded_context)
        wanted = loss_and_gradients(model, inputs)
    model.train()
    if checkpointing == "diffusers'":
        model.decoder.enable_gradient_checkpointing()
    elif checkpointing != "none":
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.decoder.patch_embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
    own = getattr(model.decoder, "_gradient_checkpointing_func", None)
    found = loss_and_gradients(model, inputs)
    assert len(lengths) == (2 if checkpointing == "none" else 3)
    assert lengths[0] == model.adapter.config.max_context_length > lengths[1] == lengths[-1]
    assert [block.attn2.processor for block in model.decoder.blocks] == processors
    assert getattr(model.decoder, "_gradient_checkpointing_func", None) is own
    assert_same_training(found, wanted)


@contextlib.contextmanager
def padded_context(decoder, context, length):
    yield torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1]))


def test_a_wrapper_that_runs_blocks_again_gets_the_padded_context():
    model, inputs = tiny.model(enable_mllm=False), batch()
    del inputs["target_features"]
    wanted = loss_and_gradients(model, inputs)
    apply_activation_checkpointing(model.decoder, check_fn=lambda module: module in set(model.decoder.blocks))
    found = loss_and_gradients(model, inputs)
    assert all(isinstance(block, CheckpointWrapper) for block in model.decoder.blocks)
    assert_same_training(
        (found[0], {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in found[1].items()}), wanted
    )


def test_folding_under_autocast_is_as_near_as_padding(model):
    inputs = batch()
    latents, timesteps = inputs["latents"], torch.tensor([300.0, 700.0])
    with torch.no_grad():
        context = model.encode_condition(inputs["mllm_hidden_states"], inputs["prompt_embeds"])
        exact = model.predict_velocity(latents, timesteps, context)
        padded = model.adapter.pad_context(context)
        with torch.autocast("cpu", torch.bfloat16):
            plain = model.decoder(latents, timesteps, padded).sample
            folded = model.predict_velocity(latents, timesteps, context)
    assert relative_error(folded, exact) < 1.2 * relative_error(plain, exact)
