"""
Long videos in windows, as pure functions: the plan of the windows, their weights, and their noise.

Wan's VAE is causal: the first latent frame of a clip stands for one frame, every other one for four. A later window is
a clip of its own, so its first latent frame must stand for one frame as well, which no latent frame of the whole clip
there does. Every window after the first therefore has a latent frame of its own in front, its *lead-in*. It stands for
the last frame before those that the window gives to the clip, is denoised with the window, and is then left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """
    One window of a clip.

    Args:
        start: first latent frame of the clip that the window gives.
        stop: the latent frame after its last one.
        lead_in: index of its lead-in among the lead-ins of the clip; `None` for the first window, which has none.

    Example:
        >>> from omni_video_hf.diffusion.window_plan import Window
        >>> Window(start=3, stop=7, lead_in=0).frames(temporal=4)
        (8, 25)
    """

    start: int
    stop: int
    lead_in: int | None = None

    def frames(self, temporal: int) -> tuple[int, int]:
        """First frame of the window's clip, lead-in included, and the frame after its last; `temporal` per latent."""
        first = 0 if self.lead_in is None else temporal * (self.start - 1)
        return first, temporal * (self.stop - 1) + 1

    def take(self, latents: torch.Tensor, lead_ins: torch.Tensor) -> torch.Tensor:
        """
        The latents of the window, lead-in first.

        Args:
            latents: `[batch, channels, frames, height, width]` of the clip.
            lead_ins: `[batch, channels, windows - 1, height, width]`.
        """
        own = latents[:, :, self.start : self.stop]
        if self.lead_in is None:
            return own
        return torch.cat([lead_ins[:, :, self.lead_in : self.lead_in + 1], own], dim=2)


def plan_windows(num_latents: int, window: int, overlap: int) -> tuple[Window, ...]:
    """
    Cover a clip with windows of equal length, at distances as equal as possible.

    Args:
        num_latents: latent frames of the clip.
        window: latent frames of a window, a lead-in included; at least 3.
        overlap: latent frames that neighbours share at least, without the lead-in; from 1 to `window - 2`.

    Returns:
        The windows in order. A clip that fits one window gets one, of its own length.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> from omni_video_hf.diffusion.window_plan import plan_windows
        >>> [(window.start, window.stop) for window in plan_windows(num_latents=9, window=5, overlap=2)]
        [(0, 5), (3, 7), (5, 9)]
    """
    if num_latents < 1 or window < 3 or not 1 <= overlap <= window - 2:
        raise ValueError(
            f"Windows need `num_latents` of at least 1, `window` of at least 3 and `overlap` in 1..{window - 2}, got "
            f"{num_latents}, {window} and {overlap}."
        )
    if num_latents <= window:
        return (Window(0, num_latents),)
    rest = num_latents - window
    later = -(-rest // (window - 1 - overlap))
    stops = [window + (rest * number + later // 2) // later for number in range(1, later + 1)]
    return (
        Window(0, window),
        *(Window(stop - window + 1, stop, number) for number, stop in enumerate(stops)),
    )


def pyramid_weights(windows: Sequence[Window]) -> list[torch.Tensor]:
    """
    Weights of the windows' latent frames when they are blended: a pyramid, high in the middle of a window.

    Returns:
        For each window a float32 tensor `[stop - start]`; at each latent frame of the clip the weights of all windows
        sum to 1.

    Example:
        >>> from omni_video_hf.diffusion.window_plan import plan_windows, pyramid_weights
        >>> first, second = pyramid_weights(plan_windows(num_latents=6, window=5, overlap=3))
        >>> [round(float(weight), 2) for weight in second]  # it gives latent frames 2 to 5
        [0.25, 0.5, 0.67, 1.0]
    """
    lengths = [window.stop - window.start for window in windows]
    pyramids = [torch.arange(1, length + 1).minimum(torch.arange(length, 0, -1)) for length in lengths]
    total = torch.zeros(max(window.stop for window in windows))
    for window, pyramid in zip(windows, pyramids, strict=True):
        total[window.start : window.stop] += pyramid
    return [pyramid / total[window.start : window.stop] for window, pyramid in zip(windows, pyramids, strict=True)]


def blend_windows(
    parts: Sequence[torch.Tensor], windows: Sequence[Window], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Blend what the windows computed to the whole clip.

    Args:
        parts: for each window `[batch, channels, frames, height, width]`, as of [`Window.take`].
        windows, weights: of [`plan_windows`] and [`pyramid_weights`].

    Returns:
        `[batch, channels, frames, height, width]` of the clip, and of the lead-ins, which are not blended.
    """
    if len(windows) == 1:  # the numbers of a single window stay as they are, to the bit
        return parts[0], parts[0][:, :, :0]
    whole = parts[0].new_zeros(*parts[0].shape[:2], windows[-1].stop, *parts[0].shape[3:])
    lead_ins = []
    for part, window, weight in zip(parts, windows, weights, strict=True):
        own = part[:, :, part.shape[2] - len(weight) :]
        whole[:, :, window.start : window.stop] += own * weight.to(part).view(1, 1, -1, 1, 1)
        if window.lead_in is not None:
            lead_ins.append(part[:, :, :1])
    return whole, torch.cat(lead_ins, dim=2)


def shuffled_noise(
    noise: torch.Tensor, windows: Sequence[Window], generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """
    Noise of a clip from the noise of its first window: later windows get the same noise frames in another order.

    Windows that begin with the same noise come out alike, and the order keeps them from repeating the motion
    (FreeNoise, arXiv 2310.15169). The first latent frame, which stands for one frame, is not used again.

    Args:
        noise: `[batch, channels, window, height, width]`, noise of the first window.
        windows: of [`plan_windows`].
        generator: generator of the orders, or one per sample.

    Returns:
        `[batch, channels, frames, height, width]`; it begins with `noise`.
    """
    first, total = windows[0].stop, windows[-1].stop
    period = first - 1
    samples = []
    for index, sample in enumerate(noise):
        own = generator[index] if isinstance(generator, list) else generator
        device = "cpu" if own is None else own.device
        order = torch.arange(first, device=device)
        while len(order) < total:  # each block holds the frames of the block one period before it
            count = min(max(1, period // 2), total - len(order))
            block = order[len(order) - period :][: max(1, period // 2)]
            order = torch.cat([order, block[torch.randperm(len(block), generator=own, device=device)][:count]])
        samples.append(sample[:, order.to(sample.device)])
    return torch.stack(samples)


__all__ = ["Window", "blend_windows", "plan_windows", "pyramid_weights", "shuffled_noise"]
