"""The `omni-video` command: commands and their flags. The code that does the work is imported when a command runs."""

import json
import sys
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from ..hub.remote_code import __version__
from ..shapes import CHECKPOINT_NAME
from ..tasks import find_task
from ..utils.masking import MaskedStream, mask_tokens
from ..utils.names import is_repository_name
from . import data as data_cli
from . import demo as demo_cli
from . import evaluate as shapes_cli
from . import train as training_cli
from .checks import (
    SHAPES,
    ClipOptions,
    GenerationOptions,
    Loading,
    check_repository,
    check_sources,
    check_text,
    place_of,
    read_prompts,
)
from .console import USAGE, UsageProblem, console, one_line_errors, print_error, result, start_libraries
from .options import Dtype, Revision, Token, Verbose
from .output import output_kind, planned_outputs

app = typer.Typer(
    help="Generate, edit and understand videos and images with Omni-Video.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluations = typer.Typer(help="Measure a checkpoint.", no_args_is_help=True)
app.add_typer(evaluations, name="eval")


class CpuOffload(StrEnum):
    """How diffusers moves weights between main memory and the device."""

    model = "model"
    group = "group"
    sequential = "sequential"


# The names of `PROFILES` in `pipelines.memory.profiles`, which needs torch.
Memory = StrEnum("Memory", {"24GB": "24GB", "16GB": "16GB", "12GB": "12GB", "8GB": "8GB"})
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Folder of a model, or its Hub repository.",
        envvar="OMNI_VIDEO_MODEL",
        show_default=CHECKPOINT_NAME,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Video: .mp4 .mov .mkv .webm .gif, %04d.png for PNG files; image: .png .jpg .webp. "
        "Several results are numbered: fox.mp4, fox-1.mp4 ...",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Dtype of the weights. Default: as stored; the VAE, and on a CPU also the decoder, in float32."),
]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu ... Default: cuda, else mps, else cpu.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the noise and of sampled answers. Default: a random seed.")]
Count = Annotated[
    int, typer.Option("--count", "-n", min=1, help="Results per prompt or source, with seeds seed, seed+1 ...")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Number of denoising steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="uncond + scale * (cond - uncond); 1 turns guidance off.")]
