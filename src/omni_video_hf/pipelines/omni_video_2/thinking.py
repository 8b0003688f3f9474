"""The editing prompt reasoner of Omni-Video 2: the MLLM describes the source, then the video that is asked for."""

from contextlib import nullcontext
from typing import Any

import torch
from transformers import LogitsProcessorList

from ...processing.processing_omni_video_2 import END, MllmFrames
from ...utils.modules import Host
from ...utils.turns import OwnRandomNumbers, in_turn
from ..request_checks import FiniteLogits, check_numbers
from ..shared.thinking import Thinker, check_answer
from ..shared.thought import OmniVideoThought, filled
from .edit_source import EditVideo, load_edit_videos
from .prompts import ANSWER_SYSTEM_PROMPT, CAPTION_PIXELS, CAPTION_REQUEST, EDIT_REQUEST, EXPAND_REQUEST


class OmniVideo2ThinkingMixin(Host):
    """Methods of [`OmniVideo2Pipeline`] in which the MLLM writes text."""

    def think(
        self,
        prompt: str | list[str],
        video: Any = None,
        task: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
        thinker: Thinker | None = None,
    ) -> OmniVideoThought | list[OmniVideoThought]:
        """
        Let the MLLM describe the video that a request asks for.

        For an edit it first describes the source, and then, from this description and the instruction, the edited
        video, without naming the change. Without a source it expands the prompt.

        Args:
            prompt: prompt or edit instruction, or a list.
            video: source of an edit, as in the pipeline's call.
            task: `t2v` or `v2v`. Default: `v2v` with a video.
            system_prompt: system prompt of the last step. Default: `target_caption` of the pipeline's `prompts`.
            max_new_tokens: maximum length of each text, in tokens.
            temperature: 0 for the most probable text; above, tokens are sampled.
            seed: seed of the sampling. Default: a new one, which the thought's `settings` name.
            thinker: a function that answers instead of the MLLM: it gets messages in the chat format of transformers,
                with the frames as a `video` entry, and returns a text.

        Returns:
            One thought, or a list for a list of prompts.

        Raises:
            ValueError: for a number out of range, or inputs that do not go together.
        """
        check_numbers(max_new_tokens=max_new_tokens, temperature=temperature)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        task = self._check_task(task, video)
        videos = None
        if video is not None:
            videos = load_edit_videos(video, len(prompts), self.processor.frame_numbers, 1, None, 1)
        thoughts = self._think(prompts, videos, system_prompt, max_new_tokens, temperature, seed, thinker)
        return thoughts[0] if isinstance(prompt, str) else thoughts

    def answer(self, prompts: list[str], video: Any = None, max_new_tokens: int = 512) -> list[str]:
        """
        Let the MLLM answer questions about a video, or without one.

        Args:
            prompts: the questions.
            video: one video, or one per question, as in the pipeline's call.
            max_new_tokens: maximum length of an answer, in tokens.

        Returns:
            The answers, without special tokens.
        """
        frames: list[Any] = [None] * len(prompts)
        if video is not None:
            numbers = self.processor.frame_numbers
            frames = [source.mllm for source in load_edit_videos(video, len(prompts), numbers, 1, None, 1)]
        pairs = zip(prompts, frames, strict=True)
        return [self._write(ANSWER_SYSTEM_PROMPT, prompt, shown, max_new_tokens) for prompt, shown in pairs]

    def _think(
        self,
        prompts: list[str],
        videos: list[EditVideo] | None,
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
        thinker: Thinker | None = None,
    ) -> list[OmniVideoThought]:
        """[`think`] for loaded videos."""
        if temperature > 0 and seed is None:
            seed = int(torch.randint(2**32, ()))
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        sampling = settings | {"thinker": thinker}
        captions: dict[int, str] = {}
        thoughts = []
        for number, prompt in enumerate(prompts):
            caption = None
            if videos is not None:
                source = videos[number]
                if id(source) not in captions:  # one video for all prompts is described once
                    captions[id(source)] = self._write(
                        self.config.prompts["source_caption"], CAPTION_REQUEST, source.mllm, **sampling
                    )
                caption = captions[id(source)]
            request = EXPAND_REQUEST if caption is None else EDIT_REQUEST
            text = self._write(
                system_prompt or self.config.prompts["target_caption"],
                filled(request, prompt=prompt, caption=caption or ""),
                **sampling,
            )
            if not text:
                raise ValueError(
                    f"The MLLM wrote nothing about the prompt {prompt!r}: pass `think=False`, or a `thought` of your "
                    "own."
                )
            thoughts.append(OmniVideoThought(text, source_caption=caption, settings=dict(settings)))
        return thoughts

    @in_turn("processor", "mllm")
    def _write(
        self,
        system: str,
        user: str,
        video: MllmFrames | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
        thinker: Thinker | None = None,
    ) -> str:
        """The answer of the thinker, by default of the MLLM, without special tokens."""
        if thinker is not None:
            parts = [] if video is None else [{"type": "video", "video": video.frames}]
            turn = {"role": "user", "content": [*parts, {"type": "text", "text": user}]}
            return check_answer(thinker([{"role": "system", "content": system}, turn]))
        inputs, _ = self.processor.chat_inputs(system, user, video, CAPTION_PIXELS)
        inputs = {name: tensor.to(self._execution_device) for name, tensor in inputs.items()}
        if "pixel_values_videos" in inputs:
            inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(self.mllm.dtype)
        sampling: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or None}
        if self.mllm.generation_config.eos_token_id is None:  # diffusers does not download this file of a component
            ends = [self.processor.special_ids[END], self.processor.tokenizer.eos_token_id]
            sampling |= {"eos_token_id": list(dict.fromkeys(ends)), "pad_token_id": ends[0]}
        if temperature == 0:  # settings of sampling in the MLLM's own configuration would only cause a warning
            sampling |= {"top_p": None, "top_k": None}
        with nullcontext() if seed is None else OwnRandomNumbers(seed):
            ids = self.mllm.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList([FiniteLogits()]),
                **sampling,
            )[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


__all__ = ["OmniVideo2ThinkingMixin"]
