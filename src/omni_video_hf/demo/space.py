"""Push the page to a Space of the Hub, together with the code of this package."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError

from ..shapes import CHECKPOINT, CHECKPOINT_NAME
from ..utils.tokens import hub_call

PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = "spaces/omni-video"  # in the installed package, or at the root of a checkout
APP, CARD, MODEL = "app.py", "README.md", "model.txt"
OURS = "Written by `omni-video push-space`"  # in the first line of `app.py`


@hub_call
def push_space(
    repo_id: str,
    model: str = CHECKPOINT_NAME,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """
    Push the page to a Space, in one commit.

    The same commit removes modules of an earlier push that the package does not have any more. Every other file of
    the Space stays, and so does the card of a Space that this function has pushed before: a person may have edited it.

    Args:
        repo_id: Space, `owner/name`; created if it does not exist.
        model: Hub repository that the page loads, or the name of the default checkpoint, which is pushed along.
        private: whether a new Space is private.
        create_pr: open a pull request instead of committing.
        commit_message: title of the commit or pull request.
        token: access token of the Hub. Default: the stored one.

    Raises:
        ValueError: for a Space with an app that this function did not push. Nothing is uploaded then.
    """
    api = HfApi(token=token)
    created = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    head: Any = api.repo_info(created.repo_id, repo_type="space")
    existing = {sibling.rfilename for sibling in head.siblings or []}
    is_ours = APP in existing and _is_ours(api, created.repo_id, head.sha)
    if APP in existing and not is_ours:
        raise ValueError(
            f"{repo_id}: this Space has an `{APP}` that `omni-video push-space` did not write: choose another name, "
            "or remove that file from the Space."
        )
    files = space_files(model)
    if is_ours and CARD in existing:
        files.pop(CARD)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    if is_ours:
        outdated = {name for name in existing if name.startswith(f"{PACKAGE.name}/") or name == MODEL} - files.keys()
        operations += [CommitOperationDelete(name) for name in sorted(outdated)]
    return api.create_commit(
        created.repo_id,
        operations,
        repo_type="space",
        commit_message=commit_message or "Upload the page of Omni-Video",
        create_pr=create_pr,
        parent_commit=head.sha,
    )


def space_files(model: str = CHECKPOINT_NAME) -> dict[str, bytes | Path]:
    """
    Files of the Space by their names: the page, and this package; its checkpoint only if the page loads it.

    Args:
        model: as in [`push_space`].
    """
    files: dict[str, bytes | Path] = {path.name: path for path in sorted(_folder().iterdir()) if path.is_file()}
    for path in sorted(PACKAGE.rglob("*")):
        relative = path.relative_to(PACKAGE)
        is_checkpoint = relative.parts[0] == CHECKPOINT.name
        if not path.is_file() or "__pycache__" in relative.parts or relative.parts[0] == "spaces":
            continue
        if not is_checkpoint or model == CHECKPOINT_NAME:
            files[f"{PACKAGE.name}/{relative.as_posix()}"] = path
    if model != CHECKPOINT_NAME:
        files[MODEL] = f"{model}\n".encode()
    return files


def _folder() -> Path:
    """Folder with the files of the Space."""
    for root in (PACKAGE, PACKAGE.parents[1]):
        if (root / FOLDER / APP).is_file():
            return root / FOLDER
    raise FileNotFoundError(f"{PACKAGE / FOLDER}: is missing from this installation. Install omni-video-hf again.")


def _is_ours(api: HfApi, repo_id: str, revision: str) -> bool:
    """Whether the app of a Space was pushed by [`push_space`]."""
    try:
        path = api.hf_hub_download(repo_id, APP, repo_type="space", revision=revision)
    except EntryNotFoundError:
        return False
    return OURS in Path(path).read_text(encoding="utf-8").partition("\n")[0]


__all__ = ["push_space", "space_files"]
