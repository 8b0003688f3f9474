"""
The layout of a repository: one copy of the weights for both libraries.

    model_index.json                  for diffusers: the pipeline and its components
    config.json, *.index.json         for transformers: the whole model, over the weights of the component folders
    mllm/ adapter/ transformer/ ...   the components
    *.py                              the code, see `remote_code`
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..utils.files import is_plain_name, read_json, visible_files, write_json, write_text
from .remote_code import write_remote_code
from .staging import (
    PIPELINE_INDEX_NAME,
    check_finished,
    commit,
    finalize_with,
    finish_saving,
    is_weight_file,
    staged,
    staging,
    variant_of,
)

INDEX_NAME = "model.safetensors.index.json"
# Folders whose weights make up the whole model, in the order of the figure.
MODEL_FOLDERS = ("mllm", "adapter", "transformer")
# Fields of the component `mllm`'s configuration that the whole model shares.
_MODEL_FIELDS = (
    "architectures",
    "dtype",
    "enable_mllm",
    "image_generation_token_id",
    "mllm_config",
    "model_type",
    "tie_word_embeddings",
    "transformers_version",
    "video_generation_token_id",
    "vision_head_config",
)
# What libraries write of the machine and the call that something was loaded on and with.
_LOCAL_ENTRIES = {"_name_or_path", "name_or_path", "is_local", "local_files_only", "cache_dir", "token"}


def finalize_repository(directory: str | Path, variant: str | None = None) -> None:
    """
    Make a repository of a folder with components: root configuration and weight index, code, references to the code.

    Idempotent; weights are only looked at.

    Args:
        directory: with the component folders, `model_index.json` if it is to be a pipeline, and the processor's files
            at the root.
        variant: of the weights that the root index is to name, as in `model.fp16.safetensors`.
    """
    directory = Path(directory)
    for path in (*directory.glob("*/config.json"), *visible_files(directory, "tokenizer_config.json")):
        content = read_json(path)
        if content.keys() & _LOCAL_ENTRIES:
            kept = {name: value for name, value in content.items() if name not in _LOCAL_ENTRIES}
            write_json(path, kept, sort_keys=True)
    if (directory / "mllm" / "config.json").is_file():
        write_root_index(directory, variant)
    _keep_presets(directory)
    write_remote_code(directory)


def _keep_presets(directory: Path) -> None:
    """Give the adapter the presets of the pipeline: a model that is saved without a pipeline does not have them."""
    index, path = read_json(directory / PIPELINE_INDEX_NAME), directory / "adapter" / "config.json"
    adapter = read_json(path)
    if index and adapter and index.get("presets") and "_presets" not in adapter:
        kept = {"presets": index["presets"], "scheduler_shift": index.get("scheduler_shift")}
        write_json(path, adapter | {"_presets": kept}, sort_keys=True)


def write_root_index(directory: str | Path, variant: str | None = None) -> None:
    """
    Write the root `config.json`, `generation_config.json` and weight index over the component folders.

    The index names weights as the components store them; loading gives them their prefix
    (see `modeling_omni_video`). Nothing is copied.

    Args:
        directory: with the folders `mllm`, `adapter` and `transformer`, as far as the model has them.
        variant: of the weights to name.

    Raises:
        ValueError: when two folders hold a weight of the same name.
    """
    directory = Path(directory)
    weight_map: dict[str, str] = {}
    total_size = 0
    for folder in MODEL_FOLDERS:
        for file in weight_files(directory / folder, variant):
            for name, (_, shape, num_bytes) in read_header(file).items():
                if name in weight_map:
                    raise ValueError(f"{file}: the weight {name!r} {shape} is also in {weight_map[name]}.")
                weight_map[name] = f"{folder}/{file.name}"
                total_size += num_bytes
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    index_name = INDEX_NAME if variant is None else INDEX_NAME.replace(".json", f".{variant}.json")
    write_json(directory / index_name, index)

    mllm, adapter, decoder = (read_json(directory / name / "config.json") for name in MODEL_FOLDERS)
    whole = {name: mllm[name] for name in _MODEL_FIELDS if name in mllm}
    whole["adapter_config"] = adapter and _without_private(adapter) | {"model_type": "omni_video_adapter"}
    whole["decoder_config"] = decoder and _without_private(decoder)
    write_json(directory / "config.json", whole, sort_keys=True)
    _write_generation_config(directory)


def _without_private(config: dict) -> dict:
    """A diffusers configuration without the entries that diffusers adds, whose names begin with an underscore."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _write_generation_config(directory: Path) -> None:
    """
    Put the MLLM's generation settings wherever they are looked for.

    diffusers downloads no `generation_config.json` of a component; transformers then takes them from `config.json`.
    """
    path, component = directory / "mllm" / GENERATION_CONFIG_NAME, directory / "mllm" / "config.json"
    settings = read_json(path)
    if settings is None:
        return
    write_text(directory / path.name, path.read_text(encoding="utf-8"))
    names = GenerationConfig().to_dict().keys() - {"transformers_version"}
    config = {name: value for name, value in read_json(component).items() if name not in names}
    settings = {name: value for name, value in settings.items() if name in names}
    write_json(component, config | settings, sort_keys=True)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Files with weights of a variant in a component's folder; `None` stands for those without one."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if is_weight_file(file.name) and variant_of(file.name) == variant]


