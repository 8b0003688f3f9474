"""What the paper's stages train the small checkpoint on: samples of all tasks, drawn anew as `forward` takes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from omni_video_hf.models.modeling_vila import VilaForConditionalGeneration
from omni_video_hf.processing.processing_omni_video import OmniVideoProcessor
from omni_video_hf.shapes.dataset import ShapesDataset, as_media
from omni_video_hf.shapes.prompts import edit_prompt, generation_prompt
from omni_video_hf.shapes.scene import BACKGROUNDS, SIDE, render
from omni_video_hf.tasks import TASKS
from omni_video_hf.training.data.batch_sampler import Bucket
from omni_video_hf.training.data.collator import IGNORED_LABEL, OmniVideoDataCollator, encode_conversation

from ..outlines import any_outline
from ..recolor import any_colors
from .latents import EDITS, Pairs, ScenePairs
from .noise import uneven_timesteps
from .train_text_encoder import MeaningObjective

KINDS = {task: TASKS[task].output for task in ("t2i", "t2v", "i2i", "v2v")}
# What the batches of `understand` are about: questions, and requests in which no task is named.
UNDERSTAND = ("image question", "video question", *KINDS)
# The streams of batches that draw; what comes twice is twice as often. See noise.py for uneven noise, and recolor.py.
DRAWN = {"image": ("even", "even", "recolored"), "video": ("even", "even", "uneven", "recolored")}
# Streams of edits that draw nothing: what their sources do not show as the pair's scenes have it.
DISGUISED = {"other color": "color", "other outline": "shape"}
COLOR_EDITS = (
    0.5  # share of these that are surely of the colour, the last attribute that edits of held-out pairs learn
)
ONLY_FIRST = 0.6  # share of the clips with uneven noise of which the first frame alone has little
TEXTS = ("prompt", "target_prompt")
PAIRS_AT_ONCE = 16


class StageSamples(Dataset):
    """
    Samples of every task.

    Args:
        pairs: scenes and their latents, of [`read_pairs`].
        processor: makes ids and pictures.
        length: samples of each task, and of each kind of `understand`. Sample `index` is a function of `seed` and
            `index` alone.
        seed: not that of any other training, or the same would be asked.
        target_features: of [`siglip_features`], for all pairs; none where nothing is aligned with them.
        phrases: whether all tasks are also asked for one attribute alone, edits before a picture of nothing, and draw
            nothing. All else that visual tokens learn of a colour comes with a shape, and some shapes never do.
        disguises: whether edits are also shown a source in another colour, or with another outline, than the text on
            the target speaks of, and draw nothing: all scenes of a colour have one of the same two or three shapes.
            Texts on the targets of recolored sources then name a colour as well.

    All but questions and requests brings `prompt`. Edits that draw or are disguised also bring `target_prompt`, a text
    on what there will be to see, which visual tokens align with, and `unsaid`: the attribute in which that text is not
    to be believed, or `None`. `buckets` is what [`OmniVideoBatchSampler`] wants.

    Raises:
        ValueError: when `disguises` find no edit of the colour among `pairs`.
    """

    def __init__(
        self,
        pairs: Pairs,
        processor: OmniVideoProcessor,
        length: int,
        seed: int,
        target_features: dict[tuple[str, bool], torch.Tensor] | None = None,
        phrases: bool = False,
        disguises: bool = False,
    ) -> None:
        self.pairs, self.processor, self.length, self.seed = pairs, processor, length, seed
        self.target_features, self.disguises = target_features, disguises
        self.color_edits = {
            kind: [row for row, example in enumerate(pairs[kind, False].examples) if example.attribute == "color"]
            for kind in EDITS
        }
        if disguises and not all(self.color_edits.values()):
            raise ValueError("`pairs` have no edits of the colour to disguise: compute more latents.")
        drawn = [(task, about) for task, kind in KINDS.items() for about in DRAWN[kind]]
        if phrases:
            drawn += [(task, "phrase") for task in KINDS]
        if disguises:
            drawn += [(task, about) for task in EDITS.values() for about in DISGUISED]
        self.streams = drawn + [("understand", about) for about in UNDERSTAND]
        kinds_of_batch = [Bucket(task, ((about, ()),)) for task, about in self.streams]
        self.buckets = [bucket for bucket in kinds_of_batch for _ in range(length)]  # millions: the same few objects

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        stream, number = divmod(range(len(self))[index], self.length)
        task, about = self.streams[stream]
        rng = np.random.default_rng((self.seed, stream, number))
        if about == "phrase":
            return self._phrase(rng, task)
        if about in DISGUISED:
            return self._disguised(rng, task, DISGUISED[about])
        if task != "understand":
            return self._drawing(rng, task, about)
        if about in KINDS:
            return self._request(rng, about)
        kind = about.split()[0]
        item = ShapesDataset("understand", "train", self.length, self.seed, kind)[number]
        shown = {kind: as_media(kind, item["source"])}
        return {"task": task} | encode_conversation(self.processor, task, item["prompt"], item["answer"], **shown)

    def _drawing(self, rng: np.random.Generator, task: str, about: str) -> dict[str, Any]:
        key = KINDS[task], about == "recolored"
        pairs = self.pairs[key]
        row, prompt, side = self._chosen(rng, task, pairs)
        sample = {"task": task, "prompt": prompt, "latents": pairs.latents[row, side].float()}
        if TASKS[task].source is not None:
            target = pairs.examples[row].target
            names_color = self.disguises or not pairs.recolored
            sample["target_prompt"] = generation_prompt(rng, target, pairs.kind, names_color)
            sample["unsaid"] = "color" if self.disguises and pairs.recolored else None
            sample["source_latents"] = pairs.latents[row, 0].float()
        if about == "uneven":
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            sample["timesteps"] = uneven_timesteps(sample["latents"].shape[1], ONLY_FIRST, generator)
        if self.target_features is not None:
            sample["target_features"] = self.target_features[key][row, side]
        return sample | encode_conversation(self.processor, task, prompt, **_shown(task, pairs, row))

    def _phrase(self, rng: np.random.Generator, task: str) -> dict[str, Any]:
        """What an edit says of one attribute, and a picture or clip of its background alone where the task has one."""
        pairs = self.pairs[KINDS[task], False]
        row, prompt, _ = self._chosen(rng, EDITS[pairs.kind], pairs)
        shown, example = {}, pairs.examples[row]
        if TASKS[task].source is not None:
            empty = np.full((example.num_frames, SIDE, SIDE, 3), BACKGROUNDS[example.source.background], np.uint8)
            shown = {pairs.kind: as_media(pairs.kind, empty)}
        return {"task": task, "prompt": prompt} | encode_conversation(self.processor, task, prompt, **shown)

    def _disguised(self, rng: np.random.Generator, task: str, hidden: str) -> dict[str, Any]:
        """An edit whose source does not show `hidden`; what it asks for is said all the same."""
        pairs = self.pairs[KINDS[task], False]
        rows = self.color_edits[pairs.kind] if rng.random() < COLOR_EDITS else None
        row, prompt, _ = self._chosen(rng, task, pairs, rows)
        example = pairs.examples[row]
        if hidden == "color":
            looks = {"color": any_colors(rng, example.source, background=False, tells_shape=False)["color"]}
        else:
            looks = {"outline": any_outline(rng, example.source)}
        shown = as_media(pairs.kind, render(example.source, example.num_frames, **looks))
        return {
            "task": task,
            "prompt": prompt,
            "target_prompt": generation_prompt(rng, example.target, pairs.kind),
            "unsaid": None if example.attribute == hidden else hidden,
        } | encode_conversation(self.processor, task, prompt, **{pairs.kind: shown})

    def _request(self, rng: np.random.Generator, task: str) -> dict[str, Any]:
        """As a user writes who names no task; the answer is the token that asks for an image or a video."""
        pairs = self.pairs[KINDS[task], False]
        row, prompt, _ = self._chosen(rng, task, pairs)
        shown = {f"{kind}s": [media] for kind, media in _shown(task, pairs, row).items()}
        inputs = self.processor.apply_task_template("understand", prompt, return_tensors="pt", **shown)
        tokenizer = self.processor.tokenizer
        answer = torch.tensor([tokenizer.convert_tokens_to_ids(TASKS[task].answer), tokenizer.eos_token_id])
        ids = torch.cat([inputs["input_ids"][0], answer])
        labels = torch.full_like(ids, IGNORED_LABEL)
        labels[-len(answer) :] = answer
        sample = {"task": "understand", "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return sample | {name: inputs[name] for name in ("pixel_values",) if name in inputs}

    def _chosen(
        self, rng: np.random.Generator, task: str, pairs: ScenePairs, rows: Sequence[int] | None = None
    ) -> tuple[int, str, int]:
        """Number of a pair, out of `rows` or of all, a prompt, and which of the two is to be drawn."""
        rows = range(len(pairs.examples)) if rows is None else rows
        row = int(rows[rng.integers(len(rows))])
        example = pairs.examples[row]
        if TASKS[task].source is not None:
            value = getattr(example.target, example.attribute)
            return row, edit_prompt(rng, example.source, example.attribute, value), 1
        side = int(rng.integers(2))
        scene = (example.source, example.target)[side]
        return row, generation_prompt(rng, scene, pairs.kind, names_color=not pairs.recolored), side


def _shown(task: str, pairs: ScenePairs, row: int) -> dict[str, np.ndarray]:
    """What the MLLM sees of a pair: before the edit where the task has a source."""
    return {} if TASKS[task].source is None else {pairs.kind: as_media(pairs.kind, pairs.render(row, 0))}


class StageCollator:
    """
    Batches of samples, their prompts as the frozen text encoder says them.

    Args:
        processor: of the MLLM.
        tokenizer: of the text encoder.
        text_encoder: as it was trained with the decoder.
    """

    def __init__(
        self, processor: OmniVideoProcessor, tokenizer: PreTrainedTokenizerBase, text_encoder: UMT5EncoderModel
    ) -> None:
        self.collate = OmniVideoDataCollator(processor.tokenizer.pad_token_id)
        self.tokenizer, self.text_encoder = tokenizer, text_encoder.eval()
        self.directions = MeaningObjective(text_encoder).directions_of()

    @torch.no_grad()
    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples of one task and kind."""
        own = (*TEXTS, "timesteps", "unsaid")
        batch = self.collate([{name: v for name, v in sample.items() if name not in own} for sample in samples])
        if "timesteps" in samples[0]:
            batch["timesteps"] = torch.stack([sample["timesteps"] for sample in samples])
        for name in (name for name in TEXTS if name in samples[0]):
            tokens = self.tokenizer([sample[name] for sample in samples], padding=True, return_tensors="pt")
            batch[f"{name}_embeds"] = self.text_encoder(**tokens).last_hidden_state
            batch[f"{name}_embeds_mask"] = tokens["attention_mask"]
        unsaid = [sample.get("unsaid") for sample in samples]
        if any(unsaid):
            nothing = self.directions["color"][:0]
            rows = [nothing if name is None else self.directions[name] for name in unsaid]
            batch["target_prompt_unsaid"] = pad_sequence(rows, batch_first=True)
        return batch


