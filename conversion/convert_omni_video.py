"""Converts upstream's `omni_ckpts` folder to a repository for transformers and diffusers."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from components import (
    Component,
    adapter_component,
    expected_tensors,
    missing_generation_tokens,
    mllm_component,
    text_encoder_component,
    transformer_component,
    vae_component,
)
from diffusers import UniPCMultistepScheduler
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from original_checkpoint import MARKERS, TEXT_ENCODER, TEXT_TOKENIZER, VILA, WAN_VAE, OriginalCheckpoint
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline, OmniVideoProcessor
from omni_video_hf.hub import read_header, repository_parts, repository_table, write_root_index
from omni_video_hf.processing_omni_video import IMAGE_TOKEN
from omni_video_hf.settings_omni_video import PRESETS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATE = "conversion.json"  # in the unfinished folder: what it is made from, and which shards are complete
# Parts that may come from a repository of Wan in diffusers' format: our folder -> upstream's file.
OPTIONAL = {"text_encoder": TEXT_ENCODER, "vae": WAN_VAE, "tokenizer": TEXT_TOKENIZER}
MAX_MAPPED_BYTES = 2**28
console = Console(stderr=True)


def convert(
    original: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    max_context_length: int = 2560,
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
        dtype: number format of the weights; as stored by default.
        max_shard_size: of each file of weights, such as `"5GB"`.
        max_context_length: tokens of the decoder's context.
        wan_repo: folder or Hub repository of Wan in diffusers' format, for text encoder, tokenizer and VAE where
            `original` lacks them.
        with_markers: whether the context has marker embeddings; without, they are not looked for.

    Raises:
        ValueError: for anything in the checkpoint that is missing, left over, of another shape, damaged or unsafe.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists already and is not empty; choose another folder.")
    checkpoint = OriginalCheckpoint(original)
    missing = [folder for folder, name in OPTIONAL.items() if not checkpoint.has(name)]
    if missing and wan_repo is None:
        raise ValueError(
            f"{original / OPTIONAL[missing[0]]}: is missing. Download it, or take {', '.join(missing)} from a "
            "repository of Wan in diffusers' format with `--wan-repo`."
        )
    if with_markers and not checkpoint.has(MARKERS):
        raise ValueError(f"{original / MARKERS}: is missing. `--without-markers` joins the parts of the context bare.")

    wan_source = find_wan(wan_repo, missing) if missing else None
    tokenizer = checkpoint.tokenizer(f"{VILA}/llm", "bos_token", "eos_token")
    tokenizer.add_tokens(IMAGE_TOKEN, special_tokens=True)
    for token in missing_generation_tokens(tokenizer):
        console.print(f"[yellow]note:[/] the tokenizer has no {token!r} token; upstream's literal id is used.")
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

    options = {"dtype": str(dtype), "max_shard_size": str(max_shard_size), "max_context_length": max_context_length}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.incomplete")
    with _alone(output), Unfinished(partial, fingerprint(checkpoint, components, options)) as unfinished:
        _check_disk_space(components, dtype, partial)
        write_weights(components, dtype, max_shard_size, unfinished)
        write_the_rest(checkpoint, components, tokenizer, missing, wan_source, partial)
        write_root_index(partial)
        verify(components, partial)
        unfinished.finish(output)
    for component in components:
        if component.unused:
            console.print(f"{len(component.unused)} weights of {component.name} are never read by upstream: left out.")
    unread = checkpoint.unread_weights(name for component in components for name in component.load().files)
    if unread:
        console.print(f"[yellow]note:[/] files that belong to no part were not read: {', '.join(unread[:20])}")
    superseded = sum(component.load().superseded for component in components)
    console.print(f"{superseded} weights of other files gave way to those of the trained model.")
    Console().print(repository_table(repository_parts(output), title=str(output)))


def check_component(component: Component, root: Path) -> None:
    """Compare the checkpoint's weights with the model's, by name and shape."""
    part = component.load()
    found = {name: tuple(t.shape) for name, t in part.tensors.items() if name not in component.unused}
    expected = expected_tensors(component)
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
    components: list[Component], dtype: torch.dtype | None, max_shard_size: int | str, unfinished: "Unfinished"
) -> None:
    """Write every shard that is not there yet."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    plans = [(component, plan_shards(component, dtype, max_shard_size)) for component in components]
    total = sum(plan.metadata["total_size"] for _, plan in plans)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("weights", total=total)
        for component, plan in plans:
            folder = unfinished.folder / component.name
            folder.mkdir(parents=True, exist_ok=True)
            component.save_config(folder, plan.dtype)
            for file, names in plan.filename_to_tensors.items():
                progress.update(bar, description=f"{component.name}/{file}")
                size = plan.sizes[file]
                if not unfinished.has(folder / file):
                    unfinished.write(folder / file, read_shard(component, names, dtype))
                progress.advance(bar, size)
            if plan.is_sharded:
                index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                name = f"{component.weights_name}.safetensors.index.json"
                (folder / name).write_text(json.dumps(index, indent=2) + "\n")


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
    checkpoint: OriginalCheckpoint,
    components: list[Component],
    tokenizer: Any,
    missing: list[str],
    wan_source: Path | None,
    folder: Path,
) -> None:
    """Processor, text tokenizer, scheduler, parts of another repository, and the pipeline's index."""
    mllm = next(component.model for component in components if component.name == "mllm").config.mllm_config
    vila = checkpoint.json(f"{VILA}/config.json")
    side = mllm.vision_config.image_size
    processor = OmniVideoProcessor(
        SiglipImageProcessorPil(size={"height": side, "width": side}),
        tokenizer,
        num_image_tokens=mllm.image_seq_length,
        image_aspect_ratio="pad" if vila.get("image_aspect_ratio") == "pad" else "resize",
        model_max_length=checkpoint.json(f"{VILA}/llm/config.json").get("tokenizer_model_max_length"),
    )
    for target in (folder, folder / "processor"):
        processor.save_pretrained(target)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=PRESETS["t2v"]["flow_shift"]
    )
    scheduler.save_pretrained(folder / "scheduler")
    if "tokenizer" not in missing:
        checkpoint.tokenizer(TEXT_TOKENIZER).save_pretrained(folder / "tokenizer")
    for name in missing:
        shutil.copytree(wan_source / name, folder / name, dirs_exist_ok=True)
    write_model_index(folder, components, scheduler)


