"""Thinking before generating: the MLLM writes what is to be seen, and the pipeline generates from that."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from inspect import signature
from typing import Any

import torch
from transformers import LogitsProcessorList

from ...media.sources import Source
from ...tasks import find_task, get_task
from ...utils.modules import Host
from ...utils.turns import OwnRandomNumbers, in_turn
from ..request_checks import FiniteLogits, check_numbers
from .thought import OmniVideoThought, as_thoughts, filled, plain_thoughts

# A function that gets messages in the chat format of transformers and returns the text of the answer.
Thinker = Callable[[list[dict[str, Any]]], str]

# Texts of the user; a preset may have its own as `think`, with these keys. What follows `mark` is the prompt.
THINK_TEMPLATES = {
    "caption": "Describe this {kind} in one sentence.",
    "generate": (
        "Someone asks for this {kind}: {prompt}\nWrite in one sentence what the request means. Then write "
        "'Prompt:' and one plain sentence that says what is to be seen."
    ),
    "edit": (
        "This is a {kind}: {caption}\nSomeone asks for this change: {prompt}\nWrite in one sentence what the request "
        "means. Then write 'Prompt:' and one plain instruction for the change."
    ),
    "mark": "Prompt:",
}


def thinks_first(call: Callable) -> Callable:
    """Decorate the pipeline's call: with `think` or `thought` it generates from the prompt of a thought."""

    @wraps(call)
    def run(self: "OmniVideoThinkingMixin", *args: Any, **kwargs: Any) -> Any:
        given = signature(call).bind(self, *args, **kwargs).arguments
        think, thought = given.pop("think", False), given.pop("thought", None)
        if not think and thought is None:
            return call(self, *args, **kwargs)
        del given["self"]
        prompt, task, return_dict = given.get("prompt"), given.get("task"), given.pop("return_dict", True)
        if not prompt or (task is not None and get_task(task).answers_in_text):
            raise ValueError(
                f"`think` and `thought` need a `prompt` and a task that generates, got `prompt` {prompt!r} and `task` "
                f"{task!r}."
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if thought is None:
            limits = {name: given[name] for name in ("max_new_tokens",) if name in given}
            thoughts: Any = self.think(prompts, given.get("video"), given.get("image"), task, **limits)
        else:
            thoughts = as_thoughts(thought, len(prompts))
        plain: Any = [entry.prompt for entry in thoughts]
        output = call(self, **(given | {"prompt": plain[0] if isinstance(prompt, str) else plain}))
        output.settings |= {"prompt": prompt, "thought": plain_thoughts(thoughts, isinstance(prompt, str))}
        output.thought = [entry.text for entry in thoughts]
        return output if return_dict else (output.frames, output.text)

    return run


class OmniVideoThinkingMixin(Host):
    """Methods of [`OmniVideoPipeline`] in which the MLLM thinks about a request before anything is generated."""

    def think(
        self,
        prompt: str | list[str],
        video: Any = None,
        image: Any = None,
        task: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
        thinker: Thinker | None = None,
    ) -> OmniVideoThought | list[OmniVideoThought]:
        """
        Let the MLLM say plainly what a request asks for.

        With a source it first describes the source. The text of its answer behind `Prompt:` is the prompt to generate
        from, and what it wrote before it the reasoning; an answer without this mark is the prompt.

        Args:
            prompt: request or edit instruction, or a list.
            video, image: source of an edit, as in the pipeline's call.
            task: task of the request. Default: an edit with a source, else a video.
            system_prompt: text to put before the request.
            max_new_tokens: maximum length of each answer, in tokens.
            temperature: 0 for the most probable answer; above, tokens are sampled.
            seed: seed of the sampling. Default: a new one, which the thought's `settings` name.
            thinker: a function that answers instead of the MLLM: it gets messages in the chat format of transformers,
                with the source as an `image` or `video` entry, and returns a text.

        Returns:
            One thought, or a list for a list of prompts.

        Raises:
            ValueError: for numbers out of range, an unknown task, or an empty answer.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> def answer(messages):
            ...     return "Grass is green. Prompt: a large green circle"
            >>> pipe.think("a large circle in the colour of grass", thinker=answer).prompt
            'a large green circle'
        """
        check_numbers(max_new_tokens=max_new_tokens, temperature=temperature)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        source = Source.of(video, image, len(prompts))
        task = task or find_task(source.kind, "video" if source.kind is None else source.kind)
        if get_task(task).answers_in_text:
            raise ValueError(f"`task` must be one that generates, got {task!r}: an answer needs no thought.")
        thoughts = self._think(prompts, source.load(), task, system_prompt, max_new_tokens, temperature, seed, thinker)
        return thoughts[0] if isinstance(prompt, str) else thoughts

    def _think(
        self,
        prompts: list[str],
        source: Source,
        task: str,
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
        thinker: Thinker | None = None,
    ) -> list[OmniVideoThought]:
        """[`think`] for a loaded source."""
        seed = int(torch.randint(2**32, ())) if temperature > 0 and seed is None else seed
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        texts: Mapping[str, str] = THINK_TEMPLATES | dict(self._preset(task).get("think") or {})
        kind = source.kind or get_task(task).output
        thoughts = []
        for number, prompt in enumerate(prompts):
            shown, caption = _only(source, number), None
            if source.kind is not None:
                caption = self._write(filled(texts["caption"], kind=kind), shown, thinker, **sampling)
            request = texts["generate" if caption is None else "edit"]
            asked = filled(request, kind=kind, prompt=prompt, caption=caption or "")
            answer = self._write(f"{system_prompt}\n{asked}" if system_prompt else asked, shown, thinker, **sampling)
            before, mark, after = answer.rpartition(texts["mark"])
            if not (after if mark else answer).strip():
                raise ValueError(
                    f"The MLLM wrote no prompt for {prompt!r}, but {answer!r}: pass `think=False`, or a `thought` of "
                    "your own."
                )
            thoughts.append(
                OmniVideoThought(after.strip() if mark else answer, before.strip(), caption, dict(sampling))
            )
        return thoughts

    @in_turn("processor", "mllm")
    def _write(
        self,
        text: str,
        source: Source,
        thinker: Thinker | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """The answer of the thinker, by default of the MLLM, without special tokens."""
        if thinker is not None:
            return check_answer(thinker(messages_of(text, source)))
        inputs = self.processor.apply_task_template(
            "understand", [text], images=source.images, videos=source.videos, return_tensors="pt"
        ).to(self._execution_device)
        sampling: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or None}
        if temperature == 0:  # settings of sampling in the MLLM's own configuration would only cause a warning
            sampling |= {"top_p": None, "top_k": None}
        with nullcontext() if seed is None else OwnRandomNumbers(seed):
            ids = self.mllm.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList([FiniteLogits()]),
                **sampling,
            )[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(ids, skip_special_tokens=True).strip()


def messages_of(text: str, source: Source) -> list[dict[str, Any]]:
    """A turn of the user in the chat format of transformers, with the source as PIL image or array of frames."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in source.images or ()]
    parts += [{"type": "video", "video": clip.frames} for clip in source.videos or ()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def check_answer(answer: Any) -> str:
    """Refuse an answer of a thinker that is no text."""
    if not isinstance(answer, str):
        raise TypeError(f"`thinker` must return a text, got {type(answer).__name__}.")
    return answer.strip()


def _only(source: Source, number: int) -> Source:
    """The source of one prompt."""
    if source.videos is not None:
        return Source(videos=[source.videos[number]])
    return Source() if source.images is None else Source(images=[source.images[number]])


__all__ = ["OmniVideoThinkingMixin", "Thinker", "check_answer", "messages_of", "thinks_first"]
