"""Converts upstream's `omni_ckpts` folder to a repository for transformers and diffusers."""

import json
import logging
import sys
import tempfile
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from diffusers import UniPCMultistepScheduler
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from transformers import AutoTokenizer

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline, OmniVideoProcessor
from omni_video_hf.hub.inspection import repository_parts, repository_table
from omni_video_hf.hub.repository import INDEX_NAME, finalize_repository
from omni_video_hf.pipelines.presets import PRESETS
from omni_video_hf.utils.files import write_text

from .components import (
    Component,
    adapter_component,
    check_files,
    check_widths,
    expected_tensors,
    grouped,
    load_component,
    mllm_component,
    text_encoder_component,
    transformer_component,
    vae_component,
)
from .original_checkpoint import (
    MARKERS,
    TEXT_ENCODER,
    TEXT_TOKENIZER,
    WAN_VAE,
    OriginalCheckpoint,
    read_tokenizer,
)
from .original_checkpoint_2 import find_layout
from .unfinished import Unfinished, alone, check_disk_space, fingerprint, forget
from .vila_settings import generation_token_notes, vila_processor, vila_tokenizer
from .wan_repository import find_wan, load_wan_component, wan_files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Parts that may come from a repository of Wan in diffusers' format: our folder -> upstream's file.
OPTIONAL = {"text_encoder": TEXT_ENCODER, "vae": WAN_VAE, "tokenizer": TEXT_TOKENIZER}
MAX_MAPPED_BYTES = 2**28
MAX_CONTEXT_LENGTH = 2560
console = Console(stderr=True)


