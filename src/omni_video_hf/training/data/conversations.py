"""`ConversationDataset`: questions with answers, decoded and tokenised from raw data when a sample is read."""

from typing import Any

from accelerate.utils import tqdm
from torch.utils.data import Dataset

from ...media.video_reader import MediaError
from ...processing.processing_omni_video import OmniVideoProcessor
from ...tasks import TASKS, get_task
from .bad_data import Offender, stop_or_count
from .batch_sampler import Bucket
from .collator import encode_conversation
from .media_table import MediaTable, Row, check_row, probe


class ConversationDataset(Dataset):
    """
    The questions of a table, for training together with a feature cache (see [`MixedDataset`]).

    Questions need no precomputed features. Their images and videos are decoded in the workers of the DataLoader. Rows
    of other tasks are ignored; compute their features with `precompute`.

    Args:
        table: table of the data.
        processor: processor for token ids, images and labels.
        on_bad_data: `"stop"` or `"skip"`, see [`stop_or_count`].
        progress: show a progress bar while the rows are checked.

    `buckets` has the bucket of every sample, for [`OmniVideoBatchSampler`].

    Raises:
        BadDataError: for rows that cannot be used.
        ValueError: if there are no questions.
    """

    def __init__(
        self, table: MediaTable, processor: OmniVideoProcessor, on_bad_data: str = "stop", progress: bool = True
    ) -> None:
        self.table, self.processor = table, processor
        self.numbers: list[int] = []
        self.buckets: list[Bucket] = []
        offenders: list[Offender] = []
        asked = 0
        for number in tqdm(range(len(table)), desc="Checking questions", disable=not progress):
            row = table[number]
            if not get_task(row.task).answers_in_text:
                continue
            asked += 1
            problems = list(check_row(row, processor))
            offenders += problems
            if not problems:
                self.numbers.append(number)
                self.buckets.append(_bucket(row))
        if not asked:
            answering = " or ".join(repr(name) for name, task in TASKS.items() if task.answers_in_text)
            raise ValueError(f"The table of questions has no row of the task {answering}: add some, or leave it out.")
        stop_or_count(offenders, asked, on_bad_data)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[self.numbers[index]]
        if row.media is None:
            return {"task": row.task} | encode_conversation(self.processor, row.task, row.text, row.answer)
        kind = probe(row.media).kind
        try:
            with row.media.open() as path:  # only the frames of a video that the MLLM gets are decoded
                shown: dict[str, Any] = {kind: path}
                sample = encode_conversation(self.processor, row.task, row.text, row.answer, **shown)
        except MediaError as error:
            raise MediaError(f"{row.id}: {error}") from error
        return {"task": row.task} | sample


def _bucket(row: Row) -> Bucket:
    """Bucket of a question: with or without images, which run different components; lengths are padded."""
    names = ("input_ids", "attention_mask", "labels") + (("pixel_values",) if row.media is not None else ())
    return Bucket(row.task, tuple((name, ()) for name in names))


__all__ = ["ConversationDataset"]