def write_model_index(folder: Path, components: list[Component], scheduler: UniPCMultistepScheduler) -> None:
    """`model_index.json`, as the pipeline itself would write it."""
    models = {component.name: component.model for component in components}
    parts = models | {"scheduler": scheduler, "processor": OmniVideoProcessor.from_pretrained(folder)}
    parts["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for name, kind in (("vae", "diffusers.AutoencoderKLWan"), ("text_encoder", "transformers.UMT5EncoderModel")):
        if name not in parts:  # copied from another repository: built from its configuration, without weights
            module, _, class_name = kind.partition(".")
            library = __import__(module)
            with torch.device("meta"):
                config_class = getattr(library, class_name)
                parts[name] = (
                    config_class.from_config(config_class.load_config(folder / name))
                    if module == "diffusers"
                    else config_class(library.AutoConfig.from_pretrained(folder / name))
                )
    OmniVideoPipeline(**parts).save_config(folder)


def find_wan(wan_repo: str, folders: list[str]) -> Path:
    """The wanted folders of a Wan repository in diffusers' format, on this machine; safetensors only."""
    source = Path(wan_repo)
    if not source.is_dir():
        patterns = [f"{folder}/*{suffix}" for folder in folders for suffix in (".json", ".safetensors", ".model")]
        source = Path(snapshot_download(wan_repo, allow_patterns=patterns))
    for folder in folders:
        if not (source / folder).is_dir():
            raise ValueError(f"`--wan-repo {wan_repo}` has no folder {folder!r}; give one in diffusers' format.")
    return source


def verify(components: list[Component], folder: Path) -> None:
    """
    Load what was written: headers against the models, and the whole model through `from_pretrained`.

    Its weights stay where they are on the disk, so that this takes no memory.
    """
    for component in components:
        written: dict[str, tuple[int, ...]] = {}
        for file in sorted((folder / component.name).glob("*.safetensors")):
            written |= {name: shape for name, (_, shape, _) in read_header(file).items()}
        if written != expected_tensors(component):
            raise ValueError(f"{folder / component.name}: what was written does not fit the model; start again.")
    OmniVideoProcessor.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as nothing:
        _, report = OmniVideoForConditionalGeneration.from_pretrained(
            folder, device_map={"": "disk"}, offload_folder=nothing, output_loading_info=True
        )
    if any(report.values()):
        raise ValueError(f"{folder}: the whole model does not load: {report}. Please report this.")


# --- the unfinished folder ------------------------------------------------------------------------------------------


class Unfinished:
    """
    The folder that becomes the output, and what is known about the shards in it.

    Shards of an earlier run are kept when they come from the same files with the same options.
    """

    def __init__(self, folder: Path, made_from: str) -> None:
        self.folder, self.made_from = folder, made_from
        self.state_file = folder / STATE
        self.shards: dict[str, int] = {}

    def __enter__(self) -> "Unfinished":
        if self.state_file.is_file():
            state = json.loads(self.state_file.read_text())
            if state["made_from"] == self.made_from:
                self.shards = state["shards"]
        if not self.shards and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder.exists() and not self.shards:
            shutil.rmtree(self.folder)  # nothing worth keeping

    def has(self, file: Path) -> bool:
        """Whether a shard is there and whole."""
        name = file.relative_to(self.folder).as_posix()
        return file.is_file() and self.shards.get(name) == file.stat().st_size

    def write(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write a shard; it appears, and is recorded, when it is on the disk."""
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        shutil.copymode(file.with_name("config.json"), partial)  # safetensors lets only its owner read
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
        self.shards[file.relative_to(self.folder).as_posix()] = file.stat().st_size
        state = self.state_file.with_suffix(".partial")
        state.write_text(json.dumps({"made_from": self.made_from, "shards": self.shards}))
        state.replace(self.state_file)

    def finish(self, output: Path) -> None:
        """Give the folder its final name."""
        self.state_file.unlink(missing_ok=True)
        if output.exists():
            output.rmdir()  # empty, as checked at the start
        self.folder.replace(output)


def fingerprint(checkpoint: OriginalCheckpoint, components: list[Component], options: dict[str, Any]) -> str:
    """What a conversion is made from: options, and every source file's size and time of change."""
    files = sorted({name for component in components for name in component.load().files})
    stats = {name: checkpoint.path(name).stat() for name in files}
    facts = [options, str(checkpoint.root.resolve()), {n: (s.st_size, s.st_mtime_ns) for n, s in stats.items()}]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Refuse to run twice at once on the same output."""
    lock = FileLock(output.with_name(f"{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{output}: another conversion is writing there; wait for it.") from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _check_disk_space(components: list[Component], dtype: torch.dtype | None, folder: Path) -> None:
    needed = sum(plan_shards(component, dtype, "100GB").metadata["total_size"] for component in components)
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if needed > free:
        raise ValueError(f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.")


# --- command line ---------------------------------------------------------------------------------------------------


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    original: Annotated[Path, typer.Option(help="Upstream's `omni_ckpts` folder.")],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; as stored by default.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights; memory stays near it.")] = "5GB",
    max_context_length: Annotated[int, typer.Option(min=1, help="Tokens of the decoder's context.")] = 2560,
    wan_repo: Annotated[
        str | None, typer.Option(help="Wan in diffusers' format, for a missing text encoder, tokenizer or VAE.")
    ] = None,
    without_markers: Annotated[bool, typer.Option("--without-markers", help="Join the context's parts bare.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert upstream's checkpoint to a repository for transformers and diffusers."""
    if not verbose:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    try:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"`--dtype {dtype}` must be one of {', '.join(DTYPES)}.")
        convert(
            original,
            output,
            dtype=DTYPES.get(dtype),
            max_shard_size=max_shard_size,
            max_context_length=max_context_length,
            wan_repo=wan_repo,
            with_markers=not without_markers,
        )
    except (ValueError, OSError) as error:
        if verbose:
            console.print_exception()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
