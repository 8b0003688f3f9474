"""The `omni-video` command: generate, edit, ask; look into a repository, push it, write its card."""

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import diffusers
import torch
import transformers
import typer
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .hub import memory_rows, memory_table, repository_headers, repository_parts, repository_table
from .media_omni_video import open_media, save_image, save_video
from .memory_omni_video import PROFILES
from .model_card_omni_video import write_model_card
from .pipeline_omni_video import OmniVideoPipeline, OmniVideoPipelineOutput
from .publishing_omni_video import push_completed, push_repository, repository_files
from .repository_omni_video import missing_parts
from .settings_omni_video import SizeError
from .shapes import CHECKPOINT
from .shapes import cli as shapes_cli
from .training import cli as training_cli
from .training import data_cli

app = typer.Typer(
    help="Generate, edit and understand videos and images with Omni-Video.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluations = typer.Typer(help="Measure a checkpoint.", no_args_is_help=True)
app.add_typer(evaluations, name="eval")
console = Console(stderr=True)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4",)
EXIT_CODE = 2


class CpuOffload(StrEnum):
    """How weights are kept off the device while they are not needed."""

    model = "model"
    group = "group"
    sequential = "sequential"


class Dtype(StrEnum):
    """Number format of the weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Memory = StrEnum("Memory", {name: name for name in PROFILES})
SHAPES = str(CHECKPOINT)  # what there is to try without weights of one's own
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Folder or Hub repository.", envvar="OMNI_VIDEO_MODEL", show_default=CHECKPOINT.name
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write: .mp4, or .png .jpg .webp.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="As stored by default.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu ...; the best there is by default.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the noise and of sampled answers.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="uncond + scale * (cond - uncond); 1 turns guidance off.")]
FlowShift = Annotated[float | None, typer.Option(help="Shift of the sigmas towards noise.")]
Size = Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels, e.g. 832x480.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Number of frames, 4n+1.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the output; a source video is resampled.")]
NegativePrompt = Annotated[str | None, typer.Option(help="The checkpoint's stored one by default.")]
MaxContextLength = Annotated[int | None, typer.Option(help="Let a longer source in than the model was trained with.")]
Offload = Annotated[CpuOffload | None, typer.Option("--cpu-offload", help="Keep idle weights in main memory.")]
MemoryOption = Annotated[
    Memory | None,
    typer.Option("--memory", help="Format, quantisation, offloading for an accelerator of this size."),
]
AttentionBackend = Annotated[str | None, typer.Option(help="A diffusers attention backend, e.g. flash, sage.")]
Lora = Annotated[str | None, typer.Option(help="LoRA file or repository, or JSON arguments of load_lora_weights.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Token = Annotated[str | None, typer.Option(envvar="HF_TOKEN", show_envvar=False, help="Hub token.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show library messages, and the traceback of an error.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Model = SHAPES,
    output: Output = None,
    negative_prompt: NegativePrompt = None,
    size: Size = None,
    frames: Frames = None,
    fps: Fps = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    seed: Seed = None,
    dtype: DtypeOption = None,
    device: Device = None,
    cpu_offload: Offload = None,
    memory: MemoryOption = None,
    attention_backend: AttentionBackend = None,
    lora: Lora = None,
    revision: Revision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """
    Draw a video or an image from text.

    The suffix of --output says which of the two; without --output the model decides, and may answer in text.
    """
    with _one_line_errors(verbose):
        task = None
        if output is not None:
            task = "t2i" if _checked_output(output, overwrite) == "image" else "t2v"
        settings = _settings(size, frames, fps, steps, guidance_scale, flow_shift, seed, negative_prompt)
        pipe = _load(model, dtype, device, cpu_offload, memory, attention_backend, lora, revision, token)
        _finish(pipe(prompt, task=task, **settings), output, overwrite)


@app.command()
def edit(
    source: Annotated[str, typer.Argument(help="Video or image to edit: file or URL.")],
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    model: Model = SHAPES,
    output: Output = None,
    negative_prompt: NegativePrompt = None,
    size: Size = None,
    frames: Frames = None,
    fps: Fps = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    max_context_length: MaxContextLength = None,
    seed: Seed = None,
    dtype: DtypeOption = None,
    device: Device = None,
    cpu_offload: Offload = None,
    memory: MemoryOption = None,
    attention_backend: AttentionBackend = None,
    lora: Lora = None,
    revision: Revision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """
    Edit a video or an image by instruction.

    Size, frame rate and length stay those of the source unless told otherwise. With --frames alone, that many frames
    are taken evenly from the whole clip; with --fps as well, from its start.
    """
    with _one_line_errors(verbose):
        media = _open_source(source)
        kind = next(iter(media))
        if output is not None and _checked_output(output, overwrite) != kind:
            raise ValueError(f"`--output {output}` does not fit an edit of the {kind} {source}.")
        settings = _settings(size, frames, fps, steps, guidance_scale, flow_shift, seed, negative_prompt)
        pipe = _load(model, dtype, device, cpu_offload, memory, attention_backend, lora, revision, token)
        task = "i2i" if kind == "image" else "v2v"
        _finish(
            pipe(instruction, **media, task=task, max_context_length=max_context_length, **settings), output, overwrite
        )


@app.command()
def ask(
    source: Annotated[str, typer.Argument(help="Video or image to ask about: file or URL.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    model: Model = SHAPES,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Seed = None,
    dtype: DtypeOption = None,
    device: Device = None,
    cpu_offload: Offload = None,
    memory: MemoryOption = None,
    lora: Lora = None,
    revision: Revision = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """Answer a question about a video or an image."""
    with _one_line_errors(verbose):
        media = _open_source(source)
        pipe = _load(model, dtype, device, cpu_offload, memory, None, lora, revision, token)
        output = pipe(question, **media, task="understand", max_new_tokens=max_new_tokens, **_generator(seed))
        _finish(output)


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="REPO", help="Folder or Hub repository.")],
    revision: Revision = None,
    token: Token = None,
    memory: Annotated[bool, typer.Option("--memory", help="What every memory profile needs, instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show the parts of a repository, or the memory it needs, from its headers alone: nothing is loaded."""
    with _one_line_errors(verbose):
        _check_repository(model)
        if memory:
            headers = repository_headers(model, revision=revision, token=token)
            if as_json:
                Console().print_json(json.dumps(memory_rows(headers)))
            else:
                Console().print(memory_table(headers, title=model))
            return
        parts = repository_parts(model, revision=revision, token=token)
        out = Console()
        if as_json:
            out.print_json(json.dumps([part.to_dict() for part in parts]))
        else:
            out.print(repository_table(parts, title=model))


@app.command(context_settings=training_cli.CONTEXT)
def train(
    context: typer.Context, config: training_cli.Config, resume: training_cli.Resume = False, verbose: Verbose = False
) -> None:
    """
    Train from a recipe. Any setting can be overridden: --learning_rate 1e-5 --losses.alignment squared_l2.

    Run it under `accelerate launch` for several GPUs; see docs/training.md.
    """
    with _one_line_errors(verbose):
        folder = training_cli.train(config, [*context.args, *(["--resume"] if resume else [])])
        if folder is not None:
            print(folder)  # noqa: T201


@app.command()
def push(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_REPO", help="Folder, or Hub repository to copy.")],
    target: Annotated[str, typer.Argument(help="Hub repository, `owner/name`; created if need be.")],
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch of the target, created if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Title of the commit or pull request.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Repository to take what a saved model lacks from, such as its VAE.")
    ] = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Push a repository or a LoRA to the Hub, in one commit.

    Run it again after an interruption: what has arrived is not sent again.
    """
    with _one_line_errors(verbose):
        if target.count("/") != 1:
            raise ValueError(f"`{target}` must be a Hub repository, `owner/name`.")
        _check_repository(source)
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, token=token))
        _, left_out = repository_files(folder)
        if left_out:
            console.print(f"left out: {', '.join(left_out)}", markup=False)
        options = {"private": private, "revision": revision, "create_pr": create_pr, "commit_message": message}
        if base is not None and (folder / "mllm").is_dir() and missing_parts(folder):
            commit = push_completed(folder, target, base, token=token, **options)
        else:
            base_model = base or (None if Path(source).is_dir() else source)
            commit = push_repository(folder, target, base_model=base_model, token=token, **options)
        print(commit.pr_url or commit.commit_url)  # noqa: T201


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A repository, or a folder with a LoRA.")],
    name: Annotated[str, typer.Argument(metavar="REPO", help="What it is called on the Hub, `owner/name`.")],
    base: Annotated[str | None, typer.Option(help="Hub repository it was made from.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write the model card of a folder, from what is known about it. A card that a person edited stays as it is."""
    with _one_line_errors(verbose):
        if not folder.is_dir():
            raise ValueError(f"{folder}: is not a folder.")
        if not write_model_card(folder, name, base):
            raise ValueError(f"{folder / 'README.md'}: was written or edited by a person; move it away for a new one.")
        print(folder / "README.md")  # noqa: T201


@evaluations.command("shapes")
def evaluate_shapes(
    model: Model = SHAPES,
    count: shapes_cli.Count = 200,
    seed: shapes_cli.Seed = 0,
    batch_size: shapes_cli.BatchSize = 20,
    steps: Steps = None,
    line: shapes_cli.Lines = None,
    output: shapes_cli.Folder = None,
    device: Device = None,
    dtype: DtypeOption = None,
    revision: Revision = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Score a checkpoint of Omni-Video Shapes: a table with confidence intervals, as JSON and as pictures.

    A judge without any learned part reads what was drawn off its pixels.
    """
    with _one_line_errors(verbose):
        pipe = _load(model, dtype, device, None, None, None, None, revision, token)
        shapes_cli.evaluate(pipe, count, seed, batch_size, steps, line, output)


app.command("precompute")(data_cli.precompute_command)
app.command("import-features")(data_cli.import_features_command)


def main() -> None:
    """Entry point of the console script."""
    app()


# --- pieces ---------------------------------------------------------------------------------------------------------


class _one_line_errors:  # noqa: N801 - used as a function
    """Turn every error into one line on stderr and exit code 2; `verbose` keeps the traceback."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose

    def __enter__(self) -> None:
        logging.getLogger(__package__).setLevel(logging.INFO if self.verbose else logging.ERROR)
        transformers.logging.disable_progress_bar()  # diffusers' own shows the components
        for library in (transformers, diffusers):
            library.logging.set_verbosity_info() if self.verbose else library.logging.set_verbosity_error()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None or isinstance(error, (typer.Exit, typer.Abort, SystemExit)):
            return
        if self.verbose and not isinstance(error, KeyboardInterrupt):
            console.print_exception()
        _fail("interrupted" if isinstance(error, KeyboardInterrupt) else _one_line(error))


def _one_line(error: BaseException) -> str:
    message = error.for_command_line() if isinstance(error, SizeError) else str(error)
    text = " ".join(message.split()) or type(error).__name__
    return text if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: {text}"


def _fail(message: str) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(EXIT_CODE)


def _checked_output(output: Path, overwrite: bool) -> str:
    """Whether the output is an image or a video; refuses it before minutes are spent on it."""
    suffix = output.suffix.lower()
    if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        raise ValueError(
            f"`--output {output}`: the suffix must be one of {', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}."
        )
    if output.exists() and not overwrite:
        raise ValueError(f"`--output {output}` exists already: choose another name, or pass `--overwrite`.")
    if not output.parent.is_dir():
        raise ValueError(f"`--output {output}`: the folder {output.parent} does not exist.")
    return "image" if suffix in IMAGE_SUFFIXES else "video"


def _open_source(source: str) -> dict[str, Any]:
    """The source as the pipeline's `image` or `video`, told apart by what is in the file."""
    kind, media = open_media(source)
    return {kind: media}


def _load(
    model: str,
    dtype: Dtype | None,
    device: str | None,
    cpu_offload: CpuOffload | None,
    memory: Memory | None,
    attention_backend: str | None,
    lora: str | None,
    revision: str | None,
    token: str | None,
) -> OmniVideoPipeline:
    """The pipeline, on its device and set up as asked."""
    _check_repository(model)
    if model == SHAPES:
        console.print(
            f"[yellow]note:[/] without --model, {CHECKPOINT.name} draws and knows one shape, such as"
            ' "a large red circle moving left on a black background".',
            soft_wrap=True,
        )
    device = device or _best_device()
    _check_device(device, cpu_offload, memory)
    arguments: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype.value)}
    if memory is not None:
        arguments |= {"memory": memory.value, "memory_device": device}
    pipe = OmniVideoPipeline.from_pretrained(model, revision=revision, token=token, **arguments)
    if lora is not None and lora.endswith(".safetensors") and not Path(lora).is_file():
        raise ValueError(f"`--lora {lora}`: no such file.")
    if lora is not None:
        given = json.loads(lora) if lora.lstrip().startswith("{") else {"pretrained_model_name_or_path_or_dict": lora}
        pipe.load_lora_weights(given.pop("pretrained_model_name_or_path_or_dict", given.pop("path", None)), **given)
    if attention_backend is not None:
        pipe.transformer.set_attention_backend(attention_backend)
    if memory is not None:
        return pipe
    if cpu_offload is None:
        return pipe.to(device)
    if cpu_offload is CpuOffload.model:
        pipe.enable_model_cpu_offload(device=device)
    elif cpu_offload is CpuOffload.sequential:
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    return pipe


