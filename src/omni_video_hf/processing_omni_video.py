"""Processor of Omni-Video: prompts of every task, token ids as upstream makes them, images and frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from .chat_template_omni_video import bounded_rendering, check_chat_template
from .media_omni_video import load_image, load_sampled_video

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
IMAGE_TOKEN = "<image>"
IMAGE_GENERATION_TOKEN = "[GEN_IMG]"
VIDEO_GENERATION_TOKEN = "[GEN_VID]"

# Upstream's `llama_3` conversation. A closing assistant message ends with eos, every other message with `<|eot_id|>`.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM_PROMPT + "<|eot_id|>' }}"
    "{%- else -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '" + IMAGE_TOKEN + "\n' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if loop.last and message['role'] == 'assistant' -%}{{ eos_token }}"
    "{%- else -%}{{ '<|eot_id|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Task:
    """What one task asks of the MLLM: its user message, its forced answer, its source and its output."""

    user: str  # `{prompt}` is the user's prompt
    answer: str | None  # None: the MLLM answers by itself
    source: Literal["image", "video"] | None
    output: Literal["image", "video", "text"]


TASKS: dict[str, Task] = {
    "t2i": Task("Generate an image about:\n{prompt}", IMAGE_GENERATION_TOKEN, None, "image"),
    "t2v": Task("Generate a video about:\n{prompt}", VIDEO_GENERATION_TOKEN, None, "video"),
    "i2i": Task("{prompt}", IMAGE_GENERATION_TOKEN, "image", "image"),
    "v2v": Task("<video>\n{prompt}", VIDEO_GENERATION_TOKEN, "video", "video"),  # `<video>` is plain text
    "i2v": Task(
        "Generate a video from the reference image with the following prompt:\n{prompt}",
        VIDEO_GENERATION_TOKEN,
        "image",
        "video",
    ),
    "understand": Task("{prompt}", None, None, "text"),  # with or without images or a video
}


def get_task(task: str) -> Task:
    """The task of that name; a `ValueError` lists the names there are."""
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    return TASKS[task]


class OmniVideoProcessor(ProcessorMixin):
    r"""
    Image processor, tokenizer and chat template.

    Args:
        image_processor (`SiglipImageProcessorPil`): Resizes (bicubic, squashed to a square) and normalises images.
        tokenizer (`PreTrainedTokenizerFast`): The language model's tokenizer, `<image>` among its special tokens.
        chat_template (`str`, *optional*): Defaults to upstream's `llama_3` conversation.
        num_image_tokens (`int`, defaults to 196): Tokens an image takes (`VilaConfig.image_seq_length`).
        image_aspect_ratio (`str`, defaults to `"resize"`): `"resize"` squashes images to a square, `"pad"` centres
            them on a grey one first.
        model_max_length (`int`, *optional*): Longest prompt with images; upstream cuts longer ones, and only with
            images.
        num_frames (`int`, defaults to 8): Frames of a video the MLLM is shown.
        mllm_frames (`str`, defaults to `"first"`): Of a video to edit, the MLLM is shown the first frame only, as
            upstream's is, or `"all"`: `num_frames` of them. What it was trained with.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 196,
        image_aspect_ratio: str = "resize",
        model_max_length: int | None = None,
        num_frames: int = 8,
        mllm_frames: Literal["first", "all"] = "first",
    ) -> None:
        _check_mllm_frames(mllm_frames)
        if image_aspect_ratio not in ("resize", "pad"):
            raise ValueError(f"`image_aspect_ratio` must be 'resize' or 'pad', got {image_aspect_ratio!r}.")
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer has no {IMAGE_TOKEN!r} token: add it as a special token.")
        self.num_image_tokens = num_image_tokens
        self.image_aspect_ratio = image_aspect_ratio
        self.model_max_length = model_max_length
        self.num_frames = num_frames
        self.mllm_frames = mllm_frames
        check_chat_template(chat_template or CHAT_TEMPLATE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    # --- standard calls ---------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        padding: bool | str = True,
        padding_side: str = "left",
        truncation: bool = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Tokenise rendered prompts and preprocess their images.

        Args:
            images: one image, or a list (of lists) in the order of the placeholders: path, URL, PIL image, array or
                tensor.
            text: one prompt or a list, with one `<image>` per image. Prompts are tokenised as upstream does, the
                tokenizer's special tokens included: `add_special_tokens` has no effect.
            videos: refused here; a conversation or a task's prompt says where frames go, see
                [`apply_chat_template`] and [`apply_task_template`].
            padding: as in every tokenizer; to the longest prompt by default.
            padding_side: `"left"`, which `generate` needs, or `"right"`.
            truncation: cut prompts with images to `model_max_length` as upstream does, question and answer first.
            return_tensors: `"pt"` or `None`.

        Returns:
            `input_ids` and `attention_mask` `[batch, length]`, and `pixel_values` `[images, 3, size, size]` if any.

        Raises:
            ValueError: when images and placeholders differ in number, or a prompt with images is too long.
        """
        kwargs.pop("add_special_tokens", None)
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise TypeError(f"OmniVideoProcessor got unexpected arguments: {', '.join(unknown)}.")
        if videos is not None:
            raise ValueError(
                "`videos` need a place in the prompt: use `apply_chat_template` with a {'type': 'video', ...} part, "
                "or `apply_task_template`."
            )
        data: dict[str, Any] = {}
        flat_images = _flatten(images)
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            placeholders = sum(prompt.count(self.image_token) for prompt in prompts)
            if placeholders != len(flat_images):
                raise ValueError(
                    f"`text` has {placeholders} {self.image_token} placeholders, but `images` has {len(flat_images)}: "
                    "they must be equal."
                )
            ids = [self._checked_length(self.tokenize_prompt(prompt), prompt, truncation) for prompt in prompts]
            data |= self.tokenizer.pad(
                {"input_ids": ids}, padding=padding, padding_side=padding_side, return_attention_mask=True
            )
        elif images is None:
            raise ValueError("Pass `text`, `images` or both.")
        if flat_images:
            data["pixel_values"] = self.preprocess_images(flat_images)
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(
        self, conversation: list[dict[str, Any]] | list[list[dict[str, Any]]], *args: Any, **kwargs: Any
    ) -> Any:
        """
        Render and tokenise conversations, as in every transformers processor.

        Image parts hold a path, URL, PIL image, array or tensor under `image`, `url` or `path`; video parts a path,
        URL, list of frames, array, tensor or `VideoClip` under `video`, `url` or `path`. A video becomes
        `num_frames` images, chosen by `frame_sampling`; both can be given in `processor_kwargs` and default to
        upstream's (8 frames, `"upstream_understand"`).
        """
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        num_frames = processor_kwargs.pop("num_frames", self.num_frames)
        sampling = processor_kwargs.pop("frame_sampling", "upstream_understand")
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        loaded = [
            [self._with_loaded_media(message, num_frames, sampling) for message in messages]
            for messages in conversations
        ]
        loaded = loaded if batched else loaded[0]
        with bounded_rendering():
            return super().apply_chat_template(loaded, *args, processor_kwargs=processor_kwargs, **kwargs)

    def _with_loaded_media(self, message: dict[str, Any], num_frames: int, sampling: str) -> dict[str, Any]:
        """The message with images loaded and every video replaced by its frames."""
        if not isinstance(message.get("content"), (list, tuple)):
            return message
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            source = next((part[key] for key in ("image", "video", "url", "path") if part.get(key) is not None), None)
            if part["type"] == "image" and source is not None:
                content.append({"type": "image", "image": load_image(source)})
            elif part["type"] == "video":
                if source is None:
                    raise ValueError("A video part needs its video under 'video', 'url' or 'path'.")
                frames = self.sample_frames(source, num_frames, sampling)
                content += [{"type": "image", "image": frame} for frame in frames]
            else:
                content.append(part)
        return {**message, "content": content}

    # --- tasks ------------------------------------------------------------------------------------------------------

    def apply_task_template(
        self,
        task: str,
        prompt: str | Sequence[str],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        mllm_frames: Literal["first", "all"] | None = None,
        frame_sampling: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Inputs of the MLLM for a task, teacher-forced over prompt and answer (`understand` has no answer).

        Args:
            task: `t2i`, `t2v`, `i2i`, `v2v`, `i2v` or `understand`.
            prompt: one prompt or a list.
            images: one image per prompt (`i2i`, `i2v`, `understand`).
            videos: one video per prompt (`v2v`, `understand`).
            mllm_frames: for `v2v`, `"first"` shows the MLLM the first frame only, as upstream does; `"all"` shows
                `num_frames` frames. By default the processor's own.
            frame_sampling: named strategy; upstream's own for the task by default.
            kwargs: as in `__call__`.

        Raises:
            ValueError: for an unknown task, an empty prompt, a prompt that holds control tokens, or media that the
                task does not take.
        """
        mllm_frames = self.mllm_frames if mllm_frames is None else mllm_frames
        _check_mllm_frames(mllm_frames)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._check_media(task, len(prompts), images, videos)
        pictures: list[list[Image.Image]] = [[] for _ in prompts]
        if images is not None:
            pictures = [[load_image(image)] for image in images]
        elif videos is not None:
            sampling = frame_sampling or ("upstream_understand" if task == "understand" else "upstream_edit")
            only_first = task == "v2v" and mllm_frames == "first"
            pictures = [self.sample_frames(video, self.num_frames, sampling, only_first) for video in videos]
        texts = [self.build_prompt(task, text, len(frames)) for text, frames in zip(prompts, pictures, strict=True)]
        return self(text=texts, images=pictures if any(pictures) else None, **kwargs)

    def build_prompt(self, task: str, prompt: str, num_images: int | None = None) -> str:
        """
        The whole conversation of a task as one string, exactly as upstream builds it.

        Args:
            task: name of the task.
            prompt: the user's text.
            num_images: images or frames shown; by default one where the task has a source.
        """
        spec = get_task(task)
        self._check_prompt(prompt)
        if num_images is None:
            num_images = int(spec.source is not None)
        user = f"{self.image_token}\n" * num_images + spec.user.format(prompt=prompt)
        messages = [{"role": "user", "content": user}]
        if spec.answer is not None:
            messages.append({"role": "assistant", "content": spec.answer})
        with bounded_rendering():
            return super().apply_chat_template(messages, add_generation_prompt=spec.answer is None)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def tokenize_prompt(self, prompt: str) -> list[int]:
        """
        Token ids of a rendered prompt, every `<image>` expanded to `num_image_tokens` placeholders.

        As upstream: text between placeholders is tokenised piece by piece with special tokens on. When the first
        piece starts with bos, one bos is kept and the first id of *every* piece is dropped. With a tokenizer that adds
        bos this leaves two (its own and the template's); with one that does not, later pieces lose a real token.
        """
        pieces = [self.tokenizer(piece).input_ids for piece in prompt.split(self.image_token)]
        starts_with_bos = bool(pieces[0]) and pieces[0][0] == self.tokenizer.bos_token_id
        ids = [self.tokenizer.bos_token_id] if starts_with_bos else []
        for index, piece in enumerate(pieces):
            if index:
                ids += [self.image_token_id] * self.num_image_tokens
            ids += piece[int(starts_with_bos) :]
        return ids

    def preprocess_images(self, images: Sequence[Any]) -> torch.Tensor:
        """`[images, 3, size, size]` float32 pixel values of images of any kind [`load_image`] reads."""
        pictures = [load_image(image) for image in images]
        if self.image_aspect_ratio == "pad":
            background = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
            pictures = [_pad_to_square(picture, background) for picture in pictures]
        return self.image_processor(pictures, return_tensors="pt")["pixel_values"]

    def sample_frames(
        self, video: Any, num_frames: int, sampling: str = "upstream_understand", only_first: bool = False
    ) -> list[Image.Image]:
        """Frames of a video (path, URL, frames, array, tensor or `VideoClip`) by a named strategy, as PIL images."""
        frames = load_sampled_video(video, sampling, num_frames)
        return [Image.fromarray(frame) for frame in frames[: 1 if only_first else None]]

    def _check_media(self, task: str, num_prompts: int, images: Any, videos: Any) -> None:
        source = get_task(task).source
        for name, media, kind in (("images", images, "image"), ("videos", videos, "video")):
            if media is not None and len(media) != num_prompts:
                raise ValueError(f"`{name}` has {len(media)} entries for {num_prompts} prompts: pass one per prompt.")
            if task != "understand" and (media is not None) != (source == kind):
                wants = f"one of `{source}s` per prompt" if source else "no media"
                raise ValueError(
                    f"Task {task!r} takes {wants}; `{name}` was {'' if media is not None else 'not '}given."
                )
        if images is not None and videos is not None:
            raise ValueError("Pass `images` or `videos`, not both.")

    def _check_prompt(self, prompt: str) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"`prompt` must be a non-empty string, got {prompt!r}.")
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special and token.content in prompt:
                raise ValueError(f"`prompt` contains {token.content!r}, which is a control token: remove it.")

    def _checked_length(self, ids: list[int], prompt: str, truncation: bool) -> list[int]:
        limit = self.model_max_length
        if limit is None or self.image_token not in prompt or len(ids) <= limit:
            return ids
        if truncation:
            return ids[:limit]
        raise ValueError(
            f"A prompt with images has {len(ids)} tokens, more than the {limit} the model was trained with. Show "
            "fewer images or shorten the text; `truncation=True` cuts the end as upstream does."
        )


def _check_mllm_frames(mllm_frames: str) -> None:
    if mllm_frames not in ("first", "all"):
        raise ValueError(f"`mllm_frames` must be 'first' or 'all', got {mllm_frames!r}.")


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flatten(entry)]
    return [images]


def _pad_to_square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


__all__ = ["TASKS", "OmniVideoProcessor", "Task", "get_task"]
