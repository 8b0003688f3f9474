"""
Repositories for transformers and diffusers with one copy of the weights: layout, root index, completion, checks.

    model_index.json                  for diffusers: the pipeline and its components
    config.json, *.index.json         for transformers: the whole model; the index names files in component folders
    mllm/ adapter/ transformer/ ...   the components
    *.py                              the code, see `remote_code`
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..utils.files import is_plain_name, read_json, visible_files, write_json, write_text
from ..utils.tokens import hub_call
from .headers import read_header
from .remote_code import PIPELINE_CLASS, pipeline_class, write_remote_code
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
# Weights whose index libraries open, in any of their formats.
_WEIGHTS_NAMES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
# Folders whose weights form the whole model, in the order of the data flow.
MODEL_FOLDERS = ("mllm", "adapter", "transformer")
PUSHES = "omni-video-push"  # name of the temporary folders in which a repository is put together for the Hub
# Fields in the configuration of the component `mllm` that the whole model has too.
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
# Entries about the local machine that libraries write when they load something.
_LOCAL_ENTRIES = {"_name_or_path", "name_or_path", "is_local", "local_files_only", "cache_dir", "token"}


def finalize_repository(directory: str | Path, variant: str | None = None) -> None:
    """
    Turn a folder with components into a repository: write root configuration, weight index, code and references.

    The function is idempotent and does not change weights.

    Args:
        directory: folder with the component folders, the processor's files and, for a pipeline, `model_index.json`.
        variant: variant of the weights in the root index, such as `fp16` for `model.fp16.safetensors`.
    """
    directory = Path(directory)
    for path in (*directory.glob("*/config.json"), *visible_files(directory, "tokenizer_config.json")):
        content = _read_json(path)
        if content.keys() & _LOCAL_ENTRIES:
            kept = {name: value for name, value in content.items() if name not in _LOCAL_ENTRIES}
            write_json(path, kept, sort_keys=True)
    if (directory / "mllm" / "config.json").is_file() and is_whole_model(directory):
        write_root_index(directory, variant)
    _keep_presets(directory)
    write_remote_code(directory)


def is_whole_model(directory: Path) -> bool:
    """Whether the parts of a repository also make one model of transformers; Omni-Video 2's make a pipeline only."""
    return pipeline_class(directory) == PIPELINE_CLASS


def _keep_presets(directory: Path) -> None:
    """Copy the presets of the pipeline into its adapters' configurations, so that a model saved alone keeps them."""
    index = _read_json(directory / PIPELINE_INDEX_NAME)
    for path in (directory / name / "config.json" for name in ("adapter", "adapter_2")):
        adapter = _read_json(path)
        if index and adapter and index.get("presets") and "_presets" not in adapter:
            kept = {"presets": index["presets"], "scheduler_shift": index.get("scheduler_shift")}
            write_json(path, adapter | {"_presets": kept}, sort_keys=True)


def write_root_index(directory: str | Path, variant: str | None = None) -> None:
    """
    Write `config.json`, `generation_config.json` and the weight index of the whole model at the root.

    The index refers to the weights in the component folders, which are not copied. It has their names without the
    prefix of the component, which loading adds (see `modeling_omni_video`).

    Args:
        directory: folder with those of `mllm`, `adapter` and `transformer` that the model has.
        variant: variant of the weights in the index.

    Raises:
        ValueError: if two folders contain a weight of the same name.
    """
    directory = Path(directory)
    weight_map: dict[str, str] = {}
    total_size = 0
    for folder in MODEL_FOLDERS:
        for file in weight_files(directory / folder, variant):
            for name, (_, shape, num_bytes) in read_header(file).items():
                if name in weight_map:
                    raise ValueError(
                        f"{file}: the weight {name!r} {shape} is also in {weight_map[name]}: remove one of the files."
                    )
                weight_map[name] = f"{folder}/{file.name}"
                total_size += num_bytes
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    index_name = INDEX_NAME if variant is None else INDEX_NAME.replace(".json", f".{variant}.json")
    write_json(directory / index_name, index)

    mllm, adapter, decoder = (_read_json(directory / name / "config.json") for name in MODEL_FOLDERS)
    whole = {name: mllm[name] for name in _MODEL_FIELDS if name in mllm}
    whole["adapter_config"] = adapter and _without_private(adapter) | {"model_type": "omni_video_adapter"}
    whole["decoder_config"] = decoder and _without_private(decoder)
    write_json(directory / "config.json", whole, sort_keys=True)
    _write_generation_config(directory)


