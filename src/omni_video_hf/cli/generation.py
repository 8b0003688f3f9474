"""The work of `generate`, `edit` and `ask`: check the request, load the pipeline, run it, write files."""

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from rich.markup import escape
from rich.table import Table

from ..hub.remote_code import __version__
from ..hub.repository import check_finished
from ..media.download import MediaFile
from ..media.images import save_image
from ..media.video_loading import open_media
from ..media.video_reader import check_pyav
from ..media.video_writer import save_video
from ..media.writing.formats import codec_of, encoder_options
from ..media.writing.span import ClipSpan
from ..models.connectors import OmniVideoAdapter
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..pipelines.shared.output import OmniVideoPipelineOutput
from ..shapes import CHECKPOINT_NAME
from ..tasks import find_task
from ..utils.kept_steps import KeptSteps, fingerprint, kept_settings
from ..utils.masking import mask_tokens
from ..utils.modules import dtype_of
from .checks import SHAPES, ClipOptions, GenerationOptions, Loading
from .console import UsageProblem, as_usage, console, note, result
from .output import OutputFile
from .preflight import Outline, Windows

MOST_OPEN_FILES = 50  # sources that stay open between the checks and the work
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
    span: ClipSpan | None = None  # the part of a video that is edited as a whole
    windows: Windows | None = None
    writing: dict[str, Any] = field(default_factory=dict)  # codec and quality of a video file


def generate(
    prompts: Sequence[str], outputs: Sequence[OutputFile], task: str | None, loading: Loading,
    options: GenerationOptions, printing: Printing, clip: ClipOptions = ClipOptions(),
) -> None:  # fmt: skip
    """Generate one file for every prompt and seed."""
    _check_writing(outputs, clip)
    outline = Outline.of(loading)
    negative = [] if options.negative_prompt is None else [options.negative_prompt]
    outline.check(task, [*prompts, *negative], options, {})
    seeds = _seeds(options, outputs, clip)
    jobs = [
        Job(prompt, seed, output, {}, writing=clip.writing)
        for (prompt, seed), output in zip(((p, s) for p in prompts for s in seeds), outputs, strict=True)
    ]
    _run(jobs, task, outline, loading, options, printing, clip)


def edit(
    sources: Sequence[str], instruction: str, outputs: Sequence[OutputFile], output_kind: str | None,
    loading: Loading, options: GenerationOptions, printing: Printing, clip: ClipOptions = ClipOptions(),
) -> None:  # fmt: skip
    """Edit every source with every seed. Without `--frames`, a whole video, or the span of the flags, is edited."""
    _check_writing(outputs, clip)
    outline = Outline.of(loading)
    texts = [instruction, *([] if options.negative_prompt is None else [options.negative_prompt])]
    files = [MediaFile(source) for source in sources]
    opened = [dict([open_media(file)]) for file in files]
    plans = []
    for source, file, media in zip(sources, files, opened, strict=True):
        if len(files) > MOST_OPEN_FILES:
            file.close()
        kind = next(iter(media))
        if output_kind not in (None, kind):
            raise UsageProblem(
                f"`--output` has the suffix of {output_kind} files, but the source {source} is of kind {kind}, and an "
                f"edit keeps it: choose a suffix for {kind} files."
            )
        plans.append(_plan(source, media, outline, texts, options, clip))
    seeds = _seeds(options, outputs, clip)
    jobs = [
        Job(instruction, seed, output, media, source, *plan, clip.writing)
        for (source, media, plan, seed), output in zip(
            (
                (source, media, plan, s)
                for source, media, plan in zip(sources, opened, plans, strict=True)
                for s in seeds
            ),
            outputs,
            strict=True,
        )
    ]
    _run(jobs, None, outline, loading, options, printing, clip)


def _check_writing(outputs: Sequence[OutputFile], clip: ClipOptions) -> None:
    """Refuse a codec or quality that the format does not take; the message names the flag."""
    given = {name: value for name, value in clip.writing.items() if value is not None}
    path = outputs[0].path or Path("output.mp4")
    if not given:
        return
    if outputs[0].kind == "image" and path.suffix.lower() != ".webp":
        raise UsageProblem(f"`--{next(iter(given))}` is for videos, but {path} is an image: leave it out.")
    check_pyav()
    try:
        encoder_options(path, codec_of(path, clip.codec), clip.quality, None)
    except ValueError as error:
        raise UsageProblem(str(error).replace("`codec`", "`--codec`").replace("`quality`", "`--quality`")) from error


