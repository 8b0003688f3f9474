"""`OmniVideoProcessor`: prompts of every task, token ids that match the released model, images and video frames."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

from ..hub.hub_calls import HubCallsMixin
from ..media.images import load_image
from ..media.video_loading import load_sampled_video
from ..tasks import get_task
from .chat_template import bounded_rendering, check_chat_template
from .text_arguments import check_call, cut_to_length, pad_rows, split_frame_kwargs

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


IMAGE_TOKEN = "<image>"


# The `llama_3` conversation of the authors' code. A final assistant message ends with eos, every other message with
# `<|eot_id|>`. `generation` marks messages of the assistant for `return_assistant_tokens_mask`; it renders nothing.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM_PROMPT + "<|eot_id|>' }}"
    "{%- else -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- set body -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '" + IMAGE_TOKEN + "\n' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if loop.last and message['role'] == 'assistant' -%}{{ eos_token }}"
    "{%- else -%}{{ '<|eot_id|>' }}{%- endif -%}"
    "{%- endset -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ body }}{%- endgeneration -%}"
    "{%- else -%}{{ body }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)


_MARKS_THE_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")


class OmniVideoProcessor(HubCallsMixin, ProcessorMixin):
    r"""
    Combines image processor, tokenizer and chat template into the inputs of the MLLM.

    Args:
        image_processor (`SiglipImageProcessorPil`): Resizes (bicubic, squashed to a square) and normalises images.
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer of the language model, with `<image>` as a special token.
        chat_template (`str`, *optional*): Defaults to the `llama_3` conversation of the authors' code.
        num_image_tokens (`int`, defaults to 196): Tokens per image (`VilaConfig.image_seq_length`).
        image_aspect_ratio (`str`, defaults to `"resize"`): `"resize"` squashes images to a square, `"pad"` centres
            them on a grey square first.
        model_max_length (`int`, *optional*): Maximum length of a prompt with images, in tokens. The authors' code
            cuts longer ones, but does not limit prompts without images.
        num_frames (`int`, defaults to 8): Number of frames of a video for the MLLM.
        mllm_frames (`str`, defaults to `"first"`): Frames of a video to edit that the MLLM gets, which must match its
            training: `"first"`, the first frame only, as in the authors' code, or `"all"`, `num_frames` frames.

    Example:
        >>> from omni_video_hf import OmniVideoProcessor
        >>> from omni_video_hf.shapes import CHECKPOINT
        >>> processor = OmniVideoProcessor.from_pretrained(CHECKPOINT)
        >>> processor.num_frames > 0
        True
    """

    # Defaults of a call; `generate` needs the padding on the left.
    text_kwargs = {"padding": True, "padding_side": "left"}  # noqa: RUF012

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

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """
        Tokenise rendered prompts and preprocess their images.

        Args:
            images: one image, or a list (of lists) in the order of the placeholders: path, URL, PIL image, array or
                tensor.
            text: one prompt or a list, with one `<image>` per image. Prompts are tokenised with special tokens, as the
                released model needs. `add_special_tokens=False` only affects a text that does not begin with the bos
                token, such as a completion that is tokenised alone.
            kwargs: arguments of every transformers processor, also in `text_kwargs` and `images_kwargs`. `videos` are
                refused, because this method does not know their place in the prompt: use [`apply_chat_template`] or
                [`apply_task_template`].

                - `padding`: `True` (default) pads to the longest prompt, `"max_length"` to `max_length`; or `False`.
                - `padding_side`: `"left"` (default), which `generate` needs, or `"right"`.
                - `pad_to_multiple_of`: pad to a multiple of this length.
                - `truncation`: cut the end of prompts to `max_length`, or the end of prompts with images to
                  `model_max_length`, as the authors' code does. Placeholders are never cut.
                - `max_length`: maximum length in tokens; prompts are cut only with `truncation`.
                - `return_tensors`: `"pt"`, `"np"` or `None`.
                - `return_attention_mask`, `return_offsets_mapping`, `return_text_replacement_offsets` and
                  `return_mm_token_type_ids` (1 at placeholders).
                - arguments of the image processor, e.g. `do_rescale`.

        Returns:
            `input_ids` and `attention_mask` `[batch, length]`; with images also `pixel_values`
            `[images, 3, size, size]`.

        Raises:
            ValueError: if the numbers of images and placeholders differ, if a prompt with images is too long, or if
                truncation would cut placeholders.
            TypeError: for an argument that is unknown or not supported.
        """
        kwargs = check_call(self, kwargs)
        if text is None and images is None:
            raise ValueError("Pass `text`, `images` or both.")
        # The tokenizer's own padding side is that of training; `generate` needs the other side.
        settings = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "padding_side"}
        merged = self._merge_kwargs(tokenizer_init_kwargs=settings, **kwargs)
        data: dict[str, Any] = {}
        flat_images = _flatten(images)
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            self._check_placeholders(prompts, flat_images)
            flags = {name: merged[name] for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")}
            data |= self._encode(prompts, **(merged["text_kwargs"] | flags))
        if flat_images:
            data["pixel_values"] = self.preprocess_images(flat_images, **merged["images_kwargs"])
        return BatchFeature(
            data,
            tensor_type=merged["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _encode(
        self,
        prompts: list[str],
        padding: bool | str,
        padding_side: str,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        return_text_replacement_offsets: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """Token ids of prompts, cut and padded, with the other outputs of transformers' tokenizers."""
        rows, offsets = [], []
        for prompt in prompts:
            bare = not add_special_tokens and not prompt.startswith(self.tokenizer.bos_token or "")
            ids, places = self._tokenize(prompt, return_offsets_mapping, bare)
            kept = cut_to_length(self, ids, truncation, max_length)
            rows.append(ids[kept])
            offsets.append(places[kept])
        data = pad_rows(self, rows, padding, padding_side, max_length, pad_to_multiple_of)
        if return_offsets_mapping:
            pads = [[(0, 0)] * (len(ids) - len(row)) for ids, row in zip(data["input_ids"], rows, strict=True)]
            data["offset_mapping"] = [
                pad + places if padding_side == "left" else places + pad
                for pad, places in zip(pads, offsets, strict=True)
            ]
        if not return_attention_mask:
            del data["attention_mask"]
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if return_text_replacement_offsets:
            count = sum(prompt.count(self.image_token) for prompt in prompts)
            replacements = [self.image_token * self.num_image_tokens] * count
            data["text_replacement_offsets"] = self.get_text_with_replacements(list(prompts), replacements)[1]
        return data

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **_: Any
    ) -> MultiModalData:
        """Number of placeholders and patches per image; it is the same for all images, which are resized."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def apply_chat_template(
        self, conversation: list[dict[str, Any]] | list[list[dict[str, Any]]], *args: Any, **kwargs: Any
    ) -> Any:
        """
        Render and tokenise conversations, as in every transformers processor.

        Image parts contain a path, URL, PIL image, array or tensor as `image`, `url` or `path`. Video parts contain a
        path, URL, list of frames, array, tensor or `VideoClip` as `video`, `url` or `path`. A video becomes
        `num_frames` images, selected by `frame_sampling`. Both can be passed here, in `processor_kwargs` or in its
        `videos_kwargs`; the defaults are those of the authors' code (8 frames, `"upstream_understand"`).

        Raises:
            ValueError: for `return_assistant_tokens_mask` with a template that does not mark the assistant's messages.
            TypeError: for other arguments that select frames, e.g. `fps`.
        """
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        frames = split_frame_kwargs(kwargs, processor_kwargs)
        num_frames = frames.get("num_frames", self.num_frames)
        sampling = frames.get("frame_sampling", "upstream_understand")
        self._check_template(args, kwargs)
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations: Any = conversation if batched else [conversation]
        loaded: Any = [
            [self._with_loaded_media(message, num_frames, sampling) for message in messages]
            for messages in conversations
        ]
        loaded = loaded if batched else loaded[0]
        with bounded_rendering():
            return super().apply_chat_template(loaded, *args, processor_kwargs=processor_kwargs, **kwargs)

    def _with_loaded_media(self, message: dict[str, Any], num_frames: int, sampling: str) -> dict[str, Any]:
        """Load the images of a message, and replace every video by images of its frames."""
        if not isinstance(message.get("content"), (list, tuple)):
            return message
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            source = next((part[key] for key in ("image", "video", "url", "path") if part.get(key) is not None), None)
            if part["type"] == "image" and source is not None:
                content.append({"type": "image", "image": load_image(source)})
            elif part["type"] == "video":
                if source is None:
                    raise ValueError("A video part of a message needs its video as 'video', 'url' or 'path'.")
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
        allow_empty: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Inputs of the MLLM for a task, teacher-forced over prompt and forced answer (`understand` has no answer).

        Args:
            task: `t2i`, `t2v`, `i2i`, `v2v`, `i2v` or `understand`.
            prompt: one prompt or a list.
            images: one image per prompt (`i2i`, `i2v`, `understand`).
            videos: one video per prompt (`v2v`, `understand`).
            mllm_frames: frames of a `v2v` source that the MLLM gets: `"first"`, the first frame only, as in the
                authors' code, or `"all"`, `num_frames` frames. Default: the setting of the processor.
            frame_sampling: name of the strategy that selects frames. Default: that of the authors' code for the task.
            allow_empty: allow an empty prompt, such as a negative prompt.
            kwargs: see `__call__`.

        Raises:
            ValueError: for an unknown task, an empty prompt, a prompt with control tokens, or images or videos that
                do not fit the task.

        Example:
            >>> from omni_video_hf import OmniVideoProcessor
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> processor = OmniVideoProcessor.from_pretrained(CHECKPOINT)
            >>> inputs = processor.apply_task_template("t2i", "a red circle", return_tensors="pt")
            >>> inputs["input_ids"].shape == inputs["attention_mask"].shape
            True
        """
        mllm_frames = self.mllm_frames if mllm_frames is None else mllm_frames
        _check_mllm_frames(mllm_frames)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._check_media(task, len(prompts), images, videos)
        pictures: list[list[Image.Image]] = [[] for _ in prompts]
        if images is not None:
            pictures = [[load_image(image)] for image in images]
        elif videos is not None:
            sampling = frame_sampling or ("upstream_understand" if get_task(task).answers_in_text else "upstream_edit")
            only_first = get_task(task).mllm_sees_first_frame and mllm_frames == "first"
            pictures = [self.sample_frames(video, self.num_frames, sampling, only_first) for video in videos]
        texts = [
            self.build_prompt(task, text, len(frames), allow_empty)
            for text, frames in zip(prompts, pictures, strict=True)
        ]
        return self(text=texts, images=pictures if any(pictures) else None, **kwargs)

    def build_prompt(self, task: str, prompt: str, num_images: int | None = None, allow_empty: bool = False) -> str:
        """
        Render the conversation of a task as one string, exactly as the authors' code does.

        Args:
            task: name of the task.
            prompt: text of the user.
            num_images: number of images or frames. Default: one if the task has a source, else none.
            allow_empty: allow an empty prompt.

        Example:
            >>> from omni_video_hf import OmniVideoProcessor
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> processor = OmniVideoProcessor.from_pretrained(CHECKPOINT)
            >>> "a red circle" in processor.build_prompt("t2i", "a red circle")
            True
        """
        spec = get_task(task)
        self._check_prompt(prompt, allow_empty)
        if num_images is None:
            num_images = int(spec.source is not None)
        user = f"{self.image_token}\n" * num_images + spec.user.format(prompt=prompt)
        messages = [{"role": "user", "content": user}]
        if spec.answer is not None:
            messages.append({"role": "assistant", "content": spec.answer})
        with bounded_rendering():
            return super().apply_chat_template(messages, add_generation_prompt=spec.answer is None)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _check_template(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        template = self._resolve_chat_template(args[0] if args else kwargs.get("chat_template"))
        if kwargs.get("return_assistant_tokens_mask") and not _MARKS_THE_ASSISTANT.search(template):
            raise ValueError(
                "`return_assistant_tokens_mask` needs a chat template with `{% generation %}` around messages of the "
                "assistant, and this template has none: pass `chat_template=`, e.g. the one of this class, "
                "`processing_omni_video.CHAT_TEMPLATE`."
            )

    def _check_placeholders(self, prompts: list[str], images: list[Any]) -> None:
        placeholders = sum(prompt.count(self.image_token) for prompt in prompts)
        if placeholders != len(images):
            raise ValueError(
                f"`text` has {placeholders} {self.image_token} placeholders, but `images` has {len(images)}: "
                "they must be equal."
            )

    def tokenize_prompt(self, prompt: str) -> list[int]:
        """
        Token ids of a rendered prompt, in which every `<image>` becomes `num_image_tokens` placeholders.

        The ids match the authors' code, which tokenises the texts between placeholders separately, with special
        tokens. If the first text starts with bos, one bos is kept and the first id of *every* text is removed. With a
        tokenizer that adds bos, two remain (its own and that of the template); with another tokenizer, every later
        text loses a real token.

        Example:
            >>> from omni_video_hf import OmniVideoProcessor
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> processor = OmniVideoProcessor.from_pretrained(CHECKPOINT)
            >>> len(processor.tokenize_prompt("a red circle")) > 0
            True
        """
        return self._tokenize(prompt)[0]

    def _tokenize(
        self, prompt: str, with_offsets: bool = False, bare: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and with `with_offsets` the place of each token in the prompt with all placeholders expanded."""
        pieces = prompt.split(self.image_token)
        options = {"add_special_tokens": not bare, "return_offsets_mapping": with_offsets or None}
        encoded = [self.tokenizer(piece, **options) for piece in pieces]
        first, width = encoded[0].input_ids, len(self.image_token)
        skipped = int(not bare and bool(first) and first[0] == self.tokenizer.bos_token_id)
        ids = first[:skipped]
        offsets = encoded[0].offset_mapping[:skipped] if with_offsets else []
        start = 0
        for index, (piece, tokens) in enumerate(zip(pieces, encoded, strict=True)):
            if index:
                ids = ids + [self.image_token_id] * self.num_image_tokens
                end = start + width * self.num_image_tokens
                offsets = offsets + [(place, place + width) for place in range(start, end, width) if with_offsets]
                start = end
            ids = ids + tokens.input_ids[skipped:]
            if with_offsets:
                offsets = offsets + [(left + start, right + start) for left, right in tokens.offset_mapping[skipped:]]
            start += len(piece)
        return ids, offsets

    def preprocess_images(self, images: Sequence[Any], **kwargs: Any) -> torch.Tensor:
        """
        Load and preprocess images.

        Args:
            images: images in any form that [`load_image`] reads.
            kwargs: arguments of the image processor.

        Returns:
            float32 pixel values `[images, 3, size, size]`

        Example:
            >>> from omni_video_hf import OmniVideoProcessor
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> processor = OmniVideoProcessor.from_pretrained(CHECKPOINT)
            >>> from PIL import Image
            >>> processor.preprocess_images([Image.new("RGB", (64, 64))]).shape[:2]
            torch.Size([1, 3])
        """
        pictures = [load_image(image) for image in images]
        if self.image_aspect_ratio == "pad":
            background = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
            pictures = [_pad_to_square(picture, background) for picture in pictures]
        return self.image_processor(pictures, **(kwargs | {"return_tensors": "pt"}))["pixel_values"]

    def sample_frames(
        self, video: Any, num_frames: int, sampling: str = "upstream_understand", only_first: bool = False
    ) -> list[Image.Image]:
        """
        Select frames of a video (path, URL, frames, array, tensor or `VideoClip`) with a named strategy.

        Example:
            >>> from omni_video_hf import OmniVideoProcessor
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> processor = OmniVideoProcessor.from_pretrained(CHECKPOINT)
            >>> import numpy as np
            >>> len(processor.sample_frames(np.zeros((16, 64, 64, 3), np.uint8), num_frames=4))
            4
        """
        frames = load_sampled_video(video, sampling, num_frames)
        return [Image.fromarray(frame) for frame in frames[: 1 if only_first else None]]

    def _check_media(self, task: str, num_prompts: int, images: Any, videos: Any) -> None:
        spec = get_task(task)
        source = spec.source
        for name, media, kind in (("images", images, "image"), ("videos", videos, "video")):
            if media is not None and len(media) != num_prompts:
                raise ValueError(f"`{name}` has {len(media)} entries for {num_prompts} prompts: pass one per prompt.")
            if not spec.answers_in_text and (media is not None) != (source == kind):
                wants = f"one of `{source}s` per prompt" if source else "no images and no videos"
                raise ValueError(
                    f"Task {task!r} takes {wants}; `{name}` was {'' if media is not None else 'not '}given."
                )
        if images is not None and videos is not None:
            raise ValueError("Pass `images` or `videos`, not both.")

    def _check_prompt(self, prompt: str, allow_empty: bool = False) -> None:
        if not isinstance(prompt, str) or not (prompt.strip() or allow_empty):
            raise ValueError(f"`prompt` must be a non-empty string, got {prompt!r}.")
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special and token.content in prompt:
                raise ValueError(f"`prompt` contains {token.content!r}, which is a control token: remove it.")


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


__all__ = ["OmniVideoProcessor"]
