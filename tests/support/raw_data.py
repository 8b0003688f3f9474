"""Small videos, images and tables of them, as users have them before training."""

import json
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from omni_video_hf.media.video_writer import save_video


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keeps what `datasets` reads out of the user's own cache, also in processes that a test starts."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        yield


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_clip(path, frames=9, size=(64, 48), fps=8, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    save_video(np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8), path, fps)
    return path


def make_image(path, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 10)).save(path)
    return path


def write_pickle(path, number=0, frames=2, source=False, **changes):
    """A file laid out as upstream's: own numbers, own file."""
    generator = torch.Generator().manual_seed(number)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    content = {
        "prompt": f"sample {number}",
        "latent_feature_tgt": draw(16, frames, 8, 4),
        "t5_emb": [draw(5 + number, 32).bfloat16()],
        "frame_num": 4 * (frames - 1) + 1,
        "vlm_last_hidden_states": draw(1, 7 + number, 48).half(),
        "siglip2_img_pooled_output_tgt": draw(1, 24),
    }
    if source:
        content["latent_feature"] = draw(16, frames, 8, 4)
    content |= changes
    content = {name: value for name, value in content.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(content, file)
    return content
