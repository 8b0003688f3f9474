"""From files on the disk to a fine-tune on the Hub, by the commands that the documentation names."""

import json

import numpy as np
import pytest
import tiny
import torch
from golden import DATA
from hub_cards import card_problems
from hub_server import hub_server_fixture, run_client  # noqa: F401
from PIL import Image
from raw_data import datasets_cache, make_clip, make_image, write_jsonl, write_pickle  # noqa: F401 - a fixture
from strangers import expected_outputs, last_json, open_doors

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline
from omni_video_hf.hub.model_card import TrainingSummary
from omni_video_hf.media.images import contact_sheet
from omni_video_hf.training.reporting.previews import PREVIEW_SEED

NAME, BASE = "lab/bunnies", "lab/omni-video-tiny"
PREVIEW = {"prompt": "a bunny", "task": "t2i", "height": 32, "width": 32, "num_inference_steps": 2}


def omni_video(server, *words):
    code = f"import sys\nsys.argv = {['omni-video', *map(str, words)]!r}\n"
    return run_client(code + "from omni_video_hf.cli.main import main\nsys.exit(main())", server)


def imported(folder, server):
    """Upstream's feature files."""
    for number in range(2):
        write_pickle(folder / "pickles" / f"t2v_{number}.pkl", number)
        write_pickle(folder / "pickles" / f"t2i_{number}.pkl", number, frames=1, frame_num=None)
        write_pickle(folder / "pickles" / f"v2v_{number}.pkl", number, source=True)
    omni_video(server, "import-features", folder / "pickles", "--output", folder / "cache")


def precomputed(folder, server):
    """A real clip, and edits of generated ones."""
    for number in range(2):
        make_clip(folder / f"target{number}.mp4", frames=17, seed=number)
        make_clip(folder / f"source{number}.mp4", frames=17, seed=2 + number)
        make_image(folder / f"{number}.png")
    rows = [{"task": "t2v", "prompt": "a bunny", "media": str(DATA / "bigbuckbunny.mp4")}]
    rows += [{"task": "t2i", "prompt": "red", "media": f"{number}.png"} for number in range(2)]
    for number in range(2):
        rows.append({"task": "v2v", "prompt": "more", "media": f"target{number}.mp4", "source": f"source{number}.mp4"})
    table = write_jsonl(folder / "data.jsonl", *rows)
    settings = ["--size", "64x32", "--frames", "5", "--fps", "8"]
    omni_video(server, "precompute", table, "--model", BASE, "--output", folder / "cache", *settings)


@pytest.mark.slow
@pytest.mark.parametrize("make_cache", [imported, precomputed])
def test_data_become_a_fine_tune_on_the_hub(make_cache, hub_server, tmp_path):
    tiny.pipeline(max_context_length=300).save_pretrained(tmp_path / "base")
    hub_server.add_repo(BASE, tmp_path / "base")
    make_cache(tmp_path, hub_server)
    output, cache = tmp_path / "run", tmp_path / "cache"
    words = [
        "--model",
        BASE,
        "--output_dir",
        output,
        "--data",
        cache,
        "--eval_data",
        cache,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        2,
    ]
    words += ["--max_steps", 4, "--warmup_steps", 0, "--learning_rate", 1e-2, "--save_steps", 2]
    words += ["--use_cpu", "--bf16", "false", "--report_to", "none"]
    words += ["--preview_steps", 2, "--previews", json.dumps([PREVIEW])]
    omni_video(hub_server, "train", "--config", "decoder", *words, "--push_to_hub", "--hub_model_id", NAME)

    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert {"eval_flow_matching_loss_t2v", "eval_flow_matching_loss_v2v"} <= set().union(*state["log_history"])
    pipe = OmniVideoPipeline.from_pretrained(output / "pipeline")
    # Images of the model during training, and of the saved model.
    seen = np.asarray(Image.open(output / "previews" / "step-000004.png"))
    assert np.array_equal(seen, np.asarray(contact_sheet(draw(pipe)[0])))
    untrained = OmniVideoPipeline.from_pretrained(tmp_path / "base")
    assert not np.array_equal(seen, np.asarray(contact_sheet(draw(untrained)[0])))

    model = OmniVideoForConditionalGeneration.from_pretrained(output / "pipeline")
    assert last_json(run_client(open_doors(NAME), hub_server)) == expected_outputs(pipe, model, pipe.processor)
    summary = TrainingSummary.read(output / "pipeline")
    assert (summary.base_model, summary.steps, summary.stage) == (BASE, 4, "decoder")
    card = hub_server.repos[NAME].find("main").files["README.md"].data.decode()
    assert card_problems(card) == ([], [])
    assert f"base_model: {BASE}" in card
    assert hub_server.token not in hub_server.output


def draw(pipe):
    return pipe(**PREVIEW, generator=torch.Generator().manual_seed(PREVIEW_SEED)).frames
