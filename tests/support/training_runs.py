"""Runs of `omni-video train` on tiny data, in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training
from click.testing import Result
from typer.testing import CliRunner

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.cli.main import app
from omni_video_hf.training.features.cache import ShardWriter, commit, read_records


def write_samples(folder: Path, samples: Sequence[dict[str, Any]]) -> Path:
    """A feature cache of these samples."""
    writer = ShardWriter(folder, 0, 0)
    for number, sample in enumerate(samples):
        tensors = {key: value.contiguous() for key, value in sample.items() if key != "task"}
        if "pixel_values" in tensors:
            tensors["pixel_values"] = tensors["pixel_values"][None]
        instruction = "states" if "mllm_hidden_states" in tensors else "tokens"
        writer.add(str(number), {"task": sample["task"], "instruction": instruction}, tensors)
    writer.flush()
    commit(folder, list(read_records(folder).values()), {})
    return folder


@pytest.fixture(scope="module", name="base")
def base_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that runs begin with."""
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="data")
def data_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples of three tasks."""
    samples = [training.sample(task, number) for task in ("t2i", "t2v", "v2v") for number in range(3)]
    return write_samples(tmp_path_factory.mktemp("samples"), samples)


def command(base: Path | str, data: Path, output: Path, *words: object) -> Result:
    """Four steps of a recipe, the first of `words`; the others are settings."""
    settings = ["--model", base, "--data", data, "--output_dir", output, "--use_cpu", "--bf16", "false", "--max_steps"]
    settings += [4, "--report_to", "none", "--warmup_steps", 0, "--save_steps", 2, "--disable_tqdm"]
    return CliRunner().invoke(app, ["train", "--config", *map(str, [words[0], *settings, *words[1:]])])


def picture(pipeline: OmniVideoPipeline) -> torch.Tensor:
    """Latents of one image, the same for the same weights."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"prompt": "a fox", "task": "t2i", "height": 32, "width": 64, "num_inference_steps": 2}
    return pipeline(**arguments, generator=generator, output_type="latent").frames
