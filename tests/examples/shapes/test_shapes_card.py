"""The card of the small checkpoint says what its training left."""

import json
from pathlib import Path

import pytest
import torch
from hub_cards import card_problems
from PIL import Image
from safetensors.torch import save_file

from examples.shapes.card import RUNS, TEMPLATE, training_row, write_card
from examples.shapes.training.train_text_to_video import PHASES
from omni_video_hf.shapes.scores import Count, Place, Report, Score

ROOT = Path(__file__).parents[3]


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture
def build(tmp_path):
    """What `make shapes` leaves, without weights."""
    for number, folder in enumerate(RUNS):
        log = [{"loss": 3.0, "step": 1}, {"loss": number + 0.125, "step": 2}, {"train_runtime": 5.0, "step": 2}]
        name, _, phase = folder.partition("/")
        if phase:
            write(tmp_path / folder / "checkpoint-2" / "trainer_state.json", {"log_history": log})
        else:
            write(tmp_path / folder / "stage.json", {"log": log})
        settings = {"learning_rate": 1e-3, "seed": 7, "batch_size": 4, "image_batch_size": 8}
        settings |= {"vision_batch_size": 64, "vision_learning_rate": 2e-3}
        if name == "text_to_video":  # where every phase has its own
            del settings["learning_rate"]
            settings["phases"] = {phase: {"learning_rate": 1e-2} for phase in PHASES}
        if not phase:
            settings = {"recipe": {"learning_rate": 1e-4, "seed": 8, "per_device_train_batch_size": 32}}
            settings["command"] = ["--data", "latents", "--learning_rate", "5e-4"]
        write(tmp_path / name / "settings.json", settings)
    scores = (
        Score.of("t2v", "seen", [{"all": True}] * 3 + [{"all": False}]),
        Score.of("t2v", "composition", [{"all": True}, {"all": False}]),
        Score("v2v", "seen", {"all": Count(3, 4)}, Place("seen", (0.5, 0.75, 1.0, 9.0))),
        Score.of("routing", "seen", [{"all": True}] * 4),
    )
    write(tmp_path / "vae_decoder" / "vae.json", {"scores": [scores[0].to_dict(), scores[1].to_dict()]})
    write(tmp_path / "scores" / "scores.json", Report(scores, {"count": 4, "seed": 9}).to_dict())
    Image.new("RGB", (4, 4)).save(tmp_path / "scores" / "strip.png")
    return tmp_path


def test_the_card_is_valid_and_says_everything(build, tmp_path):
    model = tmp_path / "model"
    (model / "vae").mkdir(parents=True)
    save_file({"a": torch.zeros(1_000_000, dtype=torch.float16)}, model / "vae" / "model.safetensors")
    write_card(build, model, ROOT / "model_cards" / TEMPLATE)
    card = (model / "README.md").read_text()
    assert card_problems(card) == ([], [])
    assert "1.0 million\nparameters, 2.0 MB" in card
    assert "--count 4 --seed 9" in card
    assert "| 75.0 % (30.1 to 95.4) | 95 % | 50.0 % (9.5 to 90.5) | 80 % |" in card
    assert "| 100.0 % (51.0 to 100.0) | 99 % |  |  |" in card
    assert "| 0.9 px, 75.0 % | 0.7 px, 97 % |  |  |" in card
    for training in (
        "VAE, images | 2 | 8 | 0.001 | 7 | 0.1250",
        "VAE, clips | 2 | 4 | 0.001 | 7 | 1.1250",
        "SigLIP | 2 | 64 | 0.002 | 7 | 4.1250",
        "Wan transformer, images | 2 | 8 | 0.01 | 7 | 7.1250",
        f"stage `{list(RUNS)[-1]}` | 2 | 32 | 0.0005 | 8 | {len(RUNS) - 1}.1250",
    ):
        assert f"| {training} |" in card
    assert "right in 75.0 %, 50.0 % of" in card
    assert (model / "strip.png").read_bytes() == (build / "scores" / "strip.png").read_bytes()


def test_a_training_that_is_missing_is_named(build):
    (build / "align" / "stage.json").unlink()
    (build / "vae" / "clips" / "checkpoint-2" / "trainer_state.json").unlink()
    (build / "vae" / "clips" / "checkpoint-2").rmdir()
    for folder, named in (("align", "align: stage `align`"), ("vae/clips", "clips: VAE, clips")):
        with pytest.raises(ValueError, match=f"{named} is not done: run `make shapes`"):
            training_row(build, folder)