@torch.no_grad()
def siglip_features(
    mllm: VilaForConditionalGeneration, processor: OmniVideoProcessor, pairs: ScenePairs
) -> torch.Tensor:
    """
    Features of the scenes that visual tokens align with: the mean over patches and shown frames of the vision tower.

    Every process must call: each computes its share, and all get all.

    Returns:
        `[pairs, 2, vision width]`
    """
    features, state = [], PartialState()
    starts = own_share(range(0, len(pairs.examples), PAIRS_AT_ONCE), state.process_index, state.num_processes)
    for start in track(starts, f"SigLIP features of {pairs.kind}s", console=Console(stderr=True), transient=True):
        rows = range(start, min(start + PAIRS_AT_ONCE, len(pairs.examples)))
        clips = [pairs.render(row, side) for row in rows for side in (0, 1)]
        frames = [processor.sample_frames(clip, processor.num_frames) for clip in clips]
        pixels = processor.preprocess_images([frame for clip in frames for frame in clip])
        states = mllm.get_image_features(pixels.to(mllm.device), return_dict=True).last_hidden_state
        features.append(states.mean(dim=1).unflatten(0, (len(rows), 2, -1)).mean(dim=2).cpu())
    return torch.cat(gather_object(features))


def own_share(numbers: range, rank: int, processes: int) -> range:
    """What of `numbers` a process works on; the shares in the order of ranks are the whole."""
    # accelerate's `split_between_processes` gives the last number to every process that has none.
    first, end = (len(numbers) * edge // processes for edge in (rank, rank + 1))
    return numbers[first:end]


__all__ = ["StageCollator", "StageSamples", "own_share", "siglip_features"]
