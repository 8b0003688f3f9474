"""Fixtures that several modules share."""

import logging
import os

# Weights that are read from a file lie elsewhere in memory than those that were just made, and MKL may then add in
# another order. Bit-equality is only to be had with one code path for both.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
from golden import CORE
from transformers import set_seed

from conversion.convert_omni_video import convert

SLOW = ("documents", "examples", "benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of documents, examples and benchmarks as slow: they are about the package as a whole."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """
    Seed what a test and its fixtures draw, and let the package log.

    torch begins with another seed in every process: a test that one draw in a hundred breaks would be red on somebody
    else's change. Commands that earlier tests ran in this process have silenced the package's logger.
    """
    set_seed(0)
    logging.getLogger("omni_video_hf").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream's golden checkpoint as our repository."""
    output = tmp_path_factory.mktemp("converted") / "omni-video-tiny"
    convert(CORE / "omni_ckpts", output, max_context_length=64)
    return output


@pytest.fixture(scope="session")
def converted_2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Upstream's golden checkpoints of Omni-Video 2 as our repositories, by layout."""
    from golden_2 import MLLMS, converted  # noqa: PLC0415 - reads data that other tests do not need

    return {layout: converted(tmp_path_factory.mktemp("converted_2"), layout) for layout in MLLMS}
