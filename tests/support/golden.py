"""Upstream's weights and numbers at tiny sizes, where tests find them, and how closeness is measured."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data"
CORE = DATA / "core_A"
VILA = DATA / "vila_A"

# Decoder, VAE and bridges were computed by upstream's code in float32; so was everything of VILA.
CORE_EXPECTED = load_file(CORE / "expected.safetensors")
VILA_EXPECTED = {
    "checkpoint": load_file(VILA / "golden.safetensors"),
    "checkpoint_even": load_file(VILA / "golden_even.safetensors"),
}
PROMPTS = json.loads((VILA / "prompts.json").read_text())
DIMS = json.loads((CORE / "dims.json").read_text())

TASKS = ("t2v", "t2i", "v2v", "i2i")


def kind(case: str) -> str:
    """Outputs of a golden case."""
    return "video" if case.startswith(("t2v", "v2v")) else "image"


def assert_equal_but_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Every float32 number within two of its last digits, in which processors differ."""
    torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0.0)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`|actual - expected| / |expected|`; shapes must be equal."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
