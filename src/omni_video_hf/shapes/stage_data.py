"""What the paper's stages train the small checkpoint on: samples of all tasks, drawn anew as `forward` takes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..modeling_vila import VilaForConditionalGeneration
from ..processing_omni_video import TASKS, OmniVideoProcessor
from ..training.data import IGNORED_LABEL, OmniVideoDataCollator, encode_conversation
from ..training.sampling import Bucket
from .dataset import Example, ShapesDataset
from .latents import RecoloredScenes, ScenePairs
from .noise import uneven_timesteps
from .prompts import edit_prompt, generation_prompt
from .scene import Scene, render

KINDS = {task: TASKS[task].output for task in ("t2i", "t2v", "i2i", "v2v")}
# What the batches of `understand` are about: questions, and requests in which no task is named.
UNDERSTAND = ("image question", "video question", *KINDS)
# Half of the batches of clips have uneven noise (see noise.py).
NOISES = {"image": ("even",), "video": ("even", "uneven")}
RECOLORED = "recolored"
ONLY_FIRST = 0.6  # share of the clips with uneven noise of which the first frame alone has little
PAIRS_AT_ONCE = 16


class StageSamples(Dataset):
    """
    Samples of every task.

    Args:
        pairs: scenes and their latents, by kind.
        processor: makes ids and pictures.
        length: samples of each task, and of each kind of `understand`. Sample `index` is a function of `seed` and
            `index` alone.
        seed: not that of any other training, or the same would be asked.
        target_features: of [`siglip_features`], by kind; none where nothing is aligned.
        recolored: scenes in any colours to draw besides, by kind, and
        null_states: `[length, mllm width]`, what the MLLM says of them: nothing. It knows no words for their colours.
        edits_as_targets: the text encoder is shown what there will be to see, as far as the MLLM can know, in place of
            the edit. Where nothing is drawn, this is what visual tokens align with.

    `buckets` is what [`OmniVideoBatchSampler`] wants.
    """

    def __init__(
        self,
        pairs: dict[str, ScenePairs],
        processor: OmniVideoProcessor,
        length: int,
        seed: int,
        target_features: dict[str, torch.Tensor] | None = None,
        recolored: dict[str, RecoloredScenes] | None = None,
        null_states: torch.Tensor | None = None,
        edits_as_targets: bool = False,
    ) -> None:
        self.pairs, self.processor, self.length, self.seed = pairs, processor, length, seed
        self.target_features, self.edits_as_targets = target_features, edits_as_targets
        self.recolored, self.null_states = recolored, null_states
        drawn = [(task, noise) for task, kind in KINDS.items() for noise in NOISES[kind]]
        if recolored is not None:
            drawn += [(task, RECOLORED) for task in KINDS if TASKS[task].source is None]
        self.streams = drawn + [("understand", about) for about in UNDERSTAND]
        self.buckets = [Bucket(task, ((about, ()),)) for task, about in self.streams for _ in range(length)]

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        stream, number = divmod(range(len(self))[index], self.length)
        task, about = self.streams[stream]
        rng = np.random.default_rng((self.seed, stream, number))
        if about == RECOLORED:
            return self._recolored(rng, task)
        if task != "understand":
            return self._drawing(rng, task, is_uneven=about == "uneven")
        if about in KINDS:
            return self._request(rng, about)
        kind = about.split()[0]
        item = ShapesDataset("understand", "train", self.length, self.seed, kind)[number]
        shown = {kind: item["source"][0] if kind == "image" else item["source"]}
        return {"task": task} | encode_conversation(self.processor, task, item["prompt"], item["answer"], **shown)

    def _drawing(self, rng: np.random.Generator, task: str, is_uneven: bool) -> dict[str, Any]:
        row, prompt, source, side = self._chosen(rng, task)
        pairs = self.pairs[KINDS[task]]
        sample = {"task": task, "prompt": prompt, "latents": pairs.latents[row, side].float()}
        if source is not None:
            sample["source_latents"] = pairs.latents[row, 0].float()
            if self.edits_as_targets:
                sample["prompt"] = self._target_text(rng, pairs.examples[row])
        if is_uneven:
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            sample["timesteps"] = uneven_timesteps(sample["latents"].shape[1], ONLY_FIRST, generator)
        if self.target_features is not None:
            sample["target_features"] = self.target_features[pairs.kind][row, side]
        return sample | encode_conversation(self.processor, task, prompt, **_shown(pairs.kind, source))

    def _recolored(self, rng: np.random.Generator, task: str) -> dict[str, Any]:
        scenes = self.recolored[KINDS[task]]
        row = int(rng.integers(len(scenes.scenes)))
        prompt = generation_prompt(rng, scenes.scenes[row], scenes.kind, names_color=False)
        latents = scenes.latents[row].float()
        return {"task": task, "prompt": prompt, "latents": latents, "mllm_hidden_states": self.null_states}

    def _target_text(self, rng: np.random.Generator, example: Example) -> str:
        """Of a clip to edit the MLLM sees the first frame, and no motion."""
        return generation_prompt(rng, example.target, "video" if example.attribute == "motion" else "image")

    def _request(self, rng: np.random.Generator, task: str) -> dict[str, Any]:
        """As a user writes who names no task; the answer is the token that asks for an image or a video."""
        _, prompt, source, _ = self._chosen(rng, task)
        shown = {f"{kind}s": [media] for kind, media in _shown(KINDS[task], source).items()}
        inputs = self.processor.apply_task_template("understand", prompt, return_tensors="pt", **shown)
        tokenizer = self.processor.tokenizer
        answer = torch.tensor([tokenizer.convert_tokens_to_ids(TASKS[task].answer), tokenizer.eos_token_id])
        ids = torch.cat([inputs["input_ids"][0], answer])
        labels = torch.full_like(ids, IGNORED_LABEL)
        labels[-len(answer) :] = answer
        sample = {"task": "understand", "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return sample | {name: inputs[name] for name in ("pixel_values",) if name in inputs}

    def _chosen(self, rng: np.random.Generator, task: str) -> tuple[int, str, Scene | None, int]:
        """Number of a pair, a prompt, the source where there is one, and which of the two is to be drawn."""
        pairs = self.pairs[KINDS[task]]
        row = int(rng.integers(len(pairs.examples)))
        example = pairs.examples[row]
        if TASKS[task].source is not None:
            value = getattr(example.target, example.attribute)
            return row, edit_prompt(rng, example.source, example.attribute, value), example.source, 1
        side = int(rng.integers(2))
        return row, generation_prompt(rng, (example.source, example.target)[side], pairs.kind), None, side


def _shown(kind: str, source: Scene | None) -> dict[str, np.ndarray]:
    if source is None:
        return {}
    return {"image": render(source, 1)[0]} if kind == "image" else {"video": render(source)}


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

    @torch.no_grad()
    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples of one task and kind."""
        own = ("prompt", "timesteps")
        batch = self.collate([{name: v for name, v in sample.items() if name not in own} for sample in samples])
        if "timesteps" in samples[0]:
            batch["timesteps"] = torch.stack([sample["timesteps"] for sample in samples])
        if "prompt" in samples[0]:
            tokens = self.tokenizer([sample["prompt"] for sample in samples], padding=True, return_tensors="pt")
            batch["prompt_embeds"] = self.text_encoder(**tokens).last_hidden_state
            batch["prompt_embeds_mask"] = tokens["attention_mask"]
        return batch


@torch.no_grad()
def siglip_features(
    mllm: VilaForConditionalGeneration, processor: OmniVideoProcessor, pairs: ScenePairs
) -> torch.Tensor:
    """
    Features of the scenes that visual tokens align with: the mean over patches and shown frames of the vision tower.

    Returns:
        `[pairs, 2, vision width]`
    """
    features = []
    starts = range(0, len(pairs.examples), PAIRS_AT_ONCE)
    for start in track(starts, f"SigLIP features of {pairs.kind}s", console=Console(stderr=True), transient=True):
        examples = pairs.examples[start : start + PAIRS_AT_ONCE]
        clips = [
            render(scene, example.num_frames) for example in examples for scene in (example.source, example.target)
        ]
        frames = [processor.sample_frames(clip, processor.num_frames) for clip in clips]
        pixels = processor.preprocess_images([frame for clip in frames for frame in clip])
        states = mllm.get_image_features(pixels.to(mllm.device), return_dict=True).last_hidden_state
        features.append(states.mean(dim=1).unflatten(0, (len(examples), 2, -1)).mean(dim=2).cpu())
    return torch.cat(features)


__all__ = ["StageCollator", "StageSamples", "siglip_features"]
