"""Previews of a running generation: an estimate of the clean latents, and a cheap way to turn them into pixels."""

import numpy as np
import torch
from PIL import Image

from ..media.sources import Source
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..pipelines.presets import GenerationSettings

MAX_VAE_PARAMETERS = 20_000_000  # up to this size the VAE itself decodes previews; that of Wan 2.1 has 127 million
PATCHES = 8  # rows and columns of the picture that colours are learned from
CELLS = 3  # latents per side of a patch: the middle one is not touched by the next patch
RIDGE = 1e-3  # keeps the fit stable for VAEs with more channels than the picture has independent colours
SHOWN_WIDTH = 256  # pixels of a preview that has one pixel per latent


class Preview:
    """
    The estimate of one call.

    Flow matching moves along nearly straight lines: two successive latents and their noise levels give a line, whose
    end at noise level 0 is the estimate. The level after a step is only known in the next step, so that the estimate
    is one step old.

    Args:
        decoder: turns latents into pixels.
    """

    def __init__(self, decoder: "PreviewDecoder") -> None:
        self.decoder = decoder
        self._points: list[tuple[torch.Tensor, float]] = []  # latents and their noise level, at most the last two
        self._latest: torch.Tensor | None = None

    def add(self, latents: torch.Tensor, timestep: float) -> None:
        """
        Add the result of a step.

        Args:
            latents: `[batch, channels, frames, height, width]` after the step.
            timestep: timestep of the step: the noise level of the latents before it, times 1000.
        """
        if self._latest is not None:
            self._points = [*self._points[-1:], (self._latest, timestep / self.decoder.train_timesteps)]
        self._latest = latents[:1, :, :1].detach().float()  # the first frame is a whole image to Wan's causal VAE

    def clean_latents(self) -> torch.Tensor | None:
        """The estimate `[1, channels, 1, height, width]`; `None` during the first two steps."""
        if len(self._points) < 2:
            return None
        (before, high), (after, low) = self._points
        if high <= low:  # a scheduler that repeats a level
            return None
        return after - low * (before - after) / (high - low)

    def image(self) -> Image.Image | None:
        """The estimate as an image; `None` during the first two steps."""
        latents = self.clean_latents()
        return None if latents is None else self.decoder.decode(latents)


class PreviewDecoder:
    """
    Turns the latents of a frame into pixels: with a small VAE, or with a linear map from its latents to colours.

    The map is fitted once, on what the VAE makes of a picture of colour patches. It has one pixel per latent and runs
    no model, so that it does not disturb offloading.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: OmniVideoPipeline) -> None:
        self.pipe = pipe
        self.train_timesteps = int(getattr(pipe.scheduler.config, "num_train_timesteps", 1000))
        self.uses_vae = sum(parameter.numel() for parameter in pipe.vae.parameters()) <= MAX_VAE_PARAMETERS
        self._map: torch.Tensor | None = None

    def decode(self, latents: torch.Tensor) -> Image.Image:
        """
        Decode one frame.

        Args:
            latents: normalised latents `[1, channels, 1, height, width]`.
        """
        if self.uses_vae:
            return self.pipe.decode(latents, "pil")[0][0]
        if self._map is None:
            self._map = self.fit()
        values = latents[0, :, 0].movedim(0, -1).cpu()  # [height, width, channels]
        colors = _with_one(values) @ self._map
        image = Image.fromarray((colors.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
        scale = max(1, SHOWN_WIDTH // image.width)
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)

    def fit(self) -> torch.Tensor:
        """The map `[channels + 1, 3]` from latents, and a one, to RGB in 0..1."""
        side = PATCHES * CELLS
        colors = np.random.default_rng(0).integers(0, 256, (PATCHES, PATCHES, 3), dtype=np.uint8)
        pixels = side * self.pipe.grid.spatial
        picture = Image.fromarray(colors).resize((pixels, pixels), Image.Resampling.NEAREST)
        settings = GenerationSettings("t2i", pixels, pixels, 1, None, 1, 1.0, 1.0)
        latents = self.pipe.encode_source(Source(images=[picture]), settings)[0, :, 0].movedim(0, -1).cpu()
        middle = latents[CELLS // 2 :: CELLS, CELLS // 2 :: CELLS].reshape(PATCHES**2, -1)
        inputs = _with_one(middle.double())
        targets = torch.from_numpy(colors.reshape(-1, 3) / 255)
        gram = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
        return torch.linalg.solve(gram, inputs.T @ targets).float()


def _with_one(values: torch.Tensor) -> torch.Tensor:
    """Append a one to the last dimension, for the constant of a linear map."""
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)


__all__ = ["Preview", "PreviewDecoder"]