def _check_device(device: str, cpu_offload: CpuOffload | None, memory: Memory | None) -> None:
    """Refuse what the device cannot do, before anything is loaded."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"`--device {device}`: this machine, or this build of torch, has no CUDA device.")
    for flag, choice in (("--cpu-offload", cpu_offload), ("--memory", memory)):
        if choice is not None and device == "cpu":
            raise ValueError(f"`{flag} {choice.value}` needs an accelerator; the device is the CPU.")
    if memory is not None and cpu_offload is not None:
        raise ValueError(f"`--memory {memory.value}` chooses the offloading by itself: leave `--cpu-offload` out.")


def _check_repository(name: str) -> None:
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith(("/", "."))):
        raise ValueError(f"{name}: is neither a folder nor a Hub repository (`owner/name`).")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _settings(
    size: str | None,
    frames: int | None,
    fps: float | None,
    steps: int | None,
    guidance_scale: float | None,
    flow_shift: float | None,
    seed: int | None,
    negative_prompt: str | None,
) -> dict[str, Any]:
    """Arguments of the pipeline's call."""
    settings = {
        "num_frames": frames,
        "fps": fps,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "flow_shift": flow_shift,
        "negative_prompt": negative_prompt,
    }
    if size is not None:
        width, _, height = size.lower().partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise ValueError(f"`--size {size}` must be WIDTHxHEIGHT in pixels, such as 832x480.")
        settings |= {"width": int(width), "height": int(height)}
    return settings | _generator(seed)


def _generator(seed: int | None) -> dict[str, Any]:
    return {} if seed is None else {"generator": torch.Generator("cpu").manual_seed(seed)}


def _finish(output: OmniVideoPipelineOutput, path: Path | None = None, overwrite: bool = False) -> None:
    """Write the file and say what was done; an answer goes to stdout."""
    if output.text is not None:
        if not output.text[0]:
            console.print("[yellow]note:[/] the model ended its answer before the first word.")
        print(output.text[0])  # noqa: T201 - the answer is what the command is for
        return
    frames = output.frames[0]
    is_image = output.fps is None
    if path is None:
        path = Path(f"output.{'png' if is_image else 'mp4'}")
        _checked_output(path, overwrite)
    if is_image:
        save_image(frames[0], path)
    else:
        save_video(frames, path, fps=output.fps)
    for note in output.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in output.settings.items():
        if value is not None and name != "prompt":
            table.add_row(name, str(value))
    console.print(table)
    print(path)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
