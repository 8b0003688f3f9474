"""`OmniVideo2Processor`: chat prompts and video frames for the stock Qwen3-VL of Omni-Video 2, without torchvision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from ..hub.hub_calls import HubCallsMixin

START, END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
SPECIAL_TOKENS = (START, END, VISION_START, VISION_END, VIDEO)
VIDEO_TOKEN_TYPE = 2  # in `mm_token_type_ids`, by which Qwen3-VL finds its videos
MAX_ASPECT_RATIO = 200
# (least, most) pixels of a clip, all frames together.
PixelBudget = tuple[int, int]


@dataclass(frozen=True)
class MllmFrames:
    """
    Frames of a video for the MLLM.

    Args:
        frames: uint8 `[frames, height, width, 3]`, RGB.
        times: seconds from the start of the video, one per frame.
    """

    frames: np.ndarray
    times: tuple[float, ...]


class OmniVideo2Processor(HubCallsMixin, ProcessorMixin):
    r"""
    Turns a system prompt, a request and a video into the inputs of a stock Qwen3-VL.

    It gives the ids and pixels of transformers' `Qwen3VLProcessor` with a bare video placeholder, which are those that
    the released model was trained with: without a second pair of `<|vision_start|>` and `<|vision_end|>` around the
    whole video. It needs no torchvision, which the video processor of transformers needs.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer of Qwen3-VL.
        patch_size (`int`, defaults to 16): Pixels per patch of the vision tower, in height and in width.
        temporal_patch_size (`int`, defaults to 2): Frames per patch.
        merge_size (`int`, defaults to 2): Patches per visual token, in height and in width.
        image_mean, image_std (`list[float]`, default to 0.5): Statistics by which pixels are normalised.
        num_frames (`int`, defaults to 6): Frames of a video for the MLLM, at equal distances from first to last.

    Raises:
        ValueError: for a tokenizer without the special tokens of Qwen3-VL.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        patch_size: int = 16,
        temporal_patch_size: int = 2,
        merge_size: int = 2,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        num_frames: int = 6,
        chat_template: str | None = None,
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(map(repr, missing))}: Omni-Video 2 needs the tokenizer of Qwen3-VL."
            )
        self.special_ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
        self.patch_size, self.temporal_patch_size, self.merge_size = patch_size, temporal_patch_size, merge_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.num_frames = num_frames
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))

    def chat_inputs(
        self, system: str, user: str, video: MllmFrames | None = None, pixels: PixelBudget | None = None
    ) -> tuple[dict[str, torch.Tensor], int]:
        """
        Inputs of the MLLM for a system prompt and a turn of the user, ready for the answer.

        Special tokens that a text spells out are tokenised as plain text.

        Args:
            system: system prompt.
            user: text of the user, behind the video.
            video: the frames; `None` for a turn without video.
            pixels: least and most pixels of the clip, all frames together; needed with `video`.

        Returns:
            The inputs as tensors with a batch dimension of 1, and the number of tokens before the user's turn begins:
            system turn and opening of the user's turn.

        Raises:
            ValueError: for a video of another number of frames than `times`, or a side more than 200 times the other.
        """
        ids: list[int] = []
        inputs: dict[str, torch.Tensor] = {}
        for special, text in ((START, f"system\n{system}"), (END, "\n")):
            ids += [self.special_ids[special], *self._text_ids(text)]
        ids.append(self.special_ids[START])
        opening = self._text_ids("user\n")
        dropped = len(ids) + len(opening)
        if video is None:
            ids += self._text_ids(f"user\n{user}")
        else:
            if pixels is None:
                raise ValueError("`pixels` is missing: pass the least and the most pixels of the clip with `video`.")
            ids += opening
            inputs["pixel_values_videos"], inputs["video_grid_thw"] = self.video_pixels(video.frames, pixels)
            ids += self._video_ids(video, inputs["video_grid_thw"][0].tolist())
            ids += self._text_ids(user)
        for special, text in ((END, "\n"), (START, "assistant\n")):
            ids += [self.special_ids[special], *self._text_ids(text)]
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if video is not None:
            is_video = inputs["input_ids"] == self.special_ids[VIDEO]
            inputs["mm_token_type_ids"] = is_video.long() * VIDEO_TOKEN_TYPE
        return inputs, dropped

    def video_pixels(self, frames: np.ndarray, pixels: PixelBudget) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Patches of a clip for the vision tower.

        Frames are resized on bytes with torch's antialiased bicubic filter, which is what torchvision calls.

        Args:
            frames: uint8 `[frames, height, width, 3]`.
            pixels: least and most pixels of the clip, all frames together.

        Returns:
            `[patches, channels * temporal_patch_size * patch_size**2]` float32, and the numbers of patches in time,
            height and width, `[1, 3]`.
        """
        clip = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        if missing := -len(clip) % self.temporal_patch_size:
            clip = torch.cat([clip, clip[-1:].expand(missing, -1, -1, -1)])
        size = self.clip_size(len(frames), clip.shape[2], clip.shape[3], pixels)
        if size != tuple(clip.shape[2:]):
            clip = nn_resize(clip.contiguous(), size)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.image_mean, self.image_std))
        values = (clip.float() - mean * 255) / (std * 255)
        patch, merge, temporal = self.patch_size, self.merge_size, self.temporal_patch_size
        grid = (len(values) // temporal, size[0] // patch, size[1] // patch)
        values = values.reshape(
            grid[0], temporal, -1, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
        )  # fmt: skip
        # Patches of one visual token follow each other; in a patch the order is channel, frame, row, column.
        patches = values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1)
        return patches, torch.tensor([grid])

    def clip_size(self, num_frames: int, height: int, width: int, pixels: PixelBudget) -> tuple[int, int]:
        """
        Height and width to which a clip is resized, as Qwen3-VL does: multiples of a visual token's side, with the
        pixels of all frames within a budget.

        Args:
            num_frames, height, width: of the clip, in pixels.
            pixels: least and most pixels of all frames together.

        Raises:
            ValueError: for a side more than 200 times the other.
        """
        least, most = pixels
        side = self.patch_size * self.merge_size
        if min(height, width) < side:
            scale = side / min(height, width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"The video is {width}x{height}: the MLLM takes sides that are at most {MAX_ASPECT_RATIO} times as "
                "long as the other. Crop it first."
            )
        total = round(num_frames / self.temporal_patch_size) * self.temporal_patch_size
        rows, columns = round(height / side), round(width / side)
        if total * rows * columns * side**2 > most:
            shrink = math.sqrt(num_frames * height * width / most)
            rows, columns = (max(1, math.floor(value / shrink / side)) for value in (height, width))
        elif total * rows * columns * side**2 < least:
            grow = math.sqrt(least / (num_frames * height * width))
            rows, columns = (math.ceil(value * grow / side) for value in (height, width))
        return rows * side, columns * side

    def frame_numbers(self, total: int) -> list[int]:
        """
        Numbers of the frames of a video with `total` frames that the MLLM sees.
        """
        return np.linspace(0, total - 1, self.num_frames).round().astype(int).tolist()

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that [`chat_inputs`] gives."""
        return ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values_videos", "video_grid_thw"]

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _video_ids(self, video: MllmFrames, grid: list[int]) -> list[int]:
        """The time stamp and the placeholders of every temporal patch."""
        frames, rows, columns = grid
        times = list(video.times)
        if len(times) != len(video.frames):
            raise ValueError(f"The video has {len(video.frames)} frames, but `times` has {len(times)} entries.")
        times += times[-1:] * (-len(times) % self.temporal_patch_size)
        tokens = [self.special_ids[VIDEO]] * (rows * columns // self.merge_size**2)
        ids: list[int] = []
        for patch in range(frames):
            covered = times[patch * self.temporal_patch_size : (patch + 1) * self.temporal_patch_size]
            ids += self._text_ids(f"<{(covered[0] + covered[-1]) / 2:.1f} seconds>")
            ids += [self.special_ids[VISION_START], *tokens, self.special_ids[VISION_END]]
        return ids


def nn_resize(clip: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize uint8 `[frames, channels, height, width]` on bytes, with an antialiased bicubic filter."""
    return torch.nn.functional.interpolate(clip, size=size, mode="bicubic", align_corners=False, antialias=True)


__all__ = ["END", "MllmFrames", "OmniVideo2Processor"]
