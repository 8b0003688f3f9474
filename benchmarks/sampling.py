"""
Wall time and peak memory of the sampling loop: ours against upstream's plain path, side by side in the same run.

On the CPU at a quarter of the released model's widths and tokens, all proportions kept; on a GPU at full size.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.tasks import get_task

from .measure import collect, in_own_process, interleaved, peak_resident, resident, spread, synchronize
from .proportional import PlainPath, pipeline

GUIDANCE_SCALE = 6.0
TITLE = "Sampling, side by side with upstream's plain path"
COLUMNS = {
    "setting": lambda row: f"{row['setting']}, {row['steps']} steps, {row['device']}",
    "plain, s": lambda row: spread(row["plain"]),
    "ours, s": lambda row: spread(row["ours"]),
    "ours / plain": lambda row: f"{row['ratio']:.3f}",
    "in processor time": lambda row: f"{row['processor_ratio']:.3f}",
    "difference": lambda row: f"{row['difference']:.0e}",
    "call over decoder alone": lambda row: f"{row['overhead']:.1%}",
    "plain, MB": lambda row: f"{row['plain_memory'] / 1e6:.0f}",
    "ours, MB": lambda row: f"{row['ours_memory'] / 1e6:.0f}",
}


@dataclass(frozen=True)
class Setting:
    """One task at one size; tokens of prompt and MLLM already divided."""

    task: str
    width: int
    height: int
    num_frames: int
    steps: int
    repetitions: int

    @property
    def name(self) -> str:
        """Such as `t2i 240x240`."""
        return f"{self.task} {self.width}x{self.height}" + (f"x{self.num_frames}" if self.num_frames > 1 else "")


CPU_SETTINGS = (Setting("t2i", 240, 240, 1, 6, 5), Setting("v2v", 320, 192, 17, 2, 3))
GPU_SETTINGS = (
    Setting("t2i", 480, 480, 1, 20, 5),
    Setting("v2v", 640, 352, 17, 10, 5),
    Setting("t2v", 832, 480, 17, 10, 3),
    Setting("t2v", 832, 480, 81, 4, 3),
)


def settings() -> tuple[int, tuple[Setting, ...]]:
    """What fits this machine: the divisor of all sizes, and the settings."""
    return (1, GPU_SETTINGS) if torch.cuda.is_available() else (4, CPU_SETTINGS)


def measure(progress: Progress) -> list[dict[str, Any]]:
    """One row per setting."""
    divisor, cases = settings()
    device = "cuda" if divisor == 1 else "cpu"
    pipe = pipeline(divisor).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    rows = []
    for case in cases:
        progress.console.print(f"sampling {case.name} ({case.steps} steps, {case.repetitions} repetitions) ...")
        ours, plain = paths(pipe, case, divisor)
        wanted = plain()
        difference = float((ours() - wanted).norm() / wanted.norm())
        timings = interleaved({"plain": plain, "ours": ours}, case.repetitions, progress)
        inside, total = _decoder_share(pipe, ours)
        row = {
            "setting": case.name,
            "steps": case.steps,
            "device": device,
            "plain": timings["plain"].to_dict(),
            "ours": timings["ours"].to_dict(),
            "ratio": timings["ours"].median / timings["plain"].median,
            "processor_ratio": timings["ours"].processor / timings["plain"].processor,
            "difference": difference,
            "overhead": total / inside - 1,
        }
        if device == "cpu":
            for name in ("plain", "ours"):
                row[f"{name}_memory"] = in_own_process(peak_memory, case, divisor, name)["bytes"]
        else:
            for name, path in (("plain", plain), ("ours", ours)):
                torch.cuda.reset_peak_memory_stats()
                path()
                row[f"{name}_memory"] = torch.cuda.max_memory_allocated()
        rows.append(row)
        collect()
    return rows


def peak_memory(case: Setting, divisor: int, name: str) -> dict[str, int]:
    """Bytes that one call takes beyond the weights, from a fresh process."""
    torch.set_num_threads(1)
    pipe = pipeline(divisor)
    path = dict(zip(("ours", "plain"), paths(pipe, case, divisor), strict=True))[name]
    before = resident()
    path()
    return {"bytes": peak_resident() - before}


def paths(pipe: OmniVideoPipeline, case: Setting, divisor: int) -> tuple[Any, Any]:
    """The pipeline's call and upstream's loop on the same inputs, as functions without arguments."""
    inputs = _inputs(pipe, case, divisor)
    plain_path = PlainPath(pipe.mllm.vision_head, pipe.adapter, pipe.transformer)
    task = get_task(case.task)

    def ours() -> torch.Tensor:
        size = {} if task.keeps_size else {"height": case.height, "width": case.width}
        return pipe(
            task=case.task,
            **inputs,
            **size,
            num_frames=None if task.keeps_size else case.num_frames,
            num_inference_steps=case.steps,
            guidance_scale=GUIDANCE_SCALE,
            output_type="latent",
        ).frames

    def plain() -> torch.Tensor:
        scheduler = pipe.prepare_scheduler(case.steps, 5.0, pipe.device)
        return plain_path.sample(
            inputs["latents"],
            scheduler,
            inputs["mllm_hidden_states"],
            inputs["prompt_embeds"],
            inputs["source_latents"],
            task.output,
            GUIDANCE_SCALE,
        )

    return ours, plain


def _inputs(pipe: OmniVideoPipeline, case: Setting, divisor: int) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    frames = pipe.grid.latent_frames(case.num_frames)
    shape = (1, 16, frames, case.height // pipe.grid.spatial, case.width // pipe.grid.spatial)
    width, device = pipe.adapter.config.hidden_size, pipe.device

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    is_edit = get_task(case.task).source is not None
    mllm_width = pipe.mllm.config.vision_head_config.mllm_hidden_size
    return {
        "latents": draw(*shape),
        "source_latents": draw(*shape) if is_edit else None,
        "prompt_embeds": draw(1, 60 // divisor, width).to(pipe.adapter.dtype),
        "mllm_hidden_states": draw(1, (164 + 196 * is_edit) // divisor, mllm_width),
    }


def _decoder_share(pipe: OmniVideoPipeline, call: Any) -> tuple[float, float]:
    """Seconds inside the decoder and of the whole sampling loop, from the same call."""
    inside, started = [], []

    def begin(*_: object) -> None:
        synchronize()
        started.append(time.perf_counter())

    def end(*_: object) -> None:
        synchronize()
        inside.append(time.perf_counter() - started[-1])

    loop: dict[str, float] = {}
    denoise = type(pipe).denoise

    class Timed(type(pipe)):
        """The same pipeline with a clock around its loop."""

        def denoise(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            start = time.perf_counter()
            latents = denoise(self, *args, **kwargs)
            synchronize()
            loop["seconds"] = time.perf_counter() - start
            return latents

    hooks = [pipe.transformer.register_forward_pre_hook(begin), pipe.transformer.register_forward_hook(end)]
    own, pipe.__class__ = pipe.__class__, Timed
    try:
        call()
    finally:
        pipe.__class__ = own
        for hook in hooks:
            hook.remove()
    return sum(inside), loop["seconds"]
