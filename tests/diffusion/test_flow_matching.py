import numpy as np
import pytest
import torch
from golden import CORE_EXPECTED, TASKS, assert_equal_but_rounding, relative_error

from omni_video_hf.diffusion.flow_matching import (
    add_noise,
    flow_matching_loss,
    sampling_sigmas,
    shift_sigmas,
    token_timesteps,
    training_sigmas,
    training_weights,
    velocity_target,
)


def test_training_tables_are_upstreams():
    timesteps = training_sigmas() * 1000
    assert_equal_but_rounding(timesteps, CORE_EXPECTED["train.timesteps_table"])
    assert relative_error(training_weights(timesteps), CORE_EXPECTED["train.weights_table"]) < 1e-5
    assert abs(float(training_weights(timesteps).sum()) - 1000) < 1e-2


def test_noising_target_and_loss_are_upstreams():
    for case in TASKS:
        expected = {key: CORE_EXPECTED[f"train.{case}.{key}"] for key in ("noise", "noisy", "target", "timestep")}
        latents = expected["noise"] - expected["target"]
        noisy = add_noise(latents, expected["noise"], expected["timestep"] / 1000)
        assert relative_error(noisy, expected["noisy"]) < 1e-5
        assert relative_error(velocity_target(latents, expected["noise"]), expected["target"]) < 1e-5
        loss = flow_matching_loss(
            CORE_EXPECTED[f"train.{case}.velocity"], expected["target"], CORE_EXPECTED[f"train.{case}.weight"]
        )
        assert relative_error(loss[None], CORE_EXPECTED[f"train.{case}.loss"]) < 1e-5


def test_noising_ends_at_data_and_noise():
    latents, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mixed = add_noise(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], latents[0])
    assert torch.equal(mixed[1], noise[1])


def test_every_frame_may_have_its_own_noise():
    latents, noise = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    sigmas = torch.rand(2, 4)
    mixed = add_noise(latents, noise, sigmas)
    for frame in range(4):
        alone = add_noise(latents[:, :, [frame]], noise[:, :, [frame]], sigmas[:, frame])
        assert torch.equal(mixed[:, :, [frame]], alone)
    losses = [flow_matching_loss(mixed[:, :, [f]], noise[:, :, [f]], sigmas[:, f]) for f in range(4)]
    torch.testing.assert_close(flow_matching_loss(mixed, noise, sigmas), torch.stack(losses).mean())


def test_tokens_have_the_timesteps_of_their_frames():
    tokens = token_timesteps(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 16, 2, 4, 6), (1, 2, 2))
    assert tokens.tolist() == [[1.0] * 6 + [2.0] * 6, [3.0] * 6 + [4.0] * 6]
    with pytest.raises(ValueError, match=r"must be \(2, 2\)"):
        token_timesteps(torch.zeros(2, 3), torch.zeros(2, 16, 2, 4, 6), (1, 2, 2))
    with pytest.raises(ValueError, match="tokens of 2"):
        token_timesteps(torch.zeros(2, 2), torch.zeros(2, 16, 2, 4, 6), (2, 2, 2))


def test_velocity_carries_noise_to_data():
    latents, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    sigmas = torch.tensor([0.3, 0.8], dtype=torch.float64)
    noisy = add_noise(latents, noise, sigmas)
    assert torch.allclose(noisy - sigmas[:, None, None] * velocity_target(latents, noise), latents)


def test_shift_keeps_the_ends_and_one_is_no_shift():
    sigmas = torch.linspace(0, 1, 11)
    for shift in (1.0, 3.0, 12.0):
        shifted = shift_sigmas(sigmas, shift)
        assert float(shifted[0]) == 0
        assert float(shifted[-1]) == 1
        assert bool((shifted[1:] > shifted[:-1]).all())
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


def test_sampling_sigmas():
    assert np.allclose(sampling_sigmas(4), [0.999, 0.74925, 0.4995, 0.24975])
