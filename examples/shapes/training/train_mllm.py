"""
Trains the VILA of Omni-Video Shapes to understand, which the paper takes as given.

`python -m examples.shapes.training.train_mllm --output FOLDER`, resumable.

Its vision tower learns to see, as SigLIP comes
pretrained to a VILA (see vision.py); then all of it learns to answer questions on images and clips. Asked to draw or
to edit, it says in the data set's plain words what there would be to see: that is as far as a model without a decoder
goes, and its states then hold what the paper's stages, which leave its body as it is, need.
"""

from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.data import Dataset
from transformers import default_data_collator, set_seed

from omni_video_hf.media.video_loading import load_sampled_video
from omni_video_hf.models.modeling_vila import VilaForConditionalGeneration
from omni_video_hf.processing.processing_omni_video import OmniVideoProcessor
from omni_video_hf.shapes.dataset import Example, ShapesDataset, as_media
from omni_video_hf.shapes.prompts import describe
from omni_video_hf.shapes.scene import render
from omni_video_hf.shapes.scores import SHOWN_SPLITS, Score, check_answer, score_table
from omni_video_hf.tasks import TASKS
from omni_video_hf.training.data.collator import IGNORED_LABEL, OmniVideoDataCollator, encode_conversation

from .. import configuration
from ..recolor import any_colors
from .runs import check_settings, fit, save_folder, the_batch, write_json
from .vision import SPEAKING_COLORS, SeeingObjective, SeenImages

# Share of the batches by what they are about. All of a batch show the MLLM as many pictures.
SHARES = {
    ("understand", "video"): 0.35,
    ("understand", "image"): 0.2,
    ("t2v", "video"): 0.1,
    ("t2i", "image"): 0.1,
    ("v2v", "video"): 0.1,
    ("i2i", "image"): 0.15,
}
# Which colours may be any where the answer names neither, and the share of these questions. Of the data set's own
# colours three come with two shapes only, and would answer for the shape: they are never asked for shapes in.
FREE = {
    "shape": {"color": True, "background": True, "tells_shape": False},
    "size": {"color": True, "background": True},
    "motion": {"color": True, "background": True},
    "background": {"color": True, "background": False},
    "color": {"color": False, "background": True},
}
RECOLORED = 0.7
# Share of the steps, the first ones, with questions on one attribute alone. In whole sentences the colour, which is
# learned first, would soon stand for the shapes it comes with, and held-out shapes be called by their names.
QUESTIONS_FIRST = 0.3
QUESTIONS_AT_ONCE = 25
VISION_LEARNING_RATE = 2e-3
LONGEST_ANSWER = 32


class ConversationBatches(Dataset):
    """
    Whole batches of conversations, newly drawn.

    Args:
        processor: makes ids and pictures.
        steps: number of batches.
        batch_size: conversations of a batch.
        seed: batch `index` is a function of it and `index` alone.
    """

    def __init__(self, processor: OmniVideoProcessor, steps: int, batch_size: int, seed: int) -> None:
        self.processor, self.steps, self.batch_size, self.seed = processor, steps, batch_size, seed
        self.collate = OmniVideoDataCollator(processor.tokenizer.pad_token_id)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        on_attributes = index < QUESTIONS_FIRST * self.steps
        shares = {name: share for name, share in SHARES.items() if name[0] == "understand" or not on_attributes}
        names, total = list(shares), sum(shares.values())
        task, kind = names[rng.choice(len(names), p=[share / total for share in shares.values()])]
        room = 4 * self.batch_size  # far more than are passed over
        dataset = ShapesDataset(task, "train", self.steps * room, self.seed, kind)
        drawn = (dataset.example(number) for number in range(index * room, (index + 1) * room))
        wanted = (example for example in drawn if not (on_attributes and example.attribute == "describe"))
        examples = list(islice(wanted, self.batch_size))
        # With the words that upstream puts around a prompt, or as a user who names no task writes.
        as_task = bool(rng.random() < 0.5)
        batch = self.collate(
            [{"task": "understand"} | conversation(self.processor, example, as_task, rng) for example in examples]
        )
        return {name: value for name, value in batch.items() if name != "task"}


