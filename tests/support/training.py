"""Tiny data for training, and runs of a trainer on them."""

from pathlib import Path

import tiny
import torch
from torch.utils.data import Dataset

from omni_video_hf.training import OmniVideoTrainer, OmniVideoTrainingArguments

FEATURE_KEYS = ("mllm_hidden_states", "prompt_embeds", "latents", "source_latents", "target_features")
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}


def sample(task: str, number: int = 0) -> dict:
    """One sample of precomputed features, or of a question with its answer."""
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if task == "understand":
        ids = torch.cat([torch.full((4,), 160), torch.randint(0, 90, (9,), generator=generator)])
        labels = torch.where(torch.arange(13) < 8, -100, ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {"task": task} | inputs | {"pixel_values": draw(3, 42, 42)}
    latents = draw(16, 2 if task.endswith("v") else 1, 8, 4)
    features = {"mllm_hidden_states": draw(7, 48), "prompt_embeds": draw(5, 32), "latents": latents}
    features |= {"target_features": draw(24)}
    if task in ("i2i", "v2v", "i2v"):
        features["source_latents"] = draw(16, 2 if task == "v2v" else 1, 8, 4)
    return {"task": task} | features


def instructed(task: str, number: int = 0) -> dict:
    """A sample of a generation task with token ids of its instruction and of the forced answer."""
    features = sample(task, number)
    features.pop("mllm_hidden_states")
    return sample("understand", number) | features


class Samples(Dataset):
    """Samples by index."""

    def __init__(self, samples: list[dict]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]


class BatchesInOrder:
    """A batch sampler whose order is a function of seed and epoch, or as given without seed."""

    def __init__(self, batches: list[list[int]], seed: int | None = None) -> None:
        self.batches, self.seed, self.epoch = batches, seed, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        if self.seed is None:
            return iter(self.batches)
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter([self.batches[i] for i in torch.randperm(len(self.batches), generator=generator)])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def collate(samples: list[dict]) -> dict:
    """Stack samples of one task and size."""
    tasks = {sample["task"] for sample in samples}
    assert len(tasks) == 1, tasks
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if key != "task"}
    return batch | {"task": tasks.pop()}


def arguments(folder: Path, **settings: object) -> OmniVideoTrainingArguments:
    """Settings of a short run on the CPU."""
    defaults = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "warmup_steps": 0}
    return OmniVideoTrainingArguments(output_dir=str(folder), **(QUIET | defaults | settings))


def trainer(
    folder: Path, samples: list[dict], model=None, sampler=None, kind=OmniVideoTrainer, **settings: object
) -> OmniVideoTrainer:
    """A trainer over `samples`, by default in the `decoder` stage."""
    extra = {name: settings.pop(name) for name in ("preview_pipeline", "eval_dataset") if name in settings}
    return kind(
        model or tiny.model(enable_mllm=False),
        arguments(folder, **settings),
        train_dataset=Samples(samples),
        train_batch_sampler=sampler,
        data_collator=collate,
        **extra,
    )
