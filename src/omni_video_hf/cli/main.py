"""The `omni-video` command: its flags. What a command does is imported when it runs."""

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
from . import evaluate as shapes_cli
from . import train as training_cli
from .checks import (
    SHAPES,
    Drawing,
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
    """How weights are kept off the device while they are not needed."""

    model = "model"
    group = "group"
    sequential = "sequential"


# The names of `PROFILES` in `pipelines.memory.profiles`, which needs torch.
Memory = StrEnum("Memory", {"24GB": "24GB", "16GB": "16GB", "12GB": "12GB", "8GB": "8GB"})
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Folder or Hub repository.", envvar="OMNI_VIDEO_MODEL", show_default=CHECKPOINT_NAME
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="File to write: .mp4, or .png .jpg .webp. Several results are numbered: fox.mp4, fox-1.mp4 ...",
    ),
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="As stored by default.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu ...; the best there is by default.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the noise and of sampled answers; a new one by default.")]
Count = Annotated[int, typer.Option("--count", "-n", min=1, help="Results of each prompt, of one seed after another.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="uncond + scale * (cond - uncond); 1 turns guidance off.")]
FlowShift = Annotated[float | None, typer.Option(help="Shift of the sigmas towards noise.")]
Size = Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels, e.g. 832x480.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Number of frames, 4n+1.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the output; a source video is resampled.")]
NegativePrompt = Annotated[str | None, typer.Option(help="The checkpoint's stored one by default.")]
MaxContextLength = Annotated[int | None, typer.Option(min=1, help="Raise the limit of context tokens.")]
Offload = Annotated[CpuOffload | None, typer.Option("--cpu-offload", help="Keep idle weights in main memory.")]
MemoryOption = Annotated[
    Memory | None,
    typer.Option("--memory", help="Format, quantisation, offloading for an accelerator of this size."),
]
AttentionBackend = Annotated[str | None, typer.Option(help="A diffusers attention backend, e.g. flash, sage.")]
Lora = Annotated[str | None, typer.Option(help="LoRA file or repository, or JSON arguments of load_lora_weights.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a result, on a line of its own.")]


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
        list[str] | None, typer.Argument(help="What to draw; several texts, or - for the lines of stdin.")
    ] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts-file", metavar="FILE", help="Prompts, one a line; - for stdin.")
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
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """
    Draw videos or images from text.

    The suffix of --output says which of the two; without --output the model decides, and may answer in text. Without
    --output files are called output.mp4 or output.png, then output-1.mp4 and so on: nothing is replaced.
    """
    with one_line_errors(verbose, light=True):
        loading = Loading(model, dtype, device, cpu_offload, memory, attention_backend, lora, revision, token)
        drawing = Drawing(
            size=size, frames=frames, fps=fps, steps=steps, guidance_scale=guidance_scale, flow_shift=flow_shift,
            seed=seed, count=count, negative_prompt=negative_prompt,
        )  # fmt: skip
        drawing.check_format(output)
        task = None if output is None else find_task(None, output_kind(output))
        prompts = read_prompts(prompt, prompts_file)
        outputs = planned_outputs(output, len(prompts) * count, overwrite)
        with outputs[0]:
            work = _generation(verbose, quiet)
            work.generate(prompts, outputs, task, loading, drawing, work.Printing(quiet, as_json))


@app.command()
def edit(
    source: Annotated[list[str], typer.Argument(help="Video or image to edit: file or URL, or several.")],
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
    count: Count = 1,
    dtype: DtypeOption = None,
    device: Device = None,
    cpu_offload: Offload = None,
    memory: MemoryOption = None,
    attention_backend: AttentionBackend = None,
    lora: Lora = None,
    revision: Revision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """
    Edit videos or images by instruction.

    Size, frame rate and length stay those of the source unless told otherwise. With --frames alone, that many frames
    are taken evenly from the whole clip; with --fps as well, from its start. Several sources are edited one after the
    other by the same instruction.
    """
    with one_line_errors(verbose, light=True):
        loading = Loading(model, dtype, device, cpu_offload, memory, attention_backend, lora, revision, token)
        drawing = Drawing(
            size=size, frames=frames, fps=fps, steps=steps, guidance_scale=guidance_scale, flow_shift=flow_shift,
            max_context_length=max_context_length, seed=seed, count=count, negative_prompt=negative_prompt,
        )  # fmt: skip
        drawing.check_format(output)
        check_text("INSTRUCTION", instruction)
        kind = None if output is None else output_kind(output)
        check_sources(source)
        outputs = planned_outputs(output, len(source) * count, overwrite)
        with outputs[0]:
            work = _generation(verbose, quiet)
            work.edit(source, instruction, outputs, kind, loading, drawing, work.Printing(quiet, as_json))


@app.command()
def ask(
    source: Annotated[list[str], typer.Argument(help="Video or image to ask about: file or URL, or several.")],
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
    quiet: Quiet = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Answer a question about videos or images; each answer comes behind its source's name where there are several."""
    with one_line_errors(verbose, light=True):
        loading = Loading(model, dtype, device, cpu_offload, memory, None, lora, revision, token)
        Drawing(seed=seed)
        check_text("QUESTION", question)
        check_sources(source)
        work = _generation(verbose, quiet)
        work.ask(source, question, max_new_tokens, seed, loading, work.Printing(quiet, as_json))


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(metavar="REPO_OR_FILE", help="Folder or Hub repository; or a generated video or image.")
    ] = CHECKPOINT_NAME,
    revision: Revision = None,
    token: Token = None,
    memory: Annotated[bool, typer.Option("--memory", help="What every memory profile needs, instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """
    Show the parts of a repository, or the memory it needs, from its headers alone: nothing is loaded.

    Of a file that `generate` or `edit` wrote: prompt, seed, settings, model and revision.
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
    Train from a recipe. Any setting can be overridden: --learning_rate 1e-5 --losses.alignment squared_l2.

    Run it under `accelerate launch` for several GPUs; see docs/training.md.
    """
    with one_line_errors(verbose):
        folder = training_cli.train(config, [*context.args, *(["--resume"] if resume else [])])
        if folder is not None:
            result(str(folder))


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
    with one_line_errors(verbose, light=True):
        if not is_repository_name(target):
            raise UsageProblem(f"`{target}` must be a Hub repository, `owner/name`.")
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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A repository, or a folder with a LoRA.")],
    name: Annotated[str, typer.Argument(metavar="REPO", help="What it is called on the Hub, `owner/name`.")],
    base: Annotated[str | None, typer.Option(help="Hub repository it was made from.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write the model card of a folder, from what is known about it. A card that a person edited stays as it is."""
    with one_line_errors(verbose, light=True):
        if not folder.is_dir():
            raise UsageProblem(f"{folder}: is not a folder.")
        start_libraries(verbose)
        if not import_module("..hub.model_card", __package__).write_model_card(folder, name, base):
            raise ValueError(f"{folder / 'README.md'}: was written or edited by a person; move it away for a new one.")
        result(str(folder / "README.md"))


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
    with one_line_errors(verbose, light=True):
        loading = Loading(model, dtype, device, revision=revision, token=token)
        work = _generation(verbose)
        shapes_cli.check(line, output)
        work.check_device(loading)
        pipe = work.load(loading)
        shapes_cli.evaluate(pipe, count, seed, batch_size, steps, line, output)


app.command("precompute")(data_cli.precompute_command)
app.command("import-features")(data_cli.import_features_command)


def _generation(verbose: bool, quiet: bool = False) -> ModuleType:
    """What draws, edits and answers; importing it takes seconds."""
    start_libraries(verbose, quiet)
    return import_module(".generation", __package__)


def run() -> int:
    """Run the command of `sys.argv`; returns its exit code. Nothing that it prints has access tokens in it."""
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
