"""
Atomic saving of repositories: a folder has the old files, the new files, or is refused as unfinished; never a mixture.

A save is written to a workspace first. A new folder is created by one rename. For an existing folder, the workspace is
inside it and contains the list of changes: index files (`model_index.json`, `config.json`, `*.index.json`) are removed
first, then weights and code are moved in and outdated files removed, and new index files are moved in last. While the
list exists, loading refuses the folder. If a save is killed, the next save completes it from the list.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.files import (
    empty,
    read_json,
    read_mark,
    remove_abandoned,
    remove_empty,
    unlocked,
    workspace,
    workspaces,
    write_mark,
)
from .remote_code import CODE_FILE, PIPELINE_COMPONENTS, is_written_code

MODEL_TYPE, PIPELINE_INDEX_NAME = "omni_video", "model_index.json"
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(?:\.(?P<variant>[^.]+?))??(?P<shard>-\d{5}-of-\d{5})?\.safetensors"
    r"|(model|diffusion_pytorch_model)\.safetensors\.index(?:\.(?P<index_variant>[^.]+))?\.json"
)
# `finalize_repository`, which cannot be imported here because its module imports this one.
_finalizers: list[Callable[[Path], None]] = []
_NEW, _KEPT = "new", "kept"  # folders of a workspace: new files, and index files that are moved back


def finalize_with(function: Callable[[Path], None]) -> None:
    """Register the function that finalizes a repository after [`commit`]."""
    _finalizers.append(function)


def is_weight_file(name: str) -> bool:
    """Whether a file name is that of weights or of a weight index in transformers or diffusers."""
    return _WEIGHTS.fullmatch(name) is not None


def variant_of(name: str) -> str | None:
    """The variant in the name of a weight file, as `fp16` in `model.fp16.safetensors`, or `None`."""
    match = _WEIGHTS.fullmatch(name)
    return (match["variant"] or match["index_variant"]) if match else None


def is_index(name: str) -> bool:
    """Whether the file `name` of a repository is an index: it lists the files of a model or pipeline."""
    base = PurePosixPath(name).name
    return base in ("config.json", PIPELINE_INDEX_NAME) or (base.endswith(".json") and is_weight_file(base))


@contextmanager
def staged(directory: str | Path, variant: str | None = None, folders: Iterable[str] = ()) -> Iterator[Path]:
    """
    Yield a folder to write a repository to; its files are moved to `directory` when all of them are complete.

    Weights and code of an earlier save that are not written again are removed from `directory`. Other files are kept.

    Args:
        directory: target folder; created if it does not exist. An earlier save that was killed is completed first.
        variant: variant of the weights that are written; those of other variants are kept.
        folders: names of the folders for weights, `""` for `directory` itself.

    Raises:
        ValueError: before anything is written, if `directory` is a file, if one of `folders` is a link, or if it
            contains weights or index files that this package did not write.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: pass a folder to save to.")
    finish_saving(directory)
    folders = set(folders)
    _check_folders(directory, folders)
    if folders:
        _check_ours(directory, folders, variant)
    with staging(directory) as work:
        yield work / _NEW
        commit(work, directory, variant)


@contextmanager
def staging(directory: Path, is_inside: bool = False) -> Iterator[Path]:
    """
    Yield a workspace with a folder `new` for the files that [`commit`] moves to `directory`.

    The workspace is inside `directory`, so that moving is renaming. By default it is beside a folder that does not
    exist or is empty, which is then replaced as a whole.
    """
    directory = directory.absolute()
    is_inside = is_inside or (
        directory.is_dir()
        and (
            any(directory.iterdir())
            or directory.is_symlink()
            or directory.is_mount()
            or not os.access(directory.parent, os.W_OK)
        )
    )
    if is_inside:
        remove_abandoned(directory, directory.parent)  # left by a save before the folder existed
    with workspace(directory, directory if is_inside else None) as work:
        (work / _NEW).mkdir()
        yield work


def commit(
    work: Path, directory: Path, variant: str | None = None, removed: Iterable[str] = (), finalize: bool = False
) -> None:
    """
    Move the files of a workspace to the target folder.

    Args:
        work: the workspace, with the files in its folder `new`.
        directory: target folder.
        variant: variant of the weights among the files.
        removed: names of other files in `directory` to remove.
        finalize: run `finalize_repository` on `directory` before the save counts as finished.
    """
    directory, new = directory.absolute(), work / _NEW
    if work.parent != directory:
        if directory.exists():
            directory.rmdir()  # it was empty
        new.rename(directory)
        return
    files = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
    _check_folders(directory, {PurePosixPath(name).parent.as_posix() for name in files})
    if len(files) == 1 and not finalize and not is_weight_file(PurePosixPath(files[0]).name):
        (directory / files[0]).parent.mkdir(parents=True, exist_ok=True)
        (new / files[0]).replace(directory / files[0])
        return
    removed = sorted({*removed, *_outdated(directory, files, variant)} - set(files))
    write_mark(work, {"target": directory.name, "files": files, "removed": removed, "finalize": finalize})
    _apply(work, directory)


def finish_saving(directory: str | Path) -> bool:
    """
    Complete a save that was killed after its new files were complete and some were moved to `directory`.

    Returns:
        Whether there was such a save.

    Raises:
        ValueError: if another process is saving to `directory`.
    """
    directory, found = Path(directory).absolute(), False
    for folder in workspaces(directory, directory):
        if "files" in (read_mark(folder) or ()):
            with unlocked(folder) as is_free:
                if not is_free:
                    raise ValueError(f"{directory}: another process is saving to this folder: wait until it ends.")
                _apply(folder, directory)
                empty(folder)
            remove_empty(folder)
            found = True
    return found


