"""Samples of every task as the model's `forward` takes them, and batches of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Dataset

from ...processing.processing_omni_video import OmniVideoProcessor
from ...tasks import get_task
from .batch_sampler import Bucket

# What a sample may hold besides `task`: arguments of `OmniVideoForConditionalGeneration.forward` without the batch.
STACKED = ("latents", "source_latents", "reference_latents", "target_features")
# [length, width]; the batch has their masks beside them, under these names.
MASKS = {
    "mllm_hidden_states": "mllm_attention_mask",
    "prompt_embeds": "prompt_embeds_mask",
    "target_prompt_embeds": "target_prompt_embeds_mask",
}
PADDED = tuple(MASKS)
TOKENS = ("input_ids", "attention_mask", "labels")  # [length]
PICTURES = "pixel_values"  # [images, 3, size, size]; the batch holds the images of all samples in order
TENSORS = (*STACKED, *PADDED, *TOKENS, PICTURES)
IGNORED_LABEL = -100


def bucket_of(task: Any, shapes: Mapping[str, Sequence[int]]) -> Bucket:
    """
    The bucket of a sample.

    Args:
        task: its task.
        shapes: shape of every tensor in it.
    """
    return Bucket(
        task,
        tuple((name, tuple(shapes[name]) if name in STACKED else ()) for name in TENSORS if name in shapes),
    )


@dataclass
class OmniVideoDataCollator:
    """
    Makes a batch for the Trainer of samples that share a task and a bucket.

    `mllm_hidden_states` and texts' embeddings of unequal length are padded with zeros at the end and get their masks,
    ids are padded with `pad_token_id`, labels with -100; images are joined in order; everything else is stacked.
    `output_kind` says what the task draws, `task` stays one string.

    Args:
        pad_token_id: for `input_ids` of unequal length; nothing attends to it. It must not be the image token's.

    Raises:
        ValueError: for samples of different tasks, inputs or shapes, or with inputs that are not of a sample.
    """

    pad_token_id: int = 0

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:  # noqa: D102 - its class says it
        tasks = {sample["task"] for sample in samples}
        if len(tasks) != 1:
            raise ValueError(f"A batch must be of one task, got {sorted(tasks)}: use OmniVideoBatchSampler.")
        task = tasks.pop()
        names = set(samples[0]) - {"task"}
        if any(set(sample) - {"task"} != names for sample in samples):
            raise ValueError(f"The samples of a batch must have the same inputs; those of the task {task!r} differ.")
        unknown = sorted(names - set(TENSORS))
        if unknown:
            raise ValueError(
                f"Samples of the task {task!r} hold {', '.join(unknown)}, which would not reach the model: a sample "
                f"has `task` and some of {', '.join(TENSORS)}. Other inputs need a collator of your own."
            )
        batch: dict[str, Any] = {"task": task}
        for name in (name for name in TENSORS if name in names):
            tensors = [sample[name] for sample in samples]
            if name in PADDED:
                batch |= _pad(name, tensors)
            elif name in TOKENS:
                fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}[name]
                batch[name] = pad_sequence(tensors, batch_first=True, padding_value=fill)
            else:
                batch[name] = _join(name, task, tensors)
        if get_task(task).output != "text":
            batch["output_kind"] = get_task(task).output
        return batch


def _pad(name: str, rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([row.shape[0] for row in rows])
    padded = pad_sequence(list(rows), batch_first=True)
    return {name: padded, MASKS[name]: (torch.arange(padded.shape[1]) < lengths[:, None]).long()}


def _join(name: str, task: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if name == PICTURES:
        return torch.cat(list(tensors))
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"`{name}` of a batch must have one shape, those of the task {task!r} have {sorted(shapes)}: use "
            "OmniVideoBatchSampler."
        )
    return torch.stack(list(tensors))


# --- conversations --------------------------------------------------------------------------------------------------


def encode_conversation(
    processor: OmniVideoProcessor,
    task: str,
    prompt: str,
    answer: str | None = None,
    image: Any = None,
    video: Any = None,
    mllm_frames: Literal["first", "all"] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Ids of an instruction or question and its answer, and labels by which only the answer is learned.

    Args:
        processor: makes the prompt of the task.
        task: `understand` needs `answer`; the others have the forced answer that asks for their output.
        prompt: instruction or question.
        answer: what to learn to say. Its end token is learned too.
        image: shown to the MLLM; path, PIL image or array.
        video: likewise.
        mllm_frames: see [`OmniVideoProcessor.apply_task_template`].

    Returns:
        `input_ids`, `attention_mask`, `labels` `[length]` and, where something is shown, `pixel_values`
        `[images, 3, size, size]`.

    Raises:
        ValueError: when the answer is missing, empty, holds control tokens, or does not belong to the task.
    """
    forced = get_task(task).answer
    if forced is None:
        check_answer(processor, answer)
    elif answer is not None:
        raise ValueError(f"`answer` of the task {task!r} is always {forced!r}: leave it out, got {answer!r}.")
    inputs = processor.apply_task_template(
        task,
        prompt,
        images=None if image is None else [image],
        videos=None if video is None else [video],
        mllm_frames=mllm_frames,
        return_tensors="pt",
    )
    ids = inputs["input_ids"][0]
    # The answer's own ids, not a difference of lengths: after the question they are what `generate` has to produce.
    spoken = processor.tokenizer(answer if forced is None else forced, add_special_tokens=False).input_ids
    spoken = torch.tensor([*spoken, processor.tokenizer.eos_token_id])
    if forced is None:
        ids = torch.cat([ids, spoken])
    elif not torch.equal(ids[-len(spoken) :], spoken):
        raise ValueError(f"The prompt of the task {task!r} does not end with {forced!r} and the end token.")
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[-len(spoken) :] = spoken
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return sample | ({PICTURES: inputs[PICTURES]} if PICTURES in inputs else {})


def check_answer(processor: OmniVideoProcessor, answer: Any) -> None:
    """Refuse an answer that is empty, starts or ends in blanks, or holds control tokens."""
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"`answer` must be a non-empty string, got {answer!r}.")
    if answer != answer.strip():
        raise ValueError(f"`answer` starts or ends with blanks, which would be learned: strip it, got {answer!r}.")
    for token in processor.tokenizer.added_tokens_decoder.values():
        if token.special and token.content in answer:
            raise ValueError(f"`answer` contains {token.content!r}, which is a control token: remove it.")


# --- mixtures -------------------------------------------------------------------------------------------------------


class BucketedDataset(Protocol):
    """A dataset that knows the bucket of every sample without opening it."""

    buckets: list[Bucket]

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample."""
        ...


class MixedDataset(ConcatDataset):
    """
    Several datasets as one, such as a feature cache and questions with answers.

    How often each task comes is the batch sampler's business.

    Args:
        datasets: each with `buckets`.
    """

    def __init__(self, datasets: Sequence[BucketedDataset]) -> None:
        super().__init__(cast("Sequence[Dataset]", datasets))  # torch refuses an empty list
        self.buckets = list(chain.from_iterable(dataset.buckets for dataset in datasets))


__all__ = [
    "PADDED",
    "STACKED",
    "TENSORS",
    "TOKENS",
    "BucketedDataset",
    "MixedDataset",
    "OmniVideoDataCollator",
    "bucket_of",
    "check_answer",
    "encode_conversation",
]