def conversation(
    processor: OmniVideoProcessor, example: Example, as_task: bool, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """
    An example as the MLLM learns it.

    Args:
        as_task: as the task's prompt is written; otherwise as the bare question that leaves the task open.
        rng: draws whether what a question is about comes in other colours.
    """
    frames = None
    if example.source is not None:
        speaks = example.attribute == "shape" and example.source.color in SPEAKING_COLORS
        recolored = example.answer and example.attribute in FREE and (speaks or rng.random() < RECOLORED)
        colors = any_colors(rng, example.source, **FREE[example.attribute]) if recolored else {}
        frames = render(example.source, example.num_frames, **colors)
    if example.answer is not None:
        shown = {example.kind: as_media(example.kind, frames)}
        return encode_conversation(processor, "understand", example.prompt, example.answer, **shown)
    prompt = example.prompt
    if as_task:
        prompt = TASKS[example.task].user.format(prompt=prompt)
        if example.task == "v2v":  # of a clip to edit other frames are shown than of one to ask about
            frames = load_sampled_video(frames, "upstream_edit", processor.num_frames)
    shown = {} if frames is None else {example.kind: as_media(example.kind, frames)}
    answer = f"{example.kind}: {describe(example.target, example.kind)}"
    return encode_conversation(processor, "understand", prompt, answer, **shown)


class AnswerObjective(nn.Module):
    """Cross-entropy of the answers, and of the token that ends them."""

    def __init__(self, mllm: VilaForConditionalGeneration) -> None:
        super().__init__()
        self.mllm = mllm

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where no answer is learned, no logits are computed; it is most of every prompt."""
        labels = inputs.pop("labels")
        learned = labels != IGNORED_LABEL
        states = self.mllm.model(**inputs, use_cache=False).last_hidden_state
        before = learned.roll(-1, dims=1)  # the state that predicts a token is the one before it
        logits = self.mllm.lm_head(states[before])
        return {"loss": nn.functional.cross_entropy(logits.float(), labels[learned])}


@torch.no_grad()
def evaluate(mllm: VilaForConditionalGeneration, processor: OmniVideoProcessor, count: int, seed: int) -> list[Score]:
    """Exact answers to `count` questions of each split, half of them on clips."""
    scores = []
    for split in SHOWN_SPLITS:
        verdicts = []
        for kind in ("video", "image"):
            dataset = ShapesDataset("understand", split, (count + 1) // 2, seed, kind)
            starts = range(0, len(dataset), QUESTIONS_AT_ONCE)
            for start in track(starts, f"Asking about {kind}s, {split}", console=Console(stderr=True)):
                numbers = range(start, min(start + QUESTIONS_AT_ONCE, len(dataset)))
                items = [dataset[number] for number in numbers]
                sources = [as_media(kind, item["source"]) for item in items]
                prompts = [item["prompt"] for item in items]
                inputs = processor.apply_task_template(
                    "understand", prompts, **{f"{kind}s": sources}, return_tensors="pt"
                ).to(mllm.device)
                ids = mllm.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
                answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                verdicts += [check_answer(dataset.example(n), a) for n, a in zip(numbers, answers, strict=True)]
        scores.append(Score.of("understand", split, verdicts))
    return scores


def train(
    output: Annotated[Path, typer.Option(help="Folder of checkpoints; the result comes to its sub-folder mllm.")],
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision tower alone, before.")] = 2000,
    vision_batch_size: Annotated[int, typer.Option(min=1)] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps on questions and requests.")] = 3500,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    learning_rate: float = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    eval_questions: Annotated[int, typer.Option(min=1, help="Questions of each split asked at the end.")] = 200,
) -> None:
    """Train the MLLM, from the last checkpoint where there is one, and ask it questions."""
    settings = {"vision_steps": vision_steps, "vision_batch_size": vision_batch_size, "steps": steps}
    settings |= {"vision_learning_rate": VISION_LEARNING_RATE}
    settings |= {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed, "save_steps": save_steps}
    check_settings(settings, output)
    set_seed(seed)
    processor = configuration.processor()
    mllm = configuration.model(adapter_config=None, decoder_config=None).mllm
    fit(
        SeeingObjective(mllm.model.vision_tower),
        SeenImages(vision_steps * vision_batch_size, seed),
        default_data_collator,
        output / "vision",
        vision_steps,
        VISION_LEARNING_RATE,
        save_steps,
        seed,
        per_device_train_batch_size=vision_batch_size,
        bf16=True,
    )
    fit(
        AnswerObjective(mllm),
        ConversationBatches(processor, steps, batch_size, seed),
        the_batch,
        output / "answers",
        steps,
        learning_rate,
        save_steps,
        seed,
        per_device_train_batch_size=1,  # an item is a batch
        bf16=True,
    )
    scores = evaluate(mllm.eval(), processor, eval_questions, seed)
    Console().print(score_table(scores, "Exact answers, %"))
    save_folder(mllm.save_pretrained, output / "mllm")
    write_json({"settings": settings, "scores": [score.to_dict() for score in scores]}, output / "mllm.json")


if __name__ == "__main__":
    typer.run(train)
