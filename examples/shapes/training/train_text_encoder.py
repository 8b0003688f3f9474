"""
Trains the text encoder of Omni-Video Shapes to understand what a text asks for, as umT5 comes pretrained to Wan.

`python -m examples.shapes.training.train_text_encoder --output FOLDER`, resumable. Trained together with a decoder, it
learned colours, which alone explain most of the pixels, and made the words for motions all but equal (0.6 % of its
variance) before the decoder had a use for them; no clip ever moved as asked for. Now every attribute is as loud.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import Dataset
from transformers import UMT5EncoderModel, set_seed

from omni_video_hf.shapes.dataset import Example, ShapesDataset
from omni_video_hf.shapes.scene import ATTRIBUTES
from omni_video_hf.shapes.scores import SHOWN_SPLITS

from .. import configuration
from ..tokenizers import text_tokenizer
from .runs import check_settings, fit, save_folder, the_batch, write_json

TASKS = ("t2v", "t2i", "v2v", "i2i")
SECOND_NAME = "text_encoder.encoder.embed_tokens.weight"
NOT_SAID = 0  # label of an attribute that a text leaves open; values count from 1


class PromptBatches(Dataset):
    """
    Whole batches of prompts and edits, newly drawn, with what each says.

    Args:
        split: as in [`ShapesDataset`].
        steps: number of batches.
        batch_size: texts of a batch.
        seed: batch `index` is a function of it and `index` alone.
    """

    def __init__(self, split: str, steps: int, batch_size: int, seed: int) -> None:
        self.steps, self.batch_size, self.tokenizer = steps, batch_size, text_tokenizer()
        self.datasets = [ShapesDataset(task, split, steps * batch_size, seed) for task in TASKS]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        numbers = range(index * self.batch_size, (index + 1) * self.batch_size)
        examples = [self.datasets[number % len(TASKS)].example(number) for number in numbers]
        tokens = self.tokenizer([example.prompt for example in examples], padding=True, return_tensors="pt")
        return {**tokens, "said": torch.tensor([said_by(example) for example in examples])}


def said_by(example: Example) -> list[int]:
    """For each of `ATTRIBUTES` the number of the value that the text asks for, from 1, or [`NOT_SAID`]."""
    said = []
    for name, values in ATTRIBUTES.items():
        is_edited = example.attribute == name
        is_drawn = example.source is None and (name != "motion" or example.kind == "video")
        said.append(values.index(getattr(example.target, name)) + 1 if is_edited or is_drawn else NOT_SAID)
    return said


class MeaningObjective(nn.Module):
    """
    Cross-entropy of every attribute, read off a text's mean embedding along fixed, orthogonal directions.

    The embeddings are normalised: a direction has the share of their length that the loss asks of each attribute
    alike, which readers that are learned would not need.
    """

    def __init__(self, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.sizes = [1 + len(values) for values in ATTRIBUTES.values()]
        directions = torch.empty(sum(self.sizes), text_encoder.config.d_model)
        nn.init.orthogonal_(directions, generator=torch.Generator().manual_seed(0))
        self.register_buffer("directions", directions, persistent=False)
        self.register_state_dict_post_hook(drop_second_name)
        self._keys_to_ignore_on_save = [SECOND_NAME]

    def tie_weights(self) -> None:
        """Called when a checkpoint is loaded: the two names are one tensor already."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, said: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss of texts `[batch, length]` that say `[batch, attributes]`."""
        logits = self.read(input_ids, attention_mask).values()
        losses = [nn.functional.cross_entropy(*pair) for pair in zip(logits, said.unbind(1), strict=True)]
        return {"loss": torch.stack(losses).mean()}

    def directions_of(self) -> dict[str, torch.Tensor]:
        """The directions of each attribute, `[1 + values, width]`, orthonormal over all."""
        return dict(zip(ATTRIBUTES, self.directions.split(self.sizes), strict=True))

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `[batch, 1 + values]` of each attribute."""
        states = self.text_encoder(input_ids, attention_mask).last_hidden_state
        weights = attention_mask / attention_mask.sum(dim=1, keepdim=True)
        return self.read_mean((states * weights[..., None]).sum(dim=1))

    def read_mean(self, mean: torch.Tensor) -> dict[str, torch.Tensor]:
        """Likewise, of mean embeddings `[batch, width]`."""
        logits = (mean.float() @ self.directions.T.float()).split(self.sizes, dim=1)
        return dict(zip(ATTRIBUTES, logits, strict=True))


def drop_second_name(module: nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:  # noqa: ARG001
    """UmT5 has one embedding under two names, of which a file of safetensors takes one."""
    state.pop(SECOND_NAME, None)


@torch.no_grad()
def evaluate(objective: MeaningObjective, split: str, count: int, seed: int) -> dict[str, float]:
    """Share of `count` texts that are read right, by attribute, and of those of which everything is."""
    batch = PromptBatches(split, 1, count, seed)[0]
    logits = objective.read(batch["input_ids"], batch["attention_mask"])
    right = torch.stack([values.argmax(dim=1) for values in logits.values()], dim=1) == batch["said"]
    rates = dict(zip(ATTRIBUTES, right.float().mean(dim=0).tolist(), strict=True))
    return rates | {"all": right.all(dim=1).float().mean().item()}


def train(
    output: Annotated[Path, typer.Option(help="For checkpoints; the result comes to its sub-folder text_encoder.")],
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    learning_rate: float = 3e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    eval_texts: Annotated[int, typer.Option(min=1, help="Texts of each split read at the end.")] = 1000,
) -> None:
    """Train the text encoder, from the last checkpoint where there is one."""
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    check_settings(settings | {"save_steps": save_steps}, output)
    set_seed(seed)
    objective = MeaningObjective(configuration.text_encoder())
    fit(
        objective,
        PromptBatches("train", steps, batch_size, seed),
        the_batch,
        output / "meaning",
        steps,
        learning_rate,
        save_steps,
        seed,
        per_device_train_batch_size=1,  # an item is a batch
        bf16=True,
    )
    objective.eval().to("cpu")
    rates = {split: evaluate(objective, split, eval_texts, seed) for split in SHOWN_SPLITS}
    table = Table("split", *rates["seen"], title="Texts understood, %")
    for split, values in rates.items():
        table.add_row(split, *(f"{100 * value:.1f}" for value in values.values()))
    Console().print(table)
    save_folder(objective.text_encoder.save_pretrained, output / "text_encoder")
    write_json({"settings": settings, "rates": rates}, output / "text_encoder.json")


if __name__ == "__main__":
    typer.run(train)
