"""The work of `generate`, `edit` and `ask`: check the request, load the pipeline, run it, write files."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from ..hub.remote_code import __version__
from ..hub.repository import check_finished
from ..media.images import save_image
from ..media.video_loading import open_media
from ..media.video_reader import check_pyav
from ..media.video_writer import save_video
from ..models.connectors import OmniVideoAdapter
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..pipelines.shared.output import OmniVideoPipelineOutput
from ..shapes import CHECKPOINT_NAME
from ..tasks import find_task
from ..utils.masking import mask_tokens
from ..utils.modules import dtype_of
from .checks import SHAPES, GenerationOptions, Loading
from .console import UsageProblem, as_usage, console, note, result
from .output import OutputFile
from .preflight import Outline

SEEDS = 2**32  # random seeds lie below this number, so that they are short to type


@dataclass(frozen=True)
class Printing:
    """How results are printed: `quiet` omits notes, settings and progress; `as_json` prints one object per line."""

    quiet: bool = False
    as_json: bool = False


@dataclass(frozen=True)
class Job:
    """One call of the pipeline, and the file for its result."""

    prompt: str
    seed: int
    output: OutputFile
    media: dict[str, Any]
    source: str | None = None


def generate(
    prompts: Sequence[str], outputs: Sequence[OutputFile], task: str | None, loading: Loading,
    options: GenerationOptions, printing: Printing,
) -> None:  # fmt: skip
    """Generate one file for every prompt and seed."""
    outline = Outline.of(loading)
    negative = [] if options.negative_prompt is None else [options.negative_prompt]
    outline.check(task, [*prompts, *negative], options, {})
    seeds = _seeds(options)
    jobs = [
        Job(prompt, seed, output, {})
        for (prompt, seed), output in zip(((p, s) for p in prompts for s in seeds), outputs, strict=True)
    ]
    _run(jobs, task, outline, loading, options, printing)


def edit(
    sources: Sequence[str], instruction: str, outputs: Sequence[OutputFile], output_kind: str | None,
    loading: Loading, options: GenerationOptions, printing: Printing,
) -> None:  # fmt: skip
    """Edit every source with every seed."""
    outline = Outline.of(loading)
    texts = [instruction, *([] if options.negative_prompt is None else [options.negative_prompt])]
    opened = [dict([open_media(source)]) for source in sources]
    for source, media in zip(sources, opened, strict=True):
        kind = next(iter(media))
        if output_kind not in (None, kind):
            raise UsageProblem(
                f"`--output` has the suffix of {output_kind} files, but the source {source} is of kind {kind}, and an "
                f"edit keeps it: choose a suffix for {kind} files."
            )
        outline.check(_edit_task(media), texts, options, media)
    seeds = _seeds(options)
    jobs = [
        Job(instruction, seed, output, media, source)
        for (source, media, seed), output in zip(
            ((source, media, s) for source, media in zip(sources, opened, strict=True) for s in seeds),
            outputs,
            strict=True,
        )
    ]
    _run(jobs, None, outline, loading, options, printing)


def ask(
    sources: Sequence[str], question: str, max_new_tokens: int, seed: int | None, loading: Loading, printing: Printing
) -> None:
    """Answer one question about every source."""
    check_device(loading)
    opened = [dict([open_media(source)]) for source in sources]
    (seed,) = _seeds(GenerationOptions(seed=seed))
    pipe = load(loading, printing, answering_parts(loading))
    for source, media in zip(sources, opened, strict=True):
        options = {"task": find_task(None, "text"), "max_new_tokens": max_new_tokens, "generator": _generator(seed)}
        text = pipe(question, **media, **options).text[0]
        if not text and not printing.quiet:
            note("the answer of the model is empty.")
        if printing.as_json:
            result(json.dumps({"source": source, "question": question, "text": text, "seed": seed}))
        else:
            result(text if len(sources) == 1 else f"{source}: {text}")


def answering_parts(loading: Loading) -> dict[str, Any]:
    """
    Components for a pipeline that only answers: no text encoder, decoder and VAE, and an adapter without layers.

    A LoRA may belong to any component, so with one the pipeline is loaded as a whole.
    """
    if loading.lora is not None:
        return {}
    origin = {"revision": loading.revision, "token": loading.token}
    if Path(loading.place).is_dir():
        check_finished(loading.place)
    OmniVideoPipeline.load_config(loading.place, **origin)  # refuses what is no pipeline, as its loading does
    adapter = OmniVideoAdapter.load_config(loading.place, subfolder="adapter", **origin)
    left_out = dict.fromkeys(("text_encoder", "tokenizer", "transformer", "vae"))
    return {**left_out, "adapter": OmniVideoAdapter.from_config(adapter, num_encoder_layers=0, num_decoder_layers=0)}


def load(loading: Loading, printing: Printing | None = None, parts: dict[str, Any] | None = None) -> OmniVideoPipeline:
    """
    Load the pipeline and place it on its device, with the LoRA, backend and offloading of the flags.

    Args:
        loading: the flags.
        printing: what is printed.
        parts: components that are given, see [`answering_parts`].
    """
    printing = printing or Printing()
    if loading.place == SHAPES and not printing.quiet:
        note(
            f"--model is not given, so {CHECKPOINT_NAME} is used. It generates one moving shape, such as"
            ' "a large red circle moving left on a black background".'
        )
    device = loading.device or _best_device()
    check_device(loading)
    arguments: dict[str, Any] = {} if loading.dtype is None else {"dtype": dtype_of(loading.dtype)}
    if loading.dtype is None and torch.device(device).type == "cpu":
        arguments = {"dtype": {"default": None}}  # as on a machine without an accelerator, also where there is one
    if loading.memory is not None:
        arguments |= {"memory": loading.memory, "memory_device": device}
    pipe = OmniVideoPipeline.from_pretrained(
        loading.place, revision=loading.revision, token=loading.token, **arguments, **(parts or {})
    )
    pipe.set_progress_bar_config(disable=printing.quiet)
    lora = loading.lora_arguments()
    if lora is not None:
        pipe.load_lora_weights(lora.pop("pretrained_model_name_or_path_or_dict"), **lora)
    if loading.attention_backend is not None:
        for decoder in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if decoder is not None:
                decoder.set_attention_backend(loading.attention_backend)
    if loading.memory is not None:
        return pipe
    if loading.cpu_offload is None:
        return pipe.to(device)
    if loading.cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif loading.cpu_offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    return pipe


def check_device(loading: Loading) -> None:
    """Refuse a device that does not exist or does not support the flags, before anything is loaded."""
    device = loading.device or _best_device()
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageProblem(f"`--device {device}` must be cuda, cuda:1, mps, cpu ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageProblem(f"`--device {device}`: this machine, or this build of torch, has no CUDA device.")
    for flag, choice in (("--cpu-offload", loading.cpu_offload), ("--memory", loading.memory)):
        if choice is not None and kind == "cpu":
            raise UsageProblem(
                f"`{flag} {choice}` needs an accelerator, but the device is {device}: leave `{flag}` out, or choose "
                "another `--device`."
            )


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _edit_task(media: dict[str, Any]) -> str:
    kind = "image" if "image" in media else "video"
    return find_task(kind, kind)


def _seeds(options: GenerationOptions) -> list[int]:
    """The seeds of the results of a prompt: consecutive numbers from `--seed`, or from a random number."""
    first = secrets.randbelow(SEEDS) if options.seed is None else options.seed
    return [first + number for number in range(options.count)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _run(
    jobs: Sequence[Job],
    task: str | None,
    outline: Outline,
    loading: Loading,
    options: GenerationOptions,
    printing: Printing,
) -> None:
    """Load the model, and run the jobs one by one. Files of finished jobs stay when a later job fails."""
    check_device(loading)
    if loading.attention_backend is not None:
        with as_usage():
            outline.pipe.transformer.set_attention_backend(loading.attention_backend)
    if any(job.output.kind != "image" for job in jobs):
        check_pyav()
    pipe = load(loading, printing)
    settings = options.settings()
    if options.max_context_length is not None:
        settings["max_context_length"] = options.max_context_length
    if options.source_guidance_scale is not None:
        settings["source_guidance_scale"] = options.source_guidance_scale
    for job in jobs:
        with job.output:
            job_task = _edit_task(job.media) if job.media else task
            output = pipe(job.prompt, **job.media, task=job_task, generator=_generator(job.seed), **settings)
            if output.text is not None:
                _print_answer(job, output.text[0], printing)
            else:
                _write(job, output, _record(job, output, loading, outline), printing)


def _record(job: Job, output: OmniVideoPipelineOutput, loading: Loading, outline: Outline) -> dict[str, Any]:
    """The record of how a file was generated, stored in the file: plain values, with access tokens masked."""
    settings = {name: value for name, value in output.settings.items() if value is not None}
    record = {
        "prompt": job.prompt,
        "seed": job.seed,
        "model": CHECKPOINT_NAME if loading.place == SHAPES else loading.model,
        "revision": outline.revision or loading.revision,
        "lora": loading.lora,
        "source": job.source and (job.source if "://" in job.source else Path(job.source).name),
        "settings": settings | {"seed": job.seed},
        "version": __version__,
    }
    record = {name: value for name, value in record.items() if value is not None}
    return json.loads(mask_tokens(json.dumps(record, default=str)))


def _write(job: Job, output: OmniVideoPipelineOutput, record: dict[str, Any], printing: Printing) -> None:
    """Write the file, then print its name, the settings and the notes."""
    frames = output.frames[0]

    def write(path: Path) -> None:
        if output.fps is None:
            save_image(frames[0], path, metadata=record)
        else:
            save_video(frames, path, fps=output.fps, metadata=record)

    path = job.output.write(write, "image" if output.fps is None else "video")
    notes = list(output.notes)
    if job.output.path is not None and path != job.output.path:
        notes.append(
            f"{job.output.path} was created by another process during the generation and is not replaced; the result "
            f"is in {path}."
        )
    if printing.as_json:
        result(json.dumps({"file": str(path), "task": output.task, "fps": output.fps, "notes": notes} | record))
        return
    if not printing.quiet:
        for text in notes:
            note(text)
        _print_settings(record["settings"])
    result(str(path))


def _print_answer(job: Job, text: str, printing: Printing) -> None:
    """Print a text that the model answered instead of generating a file."""
    if not text and not printing.quiet:
        note("the answer of the model is empty.")
    result(json.dumps({"prompt": job.prompt, "text": text, "seed": job.seed}) if printing.as_json else text)


def _print_settings(settings: dict[str, Any]) -> None:
    """Print every setting but the prompt as a table to stderr. Markup in values is printed literally."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in settings.items():
        if value is not None and name != "prompt":
            table.add_row(name, escape(str(value)))
    console().print(table, highlight=False)


__all__ = ["Printing", "ask", "check_device", "edit", "generate", "load"]