def check_finished(directory: str | Path) -> None:
    """
    Refuse a folder with an unfinished save.

    Raises:
        ValueError: if a save to `directory` was killed or is still running, so that files are missing.
    """
    directory = Path(directory).absolute()
    for folder in workspaces(directory, directory):
        if "files" in (read_mark(folder) or ()):
            raise ValueError(
                f"{directory}: is unfinished: a save was interrupted after some of its files were moved here; the "
                f"others are in {folder.name}. Save to it again, or finish it: "
                "`from omni_video_hf.hub.repository import finish_saving; finish_saving(folder)`."
            )


def _apply(work: Path, directory: Path) -> None:
    """Make the changes that a workspace lists. After a kill at any point, a second call completes them."""
    mark: Any = read_mark(work)
    new, kept, files = work / _NEW, work / _KEPT, mark["files"]
    folders = {PurePosixPath(name).parent.as_posix() for name in files}
    for folder in sorted(folders):
        for path in sorted((directory / folder).glob("*.json")):
            name = path.relative_to(directory).as_posix()
            if is_index(name) and name not in mark["removed"]:
                if name not in files:
                    (kept / folder).mkdir(parents=True, exist_ok=True)
                    path.replace(kept / name)
                elif (new / name).exists():
                    path.unlink()
    for name in mark["removed"]:
        if is_index(name):
            (directory / name).unlink(missing_ok=True)
    for name in files:
        if not is_index(name):
            _move(new / name, directory / name)
    for name in mark["removed"]:
        (directory / name).unlink(missing_ok=True)
    back = [path.relative_to(kept).as_posix() for path in kept.rglob("*.json")]
    names = sorted([*filter(is_index, files), *back], key=lambda name: (-name.count("/"), name))
    for name in names:  # files at the root last, `model_index.json` at the end
        _move((kept if name in back else new) / name, directory / name)
    if mark["finalize"]:
        _finalizers[-1](directory)
    write_mark(work, {"target": directory.name})


def _move(source: Path, target: Path) -> None:
    """Move a file, unless it was already moved."""
    if source.is_symlink() or source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)


# --- files that this package wrote ----------------------------------------------------------------------------------


def _check_folders(directory: Path, folders: Iterable[str]) -> None:
    """Refuse folders that are links or files."""
    for folder in sorted(set(folders) - {"", "."}):
        path = directory
        for part in PurePosixPath(folder).parts:
            path /= part
            if path.is_symlink():
                raise ValueError(
                    f"{path}: is a link to {path.resolve()}, whose files saving would replace: remove the link, or "
                    "choose another folder."
                )
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path}: is a file, but saving needs a folder of this name: move it away.")


def _check_ours(directory: Path, folders: Iterable[str], variant: str | None) -> None:
    """Refuse a folder with files of another model that saving would replace, or that would be loaded together."""
    names = {"": (PIPELINE_INDEX_NAME, "config.json")}
    if is_repository(directory):
        return
    for folder in sorted(folders):
        for path in sorted((directory / folder).iterdir()) if (directory / folder).is_dir() else []:
            is_weights = is_weight_file(path.name) and variant_of(path.name) == variant
            if is_weights or path.name in names.get(folder, ()):
                raise ValueError(
                    f"{path}: was not written by a save of an Omni-Video model, and saving would replace it: choose "
                    "another folder, or move the file away."
                )


def is_repository(directory: Path) -> bool:
    """Whether a folder has index files at its root, and all of them are those of an Omni-Video model."""
    index, config = (_json_of(directory / name) for name in (PIPELINE_INDEX_NAME, "config.json"))
    found = []
    if index is not None:
        name = index.get("_class_name")
        found.append((name[-1] if isinstance(name, list) and name else name) in PIPELINE_COMPONENTS)
    if config is not None:
        found.append(config.get("model_type") == MODEL_TYPE)
    return bool(found) and all(found)


def _outdated(directory: Path, files: Iterable[str], variant: str | None) -> list[str]:
    """Names of weights of one variant and of code that an earlier save wrote and that `files` replace."""
    groups: dict[str, set[str]] = {}
    for file in map(PurePosixPath, files):
        groups.setdefault(file.parent.as_posix(), set()).add(file.name)
    ours, named = is_repository(directory), _named_by_index(directory)
    outdated = []
    for folder, new in groups.items():
        has_weights, has_code = any(map(is_weight_file, new)), any(map(CODE_FILE.fullmatch, new))
        for path in (directory / folder).iterdir() if (directory / folder).is_dir() else []:
            name = path.relative_to(directory).as_posix()
            if path.name in new or not (path.is_file() or path.is_symlink()):
                continue
            is_old = has_weights and is_weight_file(path.name) and variant_of(path.name) == variant
            is_shard = "-of-" in path.name
            if is_old and ours and (not is_shard or name in named):
                outdated.append(name)
            if has_code and CODE_FILE.fullmatch(path.name) and is_written_code(path):
                outdated.append(name)
    return outdated


def _named_by_index(directory: Path) -> set[str]:
    """Names of the weight files in the index files of a repository."""
    named = set()
    for path in (*directory.glob("*.json"), *directory.glob("*/*.json")):
        if is_index(path.name) and is_weight_file(path.name):
            weight_map = (_json_of(path) or {}).get("weight_map")
            for file in weight_map.values() if isinstance(weight_map, dict) else ():
                named.add((path.parent.relative_to(directory) / str(file)).as_posix())
    return named


def _json_of(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; an empty dict if the content is not an object, `None` if there is no file."""
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


__all__ = [
    "check_finished",
    "commit",
    "finalize_with",
    "finish_saving",
    "is_index",
    "is_repository",
    "is_weight_file",
    "staged",
    "staging",
    "variant_of",
]
