"""Pushing a folder to the Hub: checks of the folder, selection of its files, and one commit."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import HF_HUB_CACHE

from ..utils.files import temporary_folder
from ..utils.tokens import hub_call
from .model_card import model_card
from .remote_code import CODE_FILE
from .repository import (
    PUSHES,
    check_finished,
    check_indices,
    complete_repository,
    index_entries,
    is_weight_file,
    link_root,
    link_weights,
    missing_parts,
    read_header,
    visible_files,
)

SUFFIXES = {".json", ".safetensors", ".jinja", ".txt", ".model", ".md", ".yaml", ".csv"}
MEDIA_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".webm"}
LICENSE_NAMES = ("LICENSE", "NOTICE", "COPYING", ".gitattributes")
LORA_NAME = "pytorch_lora_weights.safetensors"
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


@hub_call
def push_repository(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    base_model: str | Path | None = None,
    link_roots: Sequence[str | Path] = (),
) -> CommitInfo:
    """
    Push a repository, or a folder with a LoRA, in one commit.

    Large files are uploaded first, then one commit makes all files visible. An interrupted push does not change the
    target, and the next push uploads only missing files. The same commit removes weights and code of an earlier push
    that are no longer in the folder.

    Args:
        directory: a folder written by [`finalize_repository`] or `save_lora_weights`.
        repo_id: target repository, `owner/name`; created if it does not exist.
        private: whether a new repository is private.
        revision: branch of the target; created if it does not exist. Default: the default branch.
        create_pr: open a pull request instead of committing.
        commit_message: title of the commit or pull request.
        token: access token of the Hub. Default: the stored one.
        base_model: base model for the model card.
        link_roots: other folders into which symbolic links in `directory` may point.

    Raises:
        ValueError: for an incomplete repository, a damaged weight file, a link that leaves the folder, or a file that
            contains an access token. Nothing is uploaded then.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"`directory` must be an existing folder, got {directory}.")
    check_complete(directory, link_roots)
    card = model_card(directory, repo_id, base_model)
    files: dict[str, Any] = repository_files(directory, link_roots)[0] | {"README.md": card.encode()}
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head: Any = api.repo_info(repo_id, revision=revision)
    operations: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
    existing = (sibling.rfilename for sibling in head.siblings or [])
    folders = {
        name.rpartition("/")[0] for name in files
    }  # files in other folders were not written by a push of this folder
    outdated = [name for name in existing if name.rpartition("/")[0] in folders and _is_ours(name)]
    operations += [CommitOperationDelete(name) for name in outdated if name not in files]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload Omni-Video",
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )


@hub_call
def push_completed(directory: str | Path, repo_id: str, base: str | Path, **kwargs: Any) -> CommitInfo:
    """
    Push a saved model together with missing components from the repository of its base model.

    The folder itself is not changed.

    Args:
        directory: a folder written by `OmniVideoForConditionalGeneration.save_pretrained`.
        repo_id: target repository, `owner/name`.
        base: folder or Hub repository of the base model, see [`complete_repository`].
        kwargs: other arguments of [`push_repository`].

    Raises:
        ValueError: without `base`, and see [`complete_repository`] and [`push_repository`].
    """
    token = kwargs.get("token")
    if not base:
        raise ValueError(
            f"{directory}: the repository that this model was trained from is unknown, and missing components such as "
            "the VAE come from there: pass `base`, a folder or Hub repository."
        )
    with temporary_folder(PUSHES) as folder:
        roots = [Path(directory)]
        is_component = not (Path(directory) / "mllm").is_dir()  # a model with MLLM and vision head only
        for file, path in repository_files(Path(directory))[0].items():
            target = folder / ("mllm" if is_component and _is_of_component(file) else "") / file
            target.parent.mkdir(parents=True, exist_ok=True)
            link_weights(path, target)
        complete_repository(folder, base, token=token, link=True)
        roots.append(link_root(base) if Path(base).is_dir() else Path(HF_HUB_CACHE))
        return push_repository(folder, repo_id, base_model=base, link_roots=roots, **kwargs)


def check_complete(directory: Path, link_roots: Sequence[str | Path] = ()) -> None:
    """
    Refuse a folder that cannot be loaded.

    Args:
        directory: the repository, or a folder with a LoRA.
        link_roots: other folders into which symbolic links may point.

    Raises:
        ValueError: for missing or damaged files, or an index that names files outside the folder.
    """
    check_finished(directory)
    if (directory / LORA_NAME).is_file():
        read_header(directory / LORA_NAME)
        return
    missing = missing_parts(directory)
    if missing:
        raise ValueError(
            f"{directory}: is not a complete repository: {', '.join(missing)} missing. Complete a saved model from "
            "its base model with `complete_repository(folder, base)`, or push it with `omni-video push --base`."
        )
    check_indices(directory, link_roots)
    for index in visible_files(directory, "*.index*.json"):
        for name in index_entries(index):
            if not (index.parent / name).is_file():
                raise ValueError(f"{index}: names {name}, which does not exist. Save or download the model again.")
    for file in visible_files(directory, "*.safetensors"):
        read_header(file)


def repository_files(directory: Path, link_roots: Sequence[str | Path] = ()) -> tuple[dict[str, Path], list[str]]:
    """
    Select the files of a folder that belong to a repository.

    Hidden files, checkpoints of a trainer, pickles, and scripts other than the repository's code are left out.

    Returns:
        Files by their names in the repository, and names of the files that are left out.

    Raises:
        ValueError: for a link that leaves the folder, or a text file that contains an access token.
    """
    roots = [Path(root).resolve() for root in (link_root(directory), *link_roots)]
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for folder, subfolders, names in os.walk(directory):
        hidden = [name for name in subfolders if name.startswith((".", "checkpoint-")) or name == "__pycache__"]
        subfolders[:] = sorted(set(subfolders) - set(hidden))
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        left_out += [f"{(Path(folder) / name).relative_to(directory).as_posix()}/" for name in hidden]
        for name in sorted([*names, *links]):
            path = Path(folder) / name
            relative = path.relative_to(directory).as_posix()
            if not _belongs(path):
                left_out.append(relative)
            elif not any(path.resolve().is_relative_to(root) for root in roots):
                raise ValueError(
                    f"{path}: is a link to {path.resolve()}, outside the folder. Copy the file, or remove it."
                )
            elif path.suffix != ".safetensors" and path.stat().st_size < 10**7 and _TOKEN.search(path.read_bytes()):
                raise ValueError(f"{path}: contains an access token (hf_...). Remove it, and revoke the token.")
            else:
                files[relative] = path
    return files, sorted(left_out)


def _belongs(path: Path) -> bool:
    if path.name in LICENSE_NAMES:
        return True
    if path.name.startswith(".") or path.is_dir():
        return False
    if path.suffix == ".py":
        return CODE_FILE.fullmatch(path.name) is not None
    return path.suffix.lower() in SUFFIXES | MEDIA_SUFFIXES


def _is_of_component(name: str) -> bool:
    return name in ("config.json", "generation_config.json") or is_weight_file(name)


def _is_ours(name: str) -> bool:
    """Whether the name of a file in the target is that of code or weights that saving writes."""
    base = name.rpartition("/")[2]
    return CODE_FILE.fullmatch(base) is not None or is_weight_file(base)


__all__ = ["check_complete", "push_completed", "push_repository", "repository_files"]
