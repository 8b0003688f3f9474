"""A repository of the test Hub, in memory: commits, refs, LFS objects, and what may become a commit. No HTTP here."""

import base64
import codecs
import fnmatch
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from hub_cards import card_problems

MAX_REGULAR_SIZE = 10 * 1024**2  # a larger file has to go through LFS
LFS_TEXT = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz
*.zip *.zst *tfevents*
"""  # the patterns in the `.gitattributes` of a new repository

Files = dict[str, "Blob"]


class RefusalError(Exception):
    """An answer other than 2xx, with what the client reads its reason from."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers | {"X-Error-Message": " ".join(message.split())}
        if code:
            self.headers["X-Error-Code"] = code


def git_oid(data: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        size = len(self.data)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Of what git stores: the file, or for LFS the pointer to it."""
        return git_oid(self.pointer if self.lfs else self.data)

    def entry(self, path: str) -> dict[str, Any]:
        """As listed in a tree."""
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry | {"lfs": lfs} if self.lfs else entry

    def sibling(self, path: str) -> dict[str, Any]:
        """As listed in a repository's info."""
        sibling = {"rfilename": path, "blobId": self.oid, "size": len(self.data)}
        lfs = {"sha256": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return sibling | {"lfs": lfs} if self.lfs else sibling


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    message: str
    author: str
    date: str
    files: Files
    parent: "Commit | None"


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False  # only its owner passes the gate here
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # full name -> sha
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded LFS objects by sha256

    def __post_init__(self) -> None:
        attributes = Blob(gitattributes(LFS_TEXT.split()))
        self.commit("refs/heads/main", {".gitattributes": attributes}, "initial commit", "", "system", None)

    def find(self, revision: str) -> Commit:
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for sha, commit in self.commits.items():
                if sha.startswith(revision):
                    return commit
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def branch(self, revision: str) -> str:
        """The full name of a branch or pull request: commits cannot be added to a tag or to a commit."""
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs or ref.startswith("refs/tags/"):
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return ref

    def add_ref(self, ref: str, target: str) -> None:
        if ref in self.refs:
            raise RefusalError(409, f"Reference already exists: {ref}")
        self.refs[check_path(ref)] = self.find(target).sha

    def commit(self, ref: str, files: Files, title: str, message: str, author: str, parent: Commit | None) -> Commit:
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        tree = sorted((path, blob.oid) for path, blob in files.items())
        sha = git_oid(repr((parent and parent.sha, ref, title, message, author, date, tree)).encode(), "commit")
        self.commits[sha] = Commit(sha, title, message, author, date, files, parent)
        self.refs[ref] = sha
        return self.commits[sha]

    def changed(self, before: Files, operations: Iterable[tuple[str, dict[str, Any]]]) -> Files:
        """`before` after the operations of a commit, or a refusal."""
        files = dict(before)
        for key, value in operations:
            path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
            if key == "file":
                files[path] = regular(path, base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[path] = self.uploaded(path, value["oid"], value.get("size"))
            elif key in {"deletedFile", "deletedFolder"}:
                gone = [p for p in files if (p.startswith(f"{path}/") if key == "deletedFolder" else p == path)]
                if not gone:
                    raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {p: blob for p, blob in files.items() if p not in gone}
            else:
                raise RefusalError(400, f"Unknown operation: {key}")
        check_result(before, files)
        return files

    def uploaded(self, path: str, oid: str, size: int | None) -> Blob:
        data = self.objects.get(oid)
        if data is None or size not in {None, len(data)}:
            raise RefusalError(400, f"{path}: its LFS pointer points to a file that does not exist")
        return Blob(data, lfs=True)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.find(revision).files.items()}


def tracked_by_lfs(files: Files, path: str) -> bool:
    lines = files[".gitattributes"].data.decode().splitlines() if ".gitattributes" in files else []
    patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
    return any(fnmatch.fnmatchcase(path if "/" in glob else path.rsplit("/", 1)[-1], glob) for glob in patterns)


def needs_lfs(files: Files, path: str, size: int, sample: bytes) -> bool:
    """The Hub's choice: what `.gitattributes` names, what is large, and what is binary; never an empty file."""
    return size > 0 and (tracked_by_lfs(files, path) or size > MAX_REGULAR_SIZE or not looks_like_text(sample))


def looks_like_text(sample: bytes) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(sample)  # may end inside a character
    except UnicodeDecodeError:
        return False


def gitattributes(patterns: Iterable[str]) -> bytes:
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns).encode()


def check_path(path: str) -> str:
    if "\\" in path or any(part in {"", ".", ".."} or part.lower() == ".git" for part in path.split("/")):
        raise RefusalError(400, f"Invalid path: {path!r}")
    return path


def regular(path: str, data: bytes) -> Blob:
    if len(data) > MAX_REGULAR_SIZE:
        raise RefusalError(400, f"{path} is larger than 10 MiB: use LFS")
    return Blob(data)


def check_result(before: Files, files: Files) -> None:
    """Refuse a bad card and a path that is both file and folder; note LFS files that no pattern covers yet."""
    if "README.md" in files and files["README.md"] != before.get("README.md"):
        errors, _ = card_problems(files["README.md"].data.decode())
        if errors:
            raise RefusalError(400, "Invalid metadata in README.md.\n" + "\n".join(f"- {error}" for error in errors))
    for path in files:
        if any(other.startswith(f"{path}/") for other in files):
            raise RefusalError(400, f"{path} is both a file and a folder")
    untracked = sorted(path for path, blob in files.items() if blob.lfs and not tracked_by_lfs(files, path))
    if untracked:
        old = files[".gitattributes"].data if ".gitattributes" in files else b""
        files[".gitattributes"] = Blob(old + gitattributes(untracked))