def _plan(
    source: str,
    media: dict[str, Any],
    outline: Outline,
    texts: list[str],
    options: GenerationOptions,
    clip: ClipOptions,
) -> tuple[ClipSpan | None, Windows | None]:
    """Choose the part of a source that is edited, and its windows; refuse what does not fit."""
    task = _edit_task(media)
    clip.check_with(options, source, next(iter(media)))
    if "image" in media or not outline.keeps_whole_clips:
        outline.check(task, texts, options, media)
        return None, None
    span = None
    if options.frames is None:
        try:
            span = ClipSpan.of(media["video"], *clip.span, options.fps)
        except ValueError as error:
            text = str(error).replace("`start`", "`--start`").replace("`duration`", "`--duration`")
            raise UsageProblem(text) from error
    count = options.frames if span is None else span.padded_length(outline.pipe.grid.temporal)
    windows = outline.choose_windows(task, count or 1, options, clip)
    outline.check(task, texts, options, media, None if span is None else count, windows.arguments)
    return span, windows


def ask(
    sources: Sequence[str], question: str, max_new_tokens: int, seed: int | None, loading: Loading, printing: Printing
) -> None:
    """Answer one question about every source."""
    check_device(loading)
    opened = [dict([open_media(MediaFile(source))]) for source in sources]
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

    A LoRA may belong to any component, so with one the pipeline is loaded as a whole, as is Omni-Video 2.
    """
    if loading.lora is not None:
        return {}
    origin = {"revision": loading.revision, "token": loading.token}
    if Path(loading.place).is_dir():
        check_finished(loading.place)
    OmniVideoPipeline.load_config(loading.place, **origin)  # refuses what is no pipeline, as its loading does
    if OmniVideoPipeline.class_of(loading.place, origin) is not OmniVideoPipeline:
        return {}
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


def _seeds(
    options: GenerationOptions, outputs: Sequence[OutputFile] = (), clip: ClipOptions | None = None
) -> list[int]:
    """The seeds of the results of a prompt: consecutive numbers from `--seed`, of kept steps, or random ones."""
    first = options.seed
    if first is None and clip is not None and clip.resume:
        first = kept_settings(_steps_folder(outputs[0])).get("seed")
    first = secrets.randbelow(SEEDS) if first is None else first
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
    clip: ClipOptions,
) -> None:
    """Load the model, and run the jobs one by one. Files of finished jobs stay when a later job fails."""
    check_device(loading)
    if loading.attention_backend is not None:
        with as_usage():
            outline.pipe.transformer.set_attention_backend(loading.attention_backend)
    if any(job.output.kind != "image" for job in jobs):
        check_pyav()
    steps = _kept_steps(jobs[0], loading, outline, options, clip) if clip.resume else None
    pipe = load(loading, printing)
    settings = options.settings()
    if options.max_context_length is not None:
        settings["max_context_length"] = options.max_context_length
    if options.source_guidance_scale is not None:
        settings["source_guidance_scale"] = options.source_guidance_scale
    for job in jobs:
        with job.output, nullcontext() if steps is None else steps.used():
            job_task = _edit_task(job.media) if job.media else task
            arguments = _arguments(job, settings, pipe, printing) | {"task": job_task}
            output = _call(pipe, job, arguments, steps, printing)
            if output.text is not None:
                _print_answer(job, output.text[0], printing)
            else:
                _write(pipe, job, output, _record(job, output, loading, outline), options, printing)


def _call(
    pipe: OmniVideoPipeline, job: Job, arguments: dict[str, Any], steps: KeptSteps | None, printing: Printing
) -> OmniVideoPipelineOutput:
    """Call the pipeline; with `steps`, go on from those that are kept, and keep every finished step."""
    generator = _generator(job.seed)
    if steps is None:
        return pipe(job.prompt, generator=generator, **arguments)
    if steps.found and not printing.quiet:
        note(f"{steps.found} finished steps are used from {steps.folder}.")

    def keep(*given: Any) -> dict[str, Any]:  # pipeline, step, timestep, tensors
        steps.end_step()
        return given[3]

    with steps.recording(pipe.transformer):
        return pipe(job.prompt, generator=generator, callback_on_step_end=keep, **arguments)


def _steps_folder(output: OutputFile) -> Path:
    return Path(f"{output.path}.partial")


def _kept_steps(
    job: Job, loading: Loading, outline: Outline, options: GenerationOptions, clip: ClipOptions
) -> KeptSteps:
    """The folder of steps beside the output, for exactly these settings."""
    place, lora = Path(loading.place), loading.lora_arguments()
    lora_file = None if lora is None else Path(lora["pretrained_model_name_or_path_or_dict"])
    file = job.media.get("video")
    picture = job.media.get("image")
    settings = {
        **asdict(options),
        **asdict(loading),
        "token": None,
        "model": str(place),
        "revision": outline.revision or loading.revision,
        "model files": fingerprint(place) if place.is_dir() else None,
        "LoRA files": fingerprint(lora_file) if lora_file is not None and lora_file.exists() else None,
        "device": loading.device or _best_device(),
        "prompt": job.prompt,
        "seed": job.seed,
        "source": None if file is None else fingerprint(file.path),
        "source image": hashlib.sha256(picture.tobytes()).hexdigest() if picture is not None else None,
        **{name: value for name, value in asdict(clip).items() if name not in ("codec", "quality", "resume")},
        "versions": [__version__, torch.__version__, diffusers.__version__, transformers.__version__],
    }
    steps = KeptSteps(_steps_folder(job.output), settings)
    with as_usage():
        steps.check()
    return steps


def _arguments(job: Job, settings: dict[str, Any], pipe: OmniVideoPipeline, printing: Printing) -> dict[str, Any]:
    """Arguments of the pipeline for a job; the frames of a span are decoded here."""
    windows = job.windows.arguments if job.windows is not None else {}
    if job.span is None:
        return {**job.media, **settings, **windows}
    step = pipe.grid.temporal
    count = len(job.span.numbers)
    if job.windows is not None and job.windows.count > 1:
        pipe.set_progress_bar_config(disable=printing.quiet, desc=f"{job.windows.count} windows")
        if not printing.quiet:
            note(
                f"{job.source}: {count} frames ({job.span.duration:.2f} s) are edited in {job.windows.count} "
                f"{job.windows.arguments['long_video']} of {job.windows.frames} frames, which overlap."
            )
    arguments = {"video": job.span.read(step), **settings, "num_frames": None, "fps": None, **windows}
    if hasattr(pipe, "decode_frames") and windows.get("long_video") != "chunks":
        arguments["output_type"] = "latent"  # frames are decoded on their way to the file, see `_frames`
    return arguments


def _frames(pipe: OmniVideoPipeline, output: OmniVideoPipelineOutput) -> Iterable[Any]:
    """The frames of the first video; latents are decoded piece by piece, so that memory does not grow with it."""
    if not isinstance(output.frames, torch.Tensor):
        return output.frames[0]
    decode: Any = getattr(pipe, "decode_frames", None)
    return (frame for piece in decode(output.frames[:1]) for frame in piece[0])


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
        "start": None if job.span is None else round(job.span.start, 6),
        "duration": None if job.span is None else round(job.span.duration, 6),
        "settings": settings | {"seed": job.seed},
        "version": __version__,
    }
    record = {name: value for name, value in record.items() if value is not None}
    return json.loads(mask_tokens(json.dumps(record, default=str)))


def _write(
    pipe: OmniVideoPipeline,
    job: Job,
    output: OmniVideoPipelineOutput,
    record: dict[str, Any],
    options: GenerationOptions,
    printing: Printing,
) -> None:
    """Write the file, then print its name, the settings and the notes."""
    written = list[str]()
    size = job.span.size if job.span is not None and options.size is None else None

    def write(path: Path) -> None:
        if output.fps is None:
            save_image(output.frames[0][0], path, metadata=record)
        elif job.span is not None:
            written[:] = job.span.write(_frames(pipe, output), path, record, size, **job.writing)
        else:
            save_video(output.frames[0], path, fps=output.fps, metadata=record, **job.writing)

    path = job.output.write(write, "image" if output.fps is None else "video")
    notes = [*output.notes, *written]
    found = output.settings.get("width"), output.settings.get("height")
    if size is not None and found != size:
        notes.append(f"The frames were resized from {found[0]}x{found[1]} back to the size of the source.")
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
