"""Text arguments of the processor: checks of the arguments, truncation and padding of prompts."""

from typing import Any

from transformers import ProcessorMixin
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs

# Arguments of transformers' tokenizers that have no meaning for a prompt of placeholders and text.
_UNSUPPORTED = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "stride",
    "is_split_into_words",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_token_type_ids",
    "return_length",
    "sanitize_control_tokens",
)
_FRAMES = ("num_frames", "frame_sampling")
# Frames are selected by their number; these arguments would select them in another way.
_OTHER_FRAMES = ("fps", "video_metadata")
_NO_LIMIT = 10**20  # `model_max_length` of a tokenizer without a limit is 10**30


def check_call(processor: ProcessorMixin, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Check the arguments of a call, and return those that are not `None`.

    Raises:
        ValueError: for videos, because their place in the prompt is unknown.
        TypeError: for an argument that is unknown or not supported.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if "videos" in kwargs:
        raise ValueError(
            "`videos` need a place in the prompt: use `apply_chat_template` with a {'type': 'video', ...} part, or "
            "`apply_task_template`."
        )
    own = getattr(processor.image_processor, "valid_kwargs", ImagesKwargs).__annotations__
    text, images = set(TextKwargs.__annotations__), set(ImagesKwargs.__annotations__) | set(own)
    known = {"text_kwargs": text, "images_kwargs": images}
    flat = text | images | set(ProcessingKwargs.__annotations__) | {"common_kwargs"}
    unknown = sorted(set(kwargs) - flat - {"do_sample_frames"})
    for group, names in known.items():
        unknown += sorted(f"{group}[{name!r}]" for name in set(kwargs.get(group, {})) - names)
    unknown += sorted(group for group in ("videos_kwargs", "audio_kwargs") if kwargs.get(group))
    if unknown:
        raise TypeError(f"{type(processor).__name__} got unexpected arguments: {', '.join(unknown)}.")
    everything = kwargs | kwargs.get("text_kwargs", {}) | kwargs.get("common_kwargs", {})
    unsupported = [name for name in _UNSUPPORTED if everything.get(name)]
    if unsupported:
        raise TypeError(f"{type(processor).__name__} does not support {', '.join(unsupported)}: leave it out.")
    kwargs.pop("do_sample_frames", None)  # transformers adds it together with `num_frames`
    return kwargs


def split_frame_kwargs(kwargs: dict[str, Any], processor_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Remove `num_frames` and `frame_sampling` from the arguments of `apply_chat_template`, and return them.

    Raises:
        TypeError: for other arguments that select frames.
        ValueError: if one of them was passed twice with different values.
    """
    videos = dict(processor_kwargs.pop("videos_kwargs", None) or {})
    places = (kwargs, processor_kwargs, videos)
    found: dict[str, Any] = {}
    for name in (*_FRAMES, *_OTHER_FRAMES):
        values = [place.pop(name) for place in places if place.get(name) is not None]
        if values and name in _OTHER_FRAMES:
            raise TypeError(f"`{name}` is not supported: pass `num_frames`, and `frame_sampling` to select them.")
        if any(value != values[0] for value in values):
            raise ValueError(f"`{name}` was given twice, as {' and '.join(map(repr, values))}: pass it once.")
        if values:
            found[name] = values[0]
    videos.pop("do_sample_frames", None)
    if videos:
        raise TypeError(f"`videos_kwargs` contains unexpected arguments: {', '.join(sorted(videos))}.")
    return found


def cut_to_length(processor: ProcessorMixin, ids: list[int], truncation: bool | str, max_length: int | None) -> slice:
    """
    The slice of a prompt's token ids that truncation keeps.

    Raises:
        ValueError: if a prompt with images is longer than those of the training, or if placeholders would be cut.
    """
    cuts = truncation not in (None, False, "do_not_truncate")
    images = ids.count(processor.image_token_id)
    trained = processor.model_max_length if images else None
    limit = max_length or trained
    if limit is None and processor.tokenizer.model_max_length < _NO_LIMIT:
        limit = processor.tokenizer.model_max_length
    kept = slice(None)
    if cuts and limit is not None and len(ids) > limit:
        kept = slice(len(ids) - limit, None) if processor.tokenizer.truncation_side == "left" else slice(limit)
    length = len(ids[kept])
    if trained is not None and length > trained:
        raise ValueError(
            f"A prompt with images has {length} tokens, more than the {trained} the model was trained with. Pass "
            "fewer images or shorten the text; `truncation=True` cuts the end, as the authors' code does."
        )
    lost = images - ids[kept].count(processor.image_token_id)
    if lost:
        raise ValueError(
            f"Truncation to {limit} tokens would cut {lost} of the {images} image placeholders of a prompt of "
            f"{len(ids)} tokens. Raise `max_length`, or pass fewer images."
        )
    return kept


def pad_rows(
    processor: ProcessorMixin,
    rows: list[list[int]],
    padding: bool | str,
    padding_side: str,
    max_length: int | None,
    pad_to_multiple_of: int | None,
) -> dict[str, Any]:
    """
    Pad prompts to `input_ids` and `attention_mask`.

    Raises:
        ValueError: for `padding="max_length"` if neither `max_length` nor the tokenizer determines the length.
    """
    tokenizer = processor.tokenizer
    if padding != "max_length":
        max_length = None
    elif max_length is None:
        max_length = processor.model_max_length or tokenizer.model_max_length
        if max_length >= _NO_LIMIT:
            raise ValueError("`padding='max_length'` needs `max_length`, because the tokenizer has no limit.")
    padded = tokenizer.pad(
        {"input_ids": rows},
        padding=padding,
        max_length=max_length,
        pad_to_multiple_of=pad_to_multiple_of,
        padding_side=padding_side,
        return_attention_mask=True,
    )
    return dict(padded)


__all__ = ["check_call", "cut_to_length", "pad_rows", "split_frame_kwargs"]