def convert(
    original: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    max_context_length: int | None = None,
    wan_repo: str | None = None,
    with_markers: bool = True,
) -> None:
    """
    Convert upstream's checkpoint, one shard in memory at a time.

    Everything is checked before anything is written: every weight must be used, every one of ours be there, in its
    shape. `output` appears when it is complete; an interrupted run goes on where it stopped when started again.

    Args:
        original: upstream's `omni_ckpts`.
        output: folder to make; it must not exist or be empty.
        dtype: number format of the weights; as stored by default. Parts from `wan_repo` are copied as they are.
        max_shard_size: of each file of weights, such as `"5GB"`.
        max_context_length: tokens of the decoder's context; 2560 by default.
        wan_repo: folder or Hub repository of Wan in diffusers' format, for text encoder, tokenizer and VAE where
            `original` lacks them.
        with_markers: whether the context has marker embeddings; without, they are not looked for.

    Raises:
        ValueError: for anything in the checkpoint that is missing, left over, of another shape, damaged or unsafe.
    """
    check_output(output)
    checkpoint, max_context_length = OriginalCheckpoint(original), max_context_length or MAX_CONTEXT_LENGTH
    missing = [folder for folder, name in OPTIONAL.items() if not checkpoint.has(name)]
    if missing and wan_repo is None:
        raise ValueError(
            f"{original / OPTIONAL[missing[0]]}: is missing. Download it, or take {', '.join(missing)} from a "
            "repository of Wan in diffusers' format with `--wan-repo`."
        )
    if with_markers and not checkpoint.has(MARKERS):
        raise ValueError(f"{original / MARKERS}: is missing. `--without-markers` joins the parts of the context bare.")
    wan_source = find_wan(wan_repo, missing) if missing else None

    tokenizer = vila_tokenizer(checkpoint)
    made = [
        mllm_component(checkpoint, tokenizer),
        adapter_component(checkpoint, max_context_length, with_markers),
        transformer_component(checkpoint),
        vae_component(checkpoint),
        text_encoder_component(checkpoint),
    ]
    components = [component for component in made if component is not None]
    for component in components:
        check_component(component, checkpoint.root)
    models = {component.name: component.model for component in components}
    wan_models = {name: load_wan_component(name, wan_source) for name in missing if name != "tokenizer"}
    models |= wan_models
    check_widths(models)
    processor = vila_processor(checkpoint, models["mllm"].config.mllm_config, tokenizer)
    text_tokenizer = read_tokenizer(
        wan_source / "tokenizer" if "tokenizer" in missing else original / TEXT_TOKENIZER, "eos_token", "pad_token"
    )

    options = {
        "dtype": str(dtype),
        "shard": str(max_shard_size),
        "context": max_context_length,
        "wan": str(wan_source),
        "markers": with_markers,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    working = output.with_name(f"{output.name}.incomplete")
    with alone(output), Unfinished(working, fingerprint(original, options)) as unfinished:
        check_output(output)  # once more: another run may just have ended
        plans = {component.name: plan_shards(component, dtype, max_shard_size) for component in components}
        copied = [file for name in wan_models for file in wan_files(wan_source, name)]
        needed = sum(plan.metadata["total_size"] for plan in plans.values())
        check_disk_space(needed + sum(file.stat().st_size for file in copied), working)
        write_weights(components, plans, dtype, unfinished)
        for file in copied:
            unfinished.copy(file, working / file.parent.name / file.name)
        unfinished.add(lambda folder: write_the_rest(folder, models, processor, text_tokenizer))
        unfinished.claim(["config.json", "generation_config.json", INDEX_NAME])
        finalize_repository(working)
        verify(working, {name: plans[name].dtypes if name in plans else None for name in models})
        unfinished.finish(output)
    unread = checkpoint.unread_weights(name for component in components for name in component.load().files)
    notes = [f"{original / name} belongs to no part and was not read." for name in unread[:20]]
    report(components, notes + generation_token_notes(tokenizer), output)


def report(components: list[Component], notes: list[str], output: Path) -> None:
    """What was left out, what gave way, what is unusual, and a table of what came out."""
    for component in components:
        if component.unused:
            console.print(f"unused by upstream, left out: {grouped(component.unused)}.", markup=False)
    superseded = sum(component.load().superseded for component in components)
    console.print(f"{superseded} weights of other files gave way to those of the trained model.")
    for note in notes:
        console.print(f"warning: {note}", style="yellow", markup=False)
    Console().print(repository_table(repository_parts(output), title=str(output)))


def check_output(output: Path) -> None:
    """Refuse an output folder that holds something."""
    forget(output)  # of a conversion that was killed when everything else was done
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists already and is not empty; choose another folder.")


def check_component(component: Component, root: Path) -> None:
    """Compare the checkpoint's weights with the model's, by name and shape."""
    part = component.load()
    found = {name: tuple(t.shape) for name, t in part.tensors.items() if name not in component.unused}
    expected = expected_tensors(component.model)
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "left over": sorted(found.keys() - expected.keys()) + sorted(part.unknown),
        "of another shape": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    lines = [
        f"{len(names)} {kind}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if lines:
        files = ", ".join(str(root / name) for name in sorted(part.files))
        raise ValueError(f"{files}: the weights of {component.name} do not fit. {'; '.join(lines)}.")


def write_weights(
    components: list[Component], plans: dict[str, Any], dtype: torch.dtype | None, unfinished: Unfinished
) -> None:
    """Write every shard that is not there yet."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("weights", total=sum(plan.metadata["total_size"] for plan in plans.values()))
        for component in components:
            plan, folder = plans[component.name], unfinished.folder / component.name
            unfinished.add(partial(component.save_config, dtype=plan.dtype), folder)
            for file, names in plan.filename_to_tensors.items():
                progress.update(bar, description=f"{component.name}/{file}")
                if not unfinished.has(folder / file):
                    unfinished.write(folder / file, read_shard(component, names, dtype))
                progress.advance(bar, plan.sizes[file])
            if plan.is_sharded:
                index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                text, name = json.dumps(index, indent=2) + "\n", f"{component.weights_name}.safetensors.index.json"
                unfinished.claim([f"{component.name}/{name}"])
                write_text(folder / name, text)


def plan_shards(component: Component, dtype: torch.dtype | None, max_shard_size: int | str) -> Any:
    """Which tensor goes into which file, and the files' sizes; no data is read."""
    part = component.load()
    stored = {
        name: torch.empty(tensor.shape, dtype=_target_dtype(tensor, dtype), device="meta")
        for name, tensor in part.tensors.items()
        if name not in component.unused
    }
    pattern = component.weights_name + "{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(stored, filename_pattern=pattern, max_shard_size=max_shard_size)
    plan.dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    plan.dtype = Counter(tensor.dtype for tensor in stored.values()).most_common(1)[0][0]
    plan.sizes = {
        file: sum(stored[name].numel() * stored[name].element_size() for name in names)
        for file, names in plan.filename_to_tensors.items()
    }
    return plan


def read_shard(component: Component, names: list[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Copies of the named tensors. Sources are opened anew every so often, which takes them out of memory."""
    shard: dict[str, torch.Tensor] = {}
    tensors, read = component.load().tensors, 0
    for name in names:
        if read > MAX_MAPPED_BYTES:
            tensors, read = component.load().tensors, 0
        shard[name] = _checked(name, tensors[name], dtype)
        read += tensors[name].numel() * tensors[name].element_size()
    return shard


def _target_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _checked(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A copy in memory, in its target format."""
    # The extremes carry every NaN and infinity, and finding them takes no memory.
    if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise ValueError(f"The weight {name!r} has values that are not finite: the checkpoint is damaged.")
    return tensor.to(_target_dtype(tensor, dtype), copy=True).contiguous()


def write_the_rest(
    folder: Path, models: dict[str, torch.nn.Module], processor: OmniVideoProcessor, text_tokenizer: Any
) -> None:
    """Processor, tokenizer of the text encoder, scheduler, and the pipeline's own index."""
    for target in (folder, folder / "processor"):
        processor.save_pretrained(target)
    text_tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=PRESETS["t2v"]["flow_shift"]
    )
    scheduler.save_pretrained(folder / "scheduler")
    pipeline = OmniVideoPipeline(**models, processor=processor, tokenizer=text_tokenizer, scheduler=scheduler)
    pipeline.save_config(folder)


def verify(folder: Path, dtypes: dict[str, dict[str, torch.dtype] | None]) -> None:
    """
    Load what was written: every component from its configuration, against the headers of its files, and the whole
    model through `from_pretrained`.

    Its weights stay where they are on the disk, so that this takes no memory.

    Args:
        folder: the repository.
        dtypes: for every component the number format of each weight, `None` where it was copied.
    """
    for name, wanted in dtypes.items():
        check_files(load_component(name, folder / name), folder / name, wanted)
    OmniVideoProcessor.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder / "tokenizer")
    with tempfile.TemporaryDirectory() as nothing:
        _, loaded = OmniVideoForConditionalGeneration.from_pretrained(
            folder, device_map={"": "disk"}, offload_folder=nothing, output_loading_info=True
        )
    if any(loaded.values()):
        raise ValueError(f"{folder}: the whole model does not load: {loaded}. Please report this.")


# --- command line ---------------------------------------------------------------------------------------------------


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    original: Annotated[Path, typer.Option(help="Upstream's `omni_ckpts` folder.")],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; as stored by default.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights; memory stays near it.")] = "5GB",
    max_context_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the decoder's context; by default as released.")
    ] = None,
    wan_repo: Annotated[
        str | None, typer.Option(help="Wan in diffusers' format, for a missing text encoder, tokenizer or VAE.")
    ] = None,
    without_markers: Annotated[bool, typer.Option("--without-markers", help="Join the context's parts bare.")] = False,
    mllm: Annotated[str | None, typer.Option(help="Omni-Video 2: folder or repository of its Qwen3-VL.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Omni-Video 2: upstream's shared_config.py, which is parsed and not run.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert upstream's checkpoint to a repository for transformers and diffusers."""
    if not verbose:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("accelerate").setLevel(logging.ERROR)
    try:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"`--dtype {dtype}` must be one of {', '.join(DTYPES)}.")
        options: dict[str, Any] = {
            "dtype": DTYPES.get(dtype),
            "max_shard_size": max_shard_size,
            "max_context_length": max_context_length,
            "wan_repo": wan_repo,
        }
        if find_layout(original) is None:
            if mllm is not None or prompts is not None:
                raise ValueError(
                    f"{original}: is no checkpoint of Omni-Video 2, so `--mllm` and `--prompts` do not apply: leave "
                    "them out, or check `--original`."
                )
            convert(original, output, with_markers=not without_markers, **options)
        else:
            if without_markers:
                raise ValueError("`--without-markers` does not apply to Omni-Video 2: leave it out.")
            import_module(".convert_omni_video_2", __package__).convert(
                original, output, mllm=mllm, prompts=prompts, **options
            )
    except Exception as error:  # one line whatever it is; `--verbose` shows where
        if verbose:
            console.print_exception()
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        print(f"error: {kind}{' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(2) from None
