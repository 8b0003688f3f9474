"""Steps that are the same in the pipelines of both versions: checks of components, noise, schedule, output."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from ...diffusion.window_plan import Window, shuffled_noise
from ...utils.modules import Host
from ..presets import GenerationSettings
from ..request_checks import check_numbers
from ..scheduling import prepare_scheduler
from .output import OmniVideoPipelineOutput


class OmniVideoStepsMixin(Host):
    """Steps of a pipeline with `transformer`, `vae`, `scheduler` and `grid`."""

    @property
    def video_processor(self) -> VideoProcessor:
        """Converts frames to inputs of the VAE, and its outputs to frames."""
        self._require("vae")
        return VideoProcessor(vae_scale_factor=self.vae.config.scale_factor_spatial)

    def _require(self, *names: str) -> None:
        """Refuse what needs a component that this pipeline was made without."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"This pipeline was created without `{'` and `'.join(missing)}`, so it can only encode and answer. "
                f"Load it with all components, or add them with `pipe.register_modules({missing[0]}=...)`."
            )

    def prepare_latents(
        self,
        batch_size: int,
        settings: GenerationSettings,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        device: torch.device | None = None,
        windows: Sequence[Window] = (),
    ) -> torch.Tensor:
        """
        Initial noise `[batch, channels, frames, height, width]` in float32.

        Args:
            batch_size: number of samples.
            settings: size and length.
            generator: one per sample, or one for all.
            latents: noise of the caller, of that shape, instead of new noise.
            device: device of the result. Default: the device that the pipeline runs on.
            windows: windows of a long video. With several, noise of the length of the first one is drawn, and the
                later ones get it in another order, see [`shuffled_noise`].

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> from omni_video_hf.media.sources import Source
            >>> settings, _ = pipe.prepare_settings("t2v", Source(), *[None] * 7)
            >>> pipe.prepare_latents(1, settings).shape
            torch.Size([1, 16, 5, 8, 8])
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` has {len(generator)} entries for {batch_size} samples: pass one per sample."
            )
        shape = (
            batch_size,
            self.transformer.config.out_channels,
            self.grid.latent_frames(settings.num_frames),
            settings.height // self.grid.spatial,
            settings.width // self.grid.spatial,
        )
        device = device or self._execution_device
        if latents is None:
            drawn = (*shape[:2], windows[0].stop, *shape[3:]) if windows else shape
            noise = randn_tensor(drawn, generator=generator, device=device, dtype=torch.float32)
            return noise if drawn == shape else shuffled_noise(noise, windows, generator)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must be {shape} for these settings, got {tuple(latents.shape)}.")
        return latents.to(device, torch.float32)

    def prepare_scheduler(
        self,
        num_inference_steps: int,
        flow_shift: float,
        device: torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> SchedulerMixin:
        """
        Create a scheduler for one call, by default with the sigmas of the authors' code, see [`prepare_scheduler`].

        The scheduler of the pipeline is not changed.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> len(pipe.prepare_scheduler(num_inference_steps=4, flow_shift=3.0).timesteps)
            4
        """
        check_numbers(num_inference_steps=num_inference_steps, flow_shift=flow_shift)
        return prepare_scheduler(self.scheduler, num_inference_steps, flow_shift, device, sigmas, timesteps)

    def _output(self, return_dict: bool, **fields: Any) -> OmniVideoPipelineOutput | tuple:
        output = OmniVideoPipelineOutput(**fields)
        return output if return_dict else (output.frames, output.text)


def seeded_generator(
    generator: torch.Generator | list[torch.Generator] | None,
) -> tuple[torch.Generator | list[torch.Generator], int | list[int] | None]:
    """
    A generator, and the seed that reproduces its numbers.

    Returns:
        The given generator, or a new one with a seed below 2^32 from torch's global generator. The seed is `None` for
        a generator that was used before; a list of generators has a list of seeds.
    """
    if generator is None:
        seed = int(torch.randint(2**32, ()))
        return torch.Generator("cpu").manual_seed(seed), seed
    seeds = [
        entry.initial_seed()
        for entry in (generator if isinstance(generator, list) else [generator])
        if torch.equal(entry.get_state(), torch.Generator(entry.device).manual_seed(entry.initial_seed()).get_state())
    ]
    if isinstance(generator, list):
        return generator, seeds if len(seeds) == len(generator) else None
    return generator, seeds[0] if seeds else None


__all__ = ["OmniVideoStepsMixin", "seeded_generator"]