SourceGuidanceScale = Annotated[
    float | None,
    typer.Option(help="Above 1, the result stays closer to the source; for models trained with source dropout."),
]
FlowShift = Annotated[float | None, typer.Option(help="Shift of the sigmas; above 1, more steps are at high noise.")]
SourceConditioning = StrEnum("SourceConditioning", {"both": "both", "channels": "channels"})
Size = Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels, e.g. 832x480.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Number of frames, 4n+1.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the output; a source video is resampled to it.")]
NegativePrompt = Annotated[
    str | None, typer.Option(help="Negative prompt. Default: the one stored in the checkpoint.")
]
MaxContextLength = Annotated[
    int | None, typer.Option(min=1, help="Raise the limit of context tokens, for larger or longer sources.")
]
Offload = Annotated[
    CpuOffload | None, typer.Option("--cpu-offload", help="Keep weights that are not in use in main memory.")
]
MemoryOption = Annotated[
    Memory | None,
    typer.Option("--memory", help="Choose dtype, quantisation and offloading for an accelerator of this size."),
]
AttentionBackend = Annotated[str | None, typer.Option(help="Attention backend of diffusers, e.g. flash, sage.")]
Lora = Annotated[str | None, typer.Option(help="LoRA file or repository, or JSON arguments of load_lora_weights.")]
Start = Annotated[
    str | None, typer.Option(metavar="TIME", help="Start of the part to edit, in seconds or mm:ss. Default: 0.")
]
Duration = Annotated[
    str | None, typer.Option(metavar="TIME", help="Length of the part, in seconds or mm:ss. Default: to the end.")
]
LongVideo = StrEnum("LongVideo", {"auto": "auto", "windows": "windows", "chunks": "chunks", "off": "off"})
LongVideoOption = Annotated[
    LongVideo,
    typer.Option(help="How a clip longer than the training is edited: windows denoised together, chunks, or off."),
]
WindowFrames = Annotated[int | None, typer.Option(min=1, help="Frames of a window, 4n+1. Default: as in training.")]
WindowOverlap = Annotated[int | None, typer.Option(min=1, help="Frames that two windows share, a multiple of 4.")]
CodecOption = Annotated[
    str | None, typer.Option("--codec", help="h264, hevc, av1, vp9, prores, as the format takes. Default: h264, vp9.")
]
Quality = Annotated[
    float | None,
    typer.Option(help="Quality of the video file, 0 to 100, the largest. Default: 65, CRF 18 of H.264."),
]
ResumeSteps = Annotated[
    bool,
    typer.Option(
        "--resume", help="Keep finished steps in OUTPUT.partial/, and go on from them after an interruption."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print every result as a JSON object on one line.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        result(f"omni-video {__version__}")
        raise typer.Exit


@app.callback()
def omni_video(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generate, edit and understand videos and images with Omni-Video."""


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts. `-` reads them from stdin, one per line.")
    ] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts-file", metavar="FILE", help="File with one prompt per line; - for stdin.")
    ] = None,
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
    count: Count = 1,
    dtype: DtypeOption = None,
    device: Device = None,
    cpu_offload: Offload = None,
    memory: MemoryOption = None,
    attention_backend: AttentionBackend = None,
    lora: Lora = None,
    revision: Revision = None,
    token: Token = None,
    codec: CodecOption = None,
    quality: Quality = None,
    resume: ResumeSteps = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """
    Generate videos or images from text.

    The suffix of --output selects video or image. Without --output the model decides, and may answer in text; files
    are then named output.mp4 or output.png, and output-1.mp4 ... when the name is taken. No file is replaced.
    """
    with one_line_errors(verbose, light=True):
        loading = Loading(model, dtype, device, cpu_offload, memory, attention_backend, lora, revision, token)
        options = GenerationOptions(
            size=size, frames=frames, fps=fps, steps=steps, guidance_scale=guidance_scale, flow_shift=flow_shift,
            seed=seed, count=count, negative_prompt=negative_prompt,
        )  # fmt: skip
        clip = ClipOptions(codec=codec, quality=quality, resume=resume)
        options.check_format(output)
        task = None if output is None else find_task(None, output_kind(output))
        prompts = read_prompts(prompt, prompts_file)
        clip.check_resume(output, len(prompts) * count)
        outputs = planned_outputs(output, len(prompts) * count, overwrite)
        with outputs[0]:
            work = _generation(verbose, quiet)
            work.generate(prompts, outputs, task, loading, options, work.Printing(quiet, as_json), clip)


@app.command()
def edit(
    source: Annotated[list[str], typer.Argument(help="Files or URLs of the videos or images to edit.")],
    instruction: Annotated[str, typer.Argument(help="What to change in them.")],
    model: Model = SHAPES,
    output: Output = None,
    negative_prompt: NegativePrompt = None,
    size: Size = None,
    frames: Frames = None,
    fps: Fps = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    source_guidance_scale: SourceGuidanceScale = None,
    flow_shift: FlowShift = None,
    max_context_length: MaxContextLength = None,
    start: Start = None,
    duration: Duration = None,
    long_video: LongVideoOption = LongVideo.auto,
    window_frames: WindowFrames = None,
    window_overlap: WindowOverlap = None,
    seed: Seed = None,
    count: Count = 1,
    dtype: DtypeOption = None,
    device: Device = None,
    cpu_offload: Offload = None,
    memory: MemoryOption = None,
    attention_backend: AttentionBackend = None,
    lora: Lora = None,
    revision: Revision = None,
    token: Token = None,
    codec: CodecOption = None,
    quality: Quality = None,
    resume: ResumeSteps = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """
    Edit videos or images by instruction.

    The whole clip is edited: the result has the size, all frames with their times, the colours and the sound of its
    source. A clip that is longer than those of the training is edited in windows. --start and --duration choose a
    part. --frames alone takes that many frames at equal distances from the whole video, without sound; --frames with
    --fps takes them from its start, at that rate. Several sources are edited one after the other with the same
    instruction.
    """
    with one_line_errors(verbose, light=True):
        loading = Loading(model, dtype, device, cpu_offload, memory, attention_backend, lora, revision, token)
        options = GenerationOptions(
            size=size, frames=frames, fps=fps, steps=steps, guidance_scale=guidance_scale, flow_shift=flow_shift,
            max_context_length=max_context_length, seed=seed, count=count, negative_prompt=negative_prompt,
            source_guidance_scale=source_guidance_scale,
        )  # fmt: skip
        clip = ClipOptions(start, duration, long_video.value, window_frames, window_overlap, codec, quality, resume)
        options.check_format(output)
        check_text("INSTRUCTION", instruction)
        # A .webp is an image or an animation, as its source.
        kind = None if output is None or output.suffix.lower() == ".webp" else output_kind(output)
        check_sources(source)
        clip.check_resume(output, len(source) * count)
        outputs = planned_outputs(output, len(source) * count, overwrite)
        with outputs[0]:
            work = _generation(verbose, quiet)
            work.edit(source, instruction, outputs, kind, loading, options, work.Printing(quiet, as_json), clip)


@app.command()
def ask(
    source: Annotated[list[str], typer.Argument(help="Files or URLs of the videos or images to ask about.")],
    question: Annotated[str, typer.Argument(help="The question to answer.")],
    model: Model = SHAPES,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 512,
    seed: Seed = None,
    dtype: DtypeOption = None,
    device: Device = None,
    cpu_offload: Offload = None,
    memory: MemoryOption = None,
    lora: Lora = None,
    revision: Revision = None,
    token: Token = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Answer a question about videos or images. With several sources, each answer follows the name of its source."""
    with one_line_errors(verbose, light=True):
        loading = Loading(model, dtype, device, cpu_offload, memory, None, lora, revision, token)
        GenerationOptions(seed=seed)
        check_text("QUESTION", question)
        check_sources(source)
        work = _generation(verbose, quiet)
        work.ask(source, question, max_new_tokens, seed, loading, work.Printing(quiet, as_json))


@app.command()
def info(
    model: Annotated[
        str,
        typer.Argument(metavar="REPO_OR_FILE", help="Folder or Hub repository of a model, or a generated file."),
    ] = CHECKPOINT_NAME,
    revision: Revision = None,
    token: Token = None,
    memory: Annotated[bool, typer.Option("--memory", help="Show how much memory every profile needs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """
    Show the components of a repository, the memory it needs, or how a file was generated.

    Only headers of the weights are read; nothing is loaded. For a file that `generate` or `edit` wrote, the command
    shows its prompt, seed, settings, model and revision.
    """
    with one_line_errors(verbose, light=True):
        work = import_module("..hub.inspection", __package__)
        if Path(model).is_file():
            content = import_module("..media.record", __package__).read_media_record(model)
            table = None if as_json else work.record_table(content, title=model)
        else:
            check_repository(model)
            place = place_of(model)
            if memory:
                headers = work.repository_headers(place, revision=revision, token=token)
                tables = import_module("..pipelines.memory.table", __package__)
                content = tables.memory_rows(headers)
                table = None if as_json else tables.memory_table(headers, title=model)
            else:
                parts = work.repository_parts(place, revision=revision, token=token)
                content = [part.to_dict() for part in parts]
                table = None if as_json else work.repository_table(parts, title=model)
        if as_json:
            result(json.dumps(content, indent=2))
        else:
            import_module("rich.console").Console().print(table)


@app.command(cls=training_cli.TrainCommand, context_settings=training_cli.CONTEXT)
def train(
    context: typer.Context,
    config: training_cli.Config = None,
    resume: training_cli.Resume = False,
    verbose: Verbose = False,
) -> None:
    """
    Train with a recipe. Any setting can be overridden: --learning_rate 1e-5 --losses.alignment squared_l2.

    Start it with `accelerate launch` to use several GPUs; see docs/training.md.
    """
    with one_line_errors(verbose):
        folder = training_cli.train(config, [*context.args, *(["--resume"] if resume else [])])
        if folder is not None:
            result(str(folder))


@app.command()
def push(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_REPO", help="Folder to push, or Hub repository to copy.")],
    target: Annotated[str, typer.Argument(help="Hub repository, `owner/name`; created if it does not exist.")],
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch of the target; created if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Title of the commit or pull request.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Repository from which missing components are taken, such as the VAE.")
    ] = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Push a repository or a LoRA to the Hub, in one commit.

    After an interruption run the same command again: files that were uploaded already are not sent again.
    """
    with one_line_errors(verbose, light=True):
        if not is_repository_name(target):
            raise UsageProblem(f"`TARGET` must be a Hub repository, `owner/name`, got {target}.")
        check_repository(source)
        start_libraries(verbose)
        publishing = import_module("..hub.push", __package__)
        folder = Path(place_of(source))
        if not folder.is_dir():
            folder = Path(import_module("huggingface_hub").snapshot_download(source, token=token))
        _, left_out = publishing.repository_files(folder)
        if left_out:
            console().print(f"left out: {', '.join(left_out)}", markup=False)
        options = {"private": private, "revision": revision, "create_pr": create_pr, "commit_message": message}
        missing_parts = import_module("..hub.repository", __package__).missing_parts
        if base is not None and (folder / "mllm").is_dir() and missing_parts(folder):
            commit = publishing.push_completed(folder, target, base, token=token, **options)
        else:
            base_model = base or (None if folder == Path(place_of(source)) else source)
            commit = publishing.push_repository(folder, target, base_model=base_model, token=token, **options)
        result(commit.pr_url or commit.commit_url)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a model or of a LoRA.")],
    name: Annotated[str, typer.Argument(metavar="REPO", help="Its name on the Hub, `owner/name`.")],
    base: Annotated[str | None, typer.Option(help="Hub repository of the base model.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write the model card of a folder from the folder's files. A card that a person edited is not replaced."""
    with one_line_errors(verbose, light=True):
        if not folder.is_dir():
            raise UsageProblem(f"`DIR` must be an existing folder, got {folder}.")
        start_libraries(verbose)
        if not import_module("..hub.model_card", __package__).write_model_card(folder, name, base):
            raise ValueError(
                f"{folder / 'README.md'}: this card was written or edited by a person. Move it away to get a new one."
            )
        result(str(folder / "README.md"))


@evaluations.command("shapes")
def evaluate_shapes(
    model: Model = SHAPES,
    count: shapes_cli.Count = 200,
    seed: shapes_cli.Seed = 0,
    batch_size: shapes_cli.BatchSize = 20,
    steps: Steps = None,
    line: shapes_cli.Lines = None,
    sources: shapes_cli.SourcesOption = shapes_cli.Sources.renderer,
    output: shapes_cli.Folder = None,
    device: Device = None,
    dtype: DtypeOption = None,
    revision: Revision = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Measure a checkpoint of Omni-Video Shapes: print a table with confidence intervals.

    --output also saves the table as JSON and generated examples as images. The results are judged by their pixels,
    without a learned model.
    """
    with one_line_errors(verbose, light=True):
        loading = Loading(model, dtype, device, revision=revision, token=token)
        work = _generation(verbose)
        shapes_cli.check(line, output, sources.value)
        work.check_device(loading)
        pipe = work.load(loading)
        shapes_cli.evaluate(pipe, count, seed, batch_size, steps, line, output, sources.value)


@app.command("add-source-channels")
def add_source_channels(
    model: Annotated[str, typer.Argument(metavar="REPO", help="Folder or Hub repository.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; it must not exist, or be empty.")],
    source_conditioning: Annotated[
        SourceConditioning,
        typer.Option(help="both: sources are tokens of the context as well. channels: they are channels alone."),
    ] = SourceConditioning.both,
    revision: Revision = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Copy a repository and let its decoder take sources as input channels, so that it can learn edits that keep places.

    The new weights are zero: with `both`, the copy generates what the original does until it is trained. The weight
    files are read and written one at a time.
    """
    with one_line_errors(verbose, light=True):
        check_repository(model)
        start_libraries(verbose)
        work = import_module("..hub.add_source_channels", __package__)
        result(str(work.add_source_channels_to(place_of(model), output, source_conditioning.value, revision, token)))


app.command("demo")(demo_cli.demo_command)
app.command("push-space")(demo_cli.push_space_command)
app.command("precompute")(data_cli.precompute_command)
app.command("import-features")(data_cli.import_features_command)


def _generation(verbose: bool, quiet: bool = False) -> ModuleType:
    """Import and return the module behind `generate`, `edit` and `ask`; importing it takes seconds."""
    start_libraries(verbose, quiet)
    return import_module(".generation", __package__)


def run() -> int:
    """Run the command of `sys.argv` and return its exit code. Access tokens are masked in everything it prints."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(MaskedStream, streams)
    try:
        return typer.main.get_command(app)(standalone_mode=False) or 0
    except typer.Abort:
        print_error("aborted")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            result(error.format_message())
            return USAGE
        path = getattr(error.ctx, "command_path", "omni-video") if hasattr(error, "ctx") else "omni-video"
        print_error(f"{' '.join(mask_tokens(error.format_message()).split())} Try `{path} --help`.")
        return USAGE
    finally:
        sys.stdout, sys.stderr = streams


def main() -> None:
    """Entry point of the console script; see `__main__`."""
    import_module("..__main__", __package__).main()


if __name__ == "__main__":
    main()
