"""Small videos, images and tables of them, as users have them before training."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from omni_video_hf.media_omni_video import save_video


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