def read_header(file: str | Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """
    Names of the tensors in a safetensors file, with format, shape and size in bytes. No tensor is read.

    Raises:
        ValueError: when the file is not a complete safetensors file.
    """
    header = {}
    try:
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no dict
                part = handle.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                header[name] = (dtype, shape, math.prod(shape) * _bits(dtype) // 8)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}). Download it again.") from error
    return header


# --- writing ------------------------------------------------------------------------------------------------------


def complete_repository(
    directory: str | Path,
    base: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    link: bool = False,
) -> list[str]:
    """
    Add to a saved model what makes it a pipeline, from the repository it was trained from.

    What the folder has stays: only missing components (such as VAE, text encoder and scheduler), the processor's files
    and `model_index.json` are copied, and the code is written by this version.

    Args:
        directory: a saved model or an unfinished repository.
        base: folder or Hub repository with a `model_index.json`.
        revision: of a Hub repository.
        token: for the Hub.
        link: make symbolic links instead of copies, for a folder that is only there to be pushed.

    Returns:
        Names of the files and folders that were added.

    Raises:
        ValueError: when the base is not a pipeline's repository, or the folder lacks parts that the base lacks too.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: is not a folder, so nothing completes it.")
    finish_saving(directory)
    source = Path(base)
    if not source.is_dir():
        kept = [name for name in MODEL_FOLDERS if (directory / name).is_dir()]
        if _lacks_mllm(directory / "mllm"):
            kept.remove("mllm")
        unneeded = ["*.py", "README.md", *(f"{name}/*" for name in kept)]
        source = Path(snapshot_download(str(base), revision=revision, token=token, ignore_patterns=unneeded))
    check_finished(source)
    index = read_json(source / PIPELINE_INDEX_NAME)
    if index is None:
        raise ValueError(f"{base}: has no {PIPELINE_INDEX_NAME}, so it cannot complete {directory} to a pipeline.")
    components = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_" and value[0]]
    processor_files = [path.name for path in sorted(source.iterdir()) if _is_processor_file(path)]
    wanted = [name for name in (*components, *processor_files) if not (directory / name).exists()]
    absent = [name for name in wanted if not (source / name).exists()]
    if absent:
        raise ValueError(f"{base}: lacks {', '.join(absent)}, which {directory} lacks too: choose another base.")
    added = [*wanted, *([] if (directory / PIPELINE_INDEX_NAME).exists() else [PIPELINE_INDEX_NAME])]
    copy = link_weights if link else shutil.copyfile
    with staging(directory, is_inside=True) as work:
        new = work / "new"
        replaced = _add_left_out_mllm(directory, source, new, copy)
        for name in added:
            if (source / name).is_dir():
                ignored = shutil.ignore_patterns("*.py")
                shutil.copytree(source / name, new / name, ignore=ignored, copy_function=copy)
            else:
                copy(source / name, new / name)
        # What finalizing writes anew over all parts is not there while some of them are.
        commit(work, directory, removed=[*replaced, INDEX_NAME, "config.json"], finalize=True)
    return added


def _add_left_out_mllm(directory: Path, source: Path, new: Path, copy: Callable[[Path, Path], object]) -> list[str]:
    """
    Give a model that was trained without its MLLM (`enable_mllm=False`) the base's, written to `new`.

    Its folder holds the vision head alone; files of the base that hold another one are written without it.

    Returns:
        Names of the files in `directory` that the new ones replace.
    """
    folder, base = directory / "mllm", source / "mllm"
    if not _lacks_mllm(folder):
        return []
    heads = weight_files(folder)
    sources = [(file, "mllm.") for file in weight_files(base)] + [(file, "vision_head.") for file in heads]
    sources = [(file, prefix) for file, prefix in sources if any(key.startswith(prefix) for key in read_header(file))]
    target, total_size = new / "mllm", 0
    weight_map: dict[str, str] = {}
    target.mkdir()
    for number, (file, prefix) in enumerate(sources, 1):
        header = read_header(file)
        kept = [key for key in header if key.startswith(prefix)]
        shard = f"model-{number:05d}-of-{len(sources):05d}.safetensors"
        if len(kept) == len(header):
            copy(file, target / shard)
        else:
            with safe_open(file, "pt") as handle:
                save_file({key: handle.get_tensor(key) for key in kept}, target / shard, {"format": "pt"})
            shutil.copymode(folder / "config.json", target / shard)  # safetensors lets only its owner read
        weight_map |= dict.fromkeys(kept, shard)
        total_size += sum(header[key][2] for key in kept)
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(target / INDEX_NAME, content)
    config = read_json(folder / "config.json") | {"enable_mllm": True}
    write_json(target / "config.json", config, sort_keys=True)
    if (base / GENERATION_CONFIG_NAME).is_file():
        copy(base / GENERATION_CONFIG_NAME, target / GENERATION_CONFIG_NAME)
    return [f"mllm/{file.name}" for file in heads]


def _lacks_mllm(folder: Path) -> bool:
    return not (read_json(folder / "config.json") or {}).get("enable_mllm", True)


def link_weights(source: str | Path, target: str | Path) -> None:
    """Link a file with weights, and copy any other, which [`finalize_repository`] may rewrite."""
    if Path(source).suffix == ".safetensors":
        Path(target).symlink_to(Path(source).resolve())
    else:
        shutil.copyfile(source, target)


def link_root(directory: str | Path) -> Path:
    """
    The folder that symbolic links in a repository, or in one of its component folders, may lead into.

    It is the folder itself, or the part of the Hub's cache that the repository was downloaded to.
    """
    directory = Path(directory).absolute()
    for revision in (directory, directory.parent):
        if revision.parent.name == "snapshots":
            return revision.parent.parent
    return directory


def check_indices(directory: str | Path, link_roots: Iterable[str | Path] = ()) -> None:
    """
    Refuse weight indices that name files outside their repository, or that are damaged.

    Args:
        directory: the repository.
        link_roots: other folders that symbolic links in it may lead into.

    Raises:
        ValueError: names the index and the entry.
    """
    directory = Path(directory)
    roots = [Path(root).resolve() for root in (link_root(directory), *link_roots)]
    for index in sorted([*directory.glob("*.json"), *directory.glob("*/*.json")]):
        for name in index_entries(index) if is_weight_file(index.name) else ():
            path = (index.parent / name).resolve()
            if not is_plain_name(name) or not any(path.is_relative_to(root) for root in roots):
                raise ValueError(
                    f"{index}: names the file {name!r}, which lies outside of {directory}. An index may only name "
                    "files of its own repository: download it again, from somebody you trust."
                )


def index_entries(index: Path) -> list[str]:
    """
    Names of the files that a weight index lists.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{index}: cannot be read as JSON ({error}): download it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and name for name in weight_map.values()):
        raise ValueError(
            f"{index}: is no index of weights, which has a `weight_map` of file names: download it again."
        )
    return sorted(set(weight_map.values()))


def missing_parts(directory: str | Path) -> list[str]:
    """What a folder lacks to be a repository that transformers and diffusers load; empty when it is one."""
    directory = Path(directory)
    missing = [name for name in (PIPELINE_INDEX_NAME, "config.json") if not (directory / name).is_file()]
    index = read_json(directory / PIPELINE_INDEX_NAME) or {}
    components = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_" and value[0]]
    missing += [name for name in components if not (directory / name).is_dir()]
    if not any(_is_processor_file(path) for path in directory.iterdir()):
        missing.append("processor_config.json")
    return missing


def _is_processor_file(path: Path) -> bool:
    names = ("processor_config.json", "chat_template.jinja")
    return path.is_file() and (path.name in names or path.name.startswith("tokenizer"))


def _bits(dtype: str) -> int:
    """Bits of one value: the digits at the end of its format's name, `BOOL` being a byte."""
    digits = "".join(character for character in dtype.split("_", maxsplit=1)[0] if character.isdigit())
    return int(digits) if digits else 8


finalize_with(finalize_repository)

__all__ = [
    "MODEL_FOLDERS",
    "check_finished",
    "check_indices",
    "complete_repository",
    "finalize_repository",
    "finish_saving",
    "index_entries",
    "is_weight_file",
    "link_root",
    "link_weights",
    "missing_parts",
    "read_header",
    "staged",
    "visible_files",
    "weight_files",
    "write_root_index",
]