def _without_private(config: dict) -> dict:
    """Remove the entries that diffusers adds to a configuration, whose names begin with an underscore."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _write_generation_config(directory: Path) -> None:
    """
    Write the generation settings of the MLLM to the root and into the configuration of the component.

    diffusers does not download `generation_config.json` of a component; transformers then reads `config.json`.
    """
    path, component = directory / "mllm" / GENERATION_CONFIG_NAME, directory / "mllm" / "config.json"
    settings = _read_json(path)
    if settings is None:
        return
    write_text(directory / path.name, path.read_text(encoding="utf-8"))
    names = GenerationConfig().to_dict().keys() - {"transformers_version"}
    config = {name: value for name, value in _read_json(component).items() if name not in names}
    settings = {name: value for name, value in settings.items() if name in names}
    write_json(component, config | settings, sort_keys=True)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a variant in a component's folder; `None` selects those without a variant."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if is_weight_file(file.name) and variant_of(file.name) == variant]


# --- writing ------------------------------------------------------------------------------------------------------


@hub_call
def complete_repository(
    directory: str | Path,
    base: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    link: bool = False,
) -> list[str]:
    """
    Complete a saved model to a pipeline with components of the repository it was trained from.

    Existing files of the folder are kept. Missing components (such as VAE, text encoder and scheduler), files of the
    processor and `model_index.json` are copied, and this version writes the code.

    Args:
        directory: folder of a saved model or of an incomplete repository.
        base: folder or Hub repository with a `model_index.json`.
        revision: branch, tag or commit of a Hub repository.
        token: access token of the Hub.
        link: create symbolic links instead of copies, for a temporary folder that is pushed.

    Returns:
        Names of the files and folders that were added.

    Raises:
        ValueError: if the base is not the repository of a pipeline, or if a component is missing in both.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"`directory` must be an existing folder with a saved model, got {directory}.")
    finish_saving(directory)
    source = Path(base)
    if not source.is_dir():
        kept = [name for name in MODEL_FOLDERS if (directory / name).is_dir()]
        if _lacks_mllm(directory / "mllm"):
            kept.remove("mllm")
        unneeded = ["*.py", "README.md", *(f"{name}/*" for name in kept)]
        source = Path(snapshot_download(str(base), revision=revision, token=token, ignore_patterns=unneeded))
    check_finished(source)
    index = _read_json(source / PIPELINE_INDEX_NAME)
    if index is None:
        raise ValueError(
            f"{base}: has no {PIPELINE_INDEX_NAME}, so it cannot complete {directory}: pass the repository of a "
            "pipeline as `base`."
        )
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
        # The root index and configuration are removed first and written again when all components are in place.
        commit(work, directory, removed=[*replaced, INDEX_NAME, "config.json"], finalize=True)
    return added


