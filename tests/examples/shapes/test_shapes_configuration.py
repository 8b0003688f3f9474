import pytest
import torch
from rich.console import Console

from examples.shapes import configuration
from examples.shapes.configuration import MAX_BYTES, num_parameters, size_table
from omni_video_hf import OmniVideoPipeline
from omni_video_hf.shapes import ShapesDataset


@pytest.fixture(scope="module")
def pipe() -> OmniVideoPipeline:
    torch.manual_seed(0)
    built = configuration.pipeline()
    built.set_progress_bar_config(disable=True)
    return built


def test_all_parts_fit_in_half_precision(pipe):
    numbers = num_parameters(pipe)
    modules = (pipe.mllm, pipe.adapter, pipe.transformer, pipe.text_encoder, pipe.vae)
    assert sum(numbers.values()) == sum(
        tensor.numel()
        for module in modules
        for name, tensor in module.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # umT5's second name for its `shared.weight`
    )
    assert 2 * sum(numbers.values()) < 0.95 * MAX_BYTES  # tokenizers, configurations and code need room too
    with Console(width=100).capture() as _:
        table = size_table(pipe)
    assert table.row_count == len(numbers) + 1


@pytest.mark.parametrize(("task", "frames"), [("t2v", 17), ("t2i", 1), ("v2v", 17), ("i2i", 1), ("i2v", 17)])
def test_every_task_runs_with_the_presets_sizes(pipe, task, frames):
    source = {}
    if task not in ("t2v", "t2i"):
        item = ShapesDataset("v2v" if task == "v2v" else "i2i", "train", 1)[0]["source"]
        source = {"video": item, "fps": 8} if task == "v2v" else {"image": item[0]}
    output = pipe("make it red", task=task, num_inference_steps=1, output_type="np", **source)
    assert output.frames.shape == (1, frames, 64, 64, 3)
    assert output.notes == []


def test_the_longest_prompt_of_the_data_set_fits_beside_a_source(pipe):
    dataset = ShapesDataset("t2v", "train", 500)
    prompts = sorted((dataset.example(index).prompt for index in range(500)), key=len)
    clip = ShapesDataset("v2v", "train", 1)[0]["source"]
    output = pipe(prompts[-1], video=clip, fps=8, task="v2v", num_inference_steps=1, output_type="latent")
    assert output.frames.shape == (1, 16, 5, 8, 8)


def test_questions_on_clips_fit_the_language_model(pipe):
    dataset = ShapesDataset("understand", "train", 1, kind="video")
    inputs = pipe.processor.apply_task_template(
        "understand", dataset[0]["prompt"], videos=[dataset[0]["source"]], return_tensors="pt"
    )
    room = pipe.mllm.config.get_text_config().max_position_embeddings
    assert 4 * pipe.processor.num_image_tokens < inputs["input_ids"].shape[1] < room // 2
    answer = pipe(dataset[0]["prompt"], video=dataset[0]["source"], task="understand", max_new_tokens=3)
    assert len(answer.text) == 1
