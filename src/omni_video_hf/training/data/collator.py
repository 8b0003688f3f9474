"""Samples as arguments of the model's `forward`: token ids and labels of conversations, and the data collator."""

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

# Inputs of a sample besides `task`: arguments of `OmniVideoForConditionalGeneration.forward` without the batch axis.
STACKED = ("latents", "source_latents", "reference_latents", "target_features")
# [length, width]; a batch also has their masks, with these names.
MASKS = {
    "mllm_hidden_states": "mllm_attention_mask",
    "prompt_embeds": "prompt_embeds_mask",
    "target_prompt_embeds": "target_prompt_embeds_mask",
}
PADDED = tuple(MASKS)
TOKENS = ("input_ids", "attention_mask", "labels")  # [length]
PICTURES = "pixel_values"  # [images, 3, size, size]; a batch has the images of all samples in order
TENSORS = (*STACKED, *PADDED, *TOKENS, PICTURES)
IGNORED_LABEL = -100


def bucket_of(task: Any, shapes: Mapping[str, Sequence[int]]) -> Bucket:
    """
    The bucket of a sample.

    Args:
        task: task of the sample.
        shapes: shapes of its tensors, by name.
    """
    return Bucket(
        task,
        tuple((name, tuple(shapes[name]) if name in STACKED else ()) for name in TENSORS if name in shapes),
    )


@dataclass
class OmniVideoDataCollator:
    """
    Collates samples of one task and bucket into a batch for the Trainer.

    `mllm_hidden_states` and text embeddings of different lengths are padded with zeros at the end, and the batch gets
    their masks. Token ids are padded with `pad_token_id`, labels with -100. Images are concatenated in order, all
    other inputs are stacked. `output_kind` is the kind of the task's output; `task` is one string.

    Args:
        pad_token_id: id for padding `input_ids`; masked, so that no token attends to it. It must not be the id of the
            image token.

    Raises:
        ValueError: for samples of different tasks, inputs or shapes, or with unknown inputs.
    """

    pad_token_id: int = 0

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:  # noqa: D102 - see the class
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
                f"Samples of the task {task!r} contain {', '.join(unknown)}, which the model does not use: a sample "
                f"has `task` and some of {', '.join(TENSORS)}. Write your own collator for other inputs."
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
            f"`{name}` must have the same shape in all samples of a batch, those of the task {task!r} have "
            f"{sorted(shapes)}: use OmniVideoBatchSampler."
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
    Token ids of an instruction or question with its answer, and labels for the answer only.

    Args:
        processor: processor that renders the prompt of the task.
        task: name of the task. `understand` needs `answer`; all other tasks have a forced answer.
        prompt: instruction or question.
        answer: text to learn, including its end token.
        image: image for the MLLM: path, PIL image or array.
        video: video for the MLLM, in any form that [`load_video`] reads.
        mllm_frames: see [`OmniVideoProcessor.apply_task_template`].

    Returns:
        `input_ids`, `attention_mask`, `labels` `[length]` and, with an image or video, `pixel_values`
        `[images, 3, size, size]`.

    Raises:
        ValueError: if the answer is missing, empty, contains control tokens, or does not belong to the task.
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
    # Tokenise the answer alone: after the question, `generate` must produce exactly these ids.
    spoken = processor.tokenizer(answer if forced is None else forced, add_special_tokens=False).input_ids
    spoken = torch.tensor([*spoken, processor.tokenizer.eos_token_id])
    if forced is None:
        ids = torch.cat([ids, spoken])
    elif not torch.equal(ids[-len(spoken) :], spoken):
        raise ValueError(
            f"The rendered prompt of the task {task!r} does not end with {forced!r} and the end token: check the chat "
            "template."
        )
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[-len(spoken) :] = spoken
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return sample | ({PICTURES: inputs[PICTURES]} if PICTURES in inputs else {})


def check_answer(processor: OmniVideoProcessor, answer: Any) -> None:
    """Refuse an answer that is empty, starts or ends with blanks, or contains control tokens."""
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"`answer` must be a non-empty string, got {answer!r}.")
    if answer != answer.strip():
        raise ValueError(f"`answer` starts or ends with blanks, which would be learned: strip it, got {answer!r}.")
    for token in processor.tokenizer.added_tokens_decoder.values():
        if token.special and token.content in answer:
            raise ValueError(f"`answer` contains {token.content!r}, which is a control token: remove it.")


# --- mixtures -------------------------------------------------------------------------------------------------------


class BucketedDataset(Protocol):
    """Protocol of a dataset whose attribute `buckets` has the bucket of every sample."""

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

    The batch sampler determines the share of each task.

    Args:
        datasets: datasets with the attribute `buckets`.
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