def _add_left_out_mllm(directory: Path, source: Path, new: Path, copy: Callable[[Path, Path], object]) -> list[str]:
    """
    Add the MLLM of the base to a model that was trained without one (`enable_mllm=False`); write it to `new`.

    The folder `mllm` of such a model contains only the vision head. Files of the base that contain the old vision head
    are written without it.

    Returns:
        Names of the files in `directory` that the new files replace.
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
            shutil.copymode(
                folder / "config.json", target / shard
            )  # safetensors writes files that only their owner can read
        weight_map |= dict.fromkeys(kept, shard)
        total_size += sum(header[key][2] for key in kept)
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(target / INDEX_NAME, content)
    config = _read_json(folder / "config.json") | {"enable_mllm": True}
    write_json(target / "config.json", config, sort_keys=True)
    if (base / GENERATION_CONFIG_NAME).is_file():
        copy(base / GENERATION_CONFIG_NAME, target / GENERATION_CONFIG_NAME)
    return [f"mllm/{file.name}" for file in heads]


def _lacks_mllm(folder: Path) -> bool:
    return not (_read_json(folder / "config.json") or {}).get("enable_mllm", True)


def link_weights(source: str | Path, target: str | Path) -> None:
    """Link a weight file, and copy any other file, because [`finalize_repository`] may rewrite it."""
    if Path(source).suffix == ".safetensors":
        Path(target).symlink_to(Path(source).resolve())
    else:
        shutil.copyfile(source, target)


def link_root(directory: str | Path) -> Path:
    """
    The folder into which symbolic links in a repository or in one of its component folders may point.

    It is the folder itself, or the folder of the repository in the Hub's cache.
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
        link_roots: other folders into which symbolic links may point.

    Raises:
        ValueError: for such an index; the message names the index and the entry.
    """
    directory = Path(directory)
    roots = [Path(root).resolve() for root in (link_root(directory), *link_roots)]
    for index in sorted([*directory.glob("*.json"), *directory.glob("*/*.json")]):
        for name in index_entries(index) if is_weight_file(index.name) or _is_index_of_pickles(index) else ():
            path = (index.parent / name).resolve()
            _check_entry(index, name, directory)
            if not any(path.is_relative_to(root) for root in roots):
                raise _outside(index, name, directory)


def check_hub_indices(repository: str, variant: str | None = None, **hub: Any) -> None:
    """
    Check the weight indices of a Hub repository before weights are downloaded; only index files are read.

    Args:
        repository: `owner/name`.
        variant: variant of the weights to load.
        hub: where the files lie: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: names the index and the entry. What keeps the Hub from answering is left to the loading itself.
    """
    infix = "" if variant is None else f".{variant}"
    for name in (f"{weights}.index{infix}.json" for weights in _WEIGHTS_NAMES):
        try:
            index = cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **hub)
        except OSError:
            return
        for entry in () if index is None else index_entries(Path(index)):
            _check_entry(index, entry, repository)


def _check_entry(index: str | Path, name: str, repository: str | Path) -> None:
    """Refuse the name of a file in a weight index that leads up, or away, from where the index lies."""
    if not is_plain_name(name):
        raise _outside(index, name, repository)


def _outside(index: str | Path, name: str, repository: str | Path) -> ValueError:
    return ValueError(
        f"{index}: names the file {name!r}, which lies outside of {repository}. An index may only name files of its "
        "own repository: download it again from a source that you trust."
    )


def _is_index_of_pickles(path: Path) -> bool:
    return path.name.startswith(tuple(f"{name}.index." for name in _WEIGHTS_NAMES if name.endswith(".bin")))


def index_entries(index: Path) -> list[str]:
    """
    Names of the files in a weight index.

    Raises:
        ValueError: if the index is damaged.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{index}: cannot be read as JSON ({error}): download it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and name for name in weight_map.values()):
        raise ValueError(f"{index}: is not a weight index, which has a `weight_map` of file names: download it again.")
    return sorted(set(weight_map.values()))


def missing_parts(directory: str | Path) -> list[str]:
    """Names of components and files that a folder needs to be loaded by transformers and diffusers, but lacks."""
    directory = Path(directory)
    needed = (PIPELINE_INDEX_NAME, *(["config.json"] if is_whole_model(directory) else []))
    missing = [name for name in needed if not (directory / name).is_file()]
    index = _read_json(directory / PIPELINE_INDEX_NAME) or {}
    components = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_" and value[0]]
    missing += [name for name in components if not (directory / name).is_dir()]
    if not any(_is_processor_file(path) for path in directory.iterdir()):
        missing.append("processor_config.json")
    return missing


def _is_processor_file(path: Path) -> bool:
    names = ("processor_config.json", "chat_template.jinja")
    return path.is_file() and (path.name in names or path.name.startswith("tokenizer"))


def _read_json(path: Path) -> Any:
    """The content of a JSON file; `None` if there is no such file."""
    return read_json(path) if path.is_file() else None


finalize_with(finalize_repository)

__all__ = [
    "MODEL_FOLDERS",
    "PUSHES",
    "check_finished",
    "check_hub_indices",
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
