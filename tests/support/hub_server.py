"""A small Hugging Face Hub on loopback: the real HTTP protocol for huggingface_hub's own, unpatched client.

Two listeners, as in reality: the Hub itself, and a storage host that takes and gives large files through signed
addresses and refuses a request that brings a token along. Storage is in memory. What the real Hub refuses is refused
here, every request is recorded (`HubServer.requests`), and `HubServer.fail` breaks those that a test wants broken.

huggingface_hub 2.4 sends large files through Xet whenever `hf_xet` is installed, whatever the server says, and Xet is
another protocol. Clients therefore run with `HF_HUB_DISABLE_XET=1`, in a process of their own (`run_client`), because
the client reads its environment at import.
"""

import base64
import fnmatch
import hashlib
import hmac
import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

import pytest
from hub_cards import NAME, card_data, card_problems
from hub_http import Fault, Listener, Request, Response
from hub_repo import Blob, Commit, RefusalError, Repo, check_path, git_oid, needs_lfs


@dataclass(frozen=True)
class User:
    name: str
    orgs: tuple[str, ...] = ()
    can_write: bool = True

    def owns(self, repo_name: str) -> bool:
        return repo_name.partition("/")[0] in (self.name, *self.orgs)


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any], str]] = []
REPO = r"(?P<name>[^/]+/[^/]+)"
API, REV = rf"/api/(?:models|spaces)/{REPO}", r"(?P<revision>[^/]+)"


def route(methods: str, pattern: str, access: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`access` is "read" or "write" for a route of a repository, which then is the argument after the request."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.extend((method, re.compile(pattern), function, access) for method in methods.split())
        return function

    return add


class HubServer:
    """The Hub: `token` writes as `tester` and for `lab`, `read_token` only reads, `stranger_token` is not theirs."""

    def __init__(self, home: str | Path) -> None:
        self.home = Path(home)  # HF_HOME of the clients
        self.token, self.read_token, self.stranger_token = (f"hf_{secrets.token_hex(17)}" for _ in range(3))
        self.users = {
            self.token: User("tester", ("lab",)),
            self.read_token: User("tester", ("lab",), can_write=False),
            self.stranger_token: User("stranger"),
        }
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.uploads: list[tuple[str, str, int]] = []  # repository, sha256, size of each LFS object that arrived
        self.output = ""  # all that clients run by `run_client` have printed
        self.page_size = 1000
        self.multipart_size = 5 * 1024**3  # an LFS object above this comes in parts of this size
        self._parts: dict[str, dict[int, bytes]] = {}
        self._secret = secrets.token_bytes(16)
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._hub, self._storage = Listener(self, "hub"), Listener(self, "storage")
        self.url, self.storage_url = self._hub.url, self._storage.url

    def close(self) -> None:
        for listener in (self._hub, self._storage):
            listener.shutdown()
            listener.server_close()

    # What tests use

    def add_repo(self, name: str, files: Mapping[str, bytes] | Path, *, private: bool = False) -> Repo:
        """A repository with these files or the content of this folder, made without a client."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        repo = self.repos[name] = Repo(name, private)
        base = repo.find("main")
        blobs = {path: Blob(data, needs_lfs(base.files, path, len(data), data[:512])) for path, data in files.items()}
        repo.objects |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
        repo.commit("refs/heads/main", base.files | blobs, "Add files", "", "tester", base)
        return repo

    def fail(self, method: str, path: str, status: int | str = 503, *, times: int = 1, after_bytes: int = 0) -> Fault:
        """Break the next `times` requests with this method and a path that the expression `path` is found in.

        `status` is a code; or "cut": close the connection after `after_bytes` of the request's body, or of the answer
        where the request has none; or "lost": do what is asked, then close the connection without an answer.
        """
        fault = Fault(method, path, status, times, after_bytes)
        self._faults.append(fault)
        return fault

    def calls(self, method: str, path: str = "") -> list[Request]:
        return [r for r in self.requests if method == r.method and re.search(path, unquote(r.path))]

    def received(self) -> int:
        """Bytes of request bodies so far."""
        return sum(len(request.body) for request in self.requests)

    def leaks(self, secret: str) -> list[Request]:
        """Requests with `secret` anywhere but in the Authorization header of a request to the Hub itself."""

        def parts(request: Request) -> Iterator[str]:
            yield f"{request.path} {request.query} {request.body!r}"
            for name, value in request.headers.items():
                if request.host != "hub" or name.lower() != "authorization":
                    yield value

        return [request for request in self.requests if any(secret in part for part in parts(request))]

    # Dispatch and access

    def take_fault(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == request.method and re.search(fault.path, unquote(request.path)):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Response:
        try:
            with self._lock:
                result = self._call_route(request)
        except RefusalError as error:
            return Response.refusal(error)
        return result if isinstance(result, Response) else Response.of(result)

    def _call_route(self, request: Request) -> Any:
        if request.host == "storage":
            if "Authorization" in request.headers:
                raise RefusalError(400, "Only one auth mechanism allowed")
            if request.query.get("signature") != [self._signature(request.path)]:
                raise RefusalError(403, "The request signature we calculated does not match")
        for method, pattern, function, access in ROUTES:
            match = pattern.fullmatch(request.path) if method == request.method else None
            if match:
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if access:
                    return function(self, request, self._open(request, arguments.pop("name"), access), **arguments)
                return function(self, request, **arguments)
        raise RefusalError(404, "Sorry, we can't find the page you are looking for.")

    def _user(self, request: Request) -> User | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def _login(self, request: Request) -> User:
        user = self._user(request)
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        return user

    def _open(self, request: Request, name: str, access: str) -> Repo:
        """The repository, if the request may have it; a pull request is open to everyone who may read."""
        user, repo = self._user(request), self.repos.get(name)
        if repo is None or (repo.private and not (user and user.owns(name))):
            raise RefusalError(404 if user else 401, "Repository not found", "RepoNotFound")
        if access == "write":
            user = self._login(request)
            pull_request = request.flag("create_pr") or (request.path.endswith("/batch") and "ref" not in request.json)
            if not pull_request and not (user.can_write and user.owns(name)):
                raise RefusalError(403, f"You don't have the rights to write to {name}")
        return repo

    def _signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()

    def _signed(self, path: str) -> str:
        return f"{self.storage_url}{path}?signature={self._signature(path)}"

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> dict[str, Any]:
        user = self._login(request)
        role = {"displayName": "test", "role": "write" if user.can_write else "read"}
        identity = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name}
        return identity | {"orgs": [{"name": org} for org in user.orgs], "auth": {"accessToken": role}}

    @route("POST", "/api/validate-yaml")
    def _validate_card(self, request: Request) -> Response:
        errors, warnings = card_problems(request.json["content"])
        found = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return Response.of(found, 400 if errors else 200)

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Any:
        user, asked = self._login(request), request.json
        name = f"{asked.get('organization') or user.name}/{asked['name']}"
        if (
            asked.get("type", "model") not in ("model", "space")
            or not re.fullmatch(f"{NAME}/{NAME}", name)
            or len(name) > 96
        ):
            raise RefusalError(400, f"Not a model repository, or not a name for one: {name}")
        if not user.can_write or not user.owns(name):
            raise RefusalError(403, f"You don't have the rights to create a model under this namespace: {name}")
        url = f"{self.url}/{name}"
        if name in self.repos:
            return Response.of({"error": "You already created this model repo", "url": url}, 409)
        self.repos[name] = Repo(name, asked.get("visibility") == "private")
        return {"url": url, "name": name}

    @route("GET", f"{API}(?:/revision/{REV})?", "read")
    def _info(self, request: Request, repo: Repo, revision: str = "main") -> dict[str, Any]:
        commit = repo.find(revision)
        siblings = [blob.sibling(path) for path, blob in sorted(commit.files.items())]
        readme = commit.files.get("README.md")
        card = (card_data(readme.data.decode()) if readme else None) or {}
        info = {
            "author": repo.name.partition("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "siblings": siblings if request.flag("blobs") else [{"rfilename": s["rfilename"]} for s in siblings],
            "cardData": card,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "usedStorage": sum(map(len, repo.objects.values())),
        }
        wanted = request.query.get("expand", info)
        return {"id": repo.name, "modelId": repo.name} | {key: info[key] for key in info if key in wanted}

    @route("GET", f"{API}/tree/{REV}(?:/(?P<folder>.+))?", "read")
    def _tree(self, request: Request, repo: Repo, revision: str, folder: str = "") -> Response:
        files, prefix = repo.find(revision).files, f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(path for path in files if path.startswith(prefix)):
            parts = path.split("/")
            for parent in ("/".join(parts[:depth]) for depth in range(prefix.count("/") + 1, len(parts))):
                inside = sorted(f"{p} {blob.oid}" for p, blob in files.items() if p.startswith(f"{parent}/"))
                oid = git_oid("\n".join(inside).encode(), "tree")
                entries[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
            entries[path] = files[path].entry(path)
        if folder and not entries:
            raise RefusalError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        deep = request.flag("recursive")
        listed = [entry for path, entry in entries.items() if deep or "/" not in path.removeprefix(prefix)]
        start = int(request.query.get("cursor", ["0"])[0])
        query = urlencode(request.query | {"cursor": [start + self.page_size]}, doseq=True)
        following = f'<{self.url}{request.path}?{query}>; rel="next"'
        page = listed[start : start + self.page_size]
        return Response.of(page, **({"Link": following} if page != listed[start:] else {}))

    @route("POST", f"{API}/paths-info/{REV}", "read")
    def _paths_info(self, request: Request, repo: Repo, revision: str) -> list[dict[str, Any]]:
        files = repo.find(revision).files
        return [files[p].entry(p) for p in parse_qs(request.body.decode()).get("paths", []) if p in files]

    @route("GET", f"{API}/commits/{REV}", "read")
    def _history(self, request: Request, repo: Repo, revision: str) -> list[dict[str, Any]]:
        commit: Commit | None = repo.find(revision)
        history = []
        while commit is not None:
            told = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            history.append(told | {"authors": [{"user": commit.author}]})
            commit = commit.parent
        return history

    @route("GET", f"{API}/refs", "read")
    def _refs(self, request: Request, repo: Repo) -> dict[str, Any]:
        def listed(kind: str, cut: int) -> list[dict[str, str]]:
            return [{"name": r[cut:], "ref": r, "targetCommit": s} for r, s in repo.refs.items() if r.startswith(kind)]

        answer = {"branches": listed("refs/heads/", 11), "tags": listed("refs/tags/", 10), "converts": []}
        return answer | ({"pullRequests": listed("refs/pr/", 0)} if request.flag("include_prs") else {})

    @route("POST", f"{API}/branch/{REV}", "write")
    def _add_branch(self, request: Request, repo: Repo, revision: str) -> None:
        repo.add_ref(f"refs/heads/{revision}", request.json.get("startingPoint", "main"))

    @route("POST", f"{API}/tag/{REV}", "write")
    def _add_tag(self, request: Request, repo: Repo, revision: str) -> None:
        repo.add_ref(f"refs/tags/{request.json['tag']}", revision)

    # Upload

    @route("POST", f"{API}/preupload/{REV}", "write")
    def _preupload(self, request: Request, repo: Repo, revision: str) -> dict[str, Any]:
        files, asked, answers = repo.commits[repo.refs[repo.branch(revision)]].files, request.json, []
        ignored = [line for line in asked.get("gitIgnore", "").splitlines() if line and not line.startswith("#")]
        for file in asked["files"]:
            path = check_path(file["path"])
            lfs = needs_lfs(files, path, file["size"], base64.b64decode(file["sample"]))
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
            answer["shouldIgnore"] = any(fnmatch.fnmatch(path, glob) for glob in ignored)
            if path in files:
                answer["oid"] = files[path].sha256 if files[path].lfs else files[path].oid
            answers.append(answer)
        return {"files": answers}

    @route("POST", rf"/(?:spaces/)?{REPO}\.git/info/lfs/objects/batch", "write")
    def _lfs_batch(self, request: Request, repo: Repo) -> dict[str, Any]:
        """An object that is already there gets no upload action; this is how a second push sends what is missing."""
        objects: list[dict[str, Any]] = []
        for wanted in request.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size, "authenticated": True}
            if oid not in repo.objects:
                place = f"/{repo.name}/{oid}/{size}"
                upload: dict[str, Any] = {"href": self._signed(f"/upload{place}")}
                if size > self.multipart_size:
                    number, count = secrets.token_hex(8), -(-size // self.multipart_size)
                    self._parts[number] = {}
                    header = {str(i): self._signed(f"/part/{number}/{i}") for i in range(1, count + 1)}
                    upload = {"href": f"{self.url}/api/complete_multipart/{number}{place}"}
                    upload["header"] = header | {"chunk_size": str(self.multipart_size)}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/api/lfs-verify/{repo.name}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    PLACE = rf"{REPO}/(?P<oid>\w+)/(?P<size>\d+)"

    @route("PUT", f"/upload/{PLACE}")
    def _put(self, request: Request, name: str, oid: str, size: str, data: bytes | None = None) -> Response:
        data = request.body if data is None else data
        if len(data) != int(size) or hashlib.sha256(data).hexdigest() != oid:
            raise RefusalError(422, f"What arrived is not the object announced: {oid}, {size} bytes")
        self.repos[name].objects[oid] = data
        self.uploads.append((name, oid, len(data)))
        return Response()

    @route("PUT", r"/part/(?P<number>\w+)/(?P<index>\d+)")
    def _put_part(self, request: Request, number: str, index: str) -> Response:
        self._parts[number][int(index)] = request.body
        return Response(headers={"ETag": hashlib.sha256(request.body).hexdigest()})

    @route("POST", rf"/api/complete_multipart/(?P<number>\w+)/{PLACE}")
    def _complete(self, request: Request, number: str, name: str, oid: str, size: str) -> Response:
        parts = sorted(self._parts.pop(number).items())
        arrived = [{"partNumber": index, "etag": hashlib.sha256(data).hexdigest()} for index, data in parts]
        if request.json != {"oid": oid, "parts": arrived}:
            raise RefusalError(400, "These are not the parts that arrived")
        return self._put(request, name, oid, size, b"".join(data for _, data in parts))

    @route("POST", f"/api/lfs-verify/{REPO}", "read")
    def _verify(self, request: Request, repo: Repo) -> None:
        repo.uploaded("verify", request.json["oid"], request.json["size"])

    @route("POST", f"{API}/commit/{REV}", "write")
    def _commit(self, request: Request, repo: Repo, revision: str) -> dict[str, Any]:
        header, *operations = (json.loads(line) for line in request.body.splitlines() if line.strip())
        head, create_pr, ref = header["value"], request.flag("create_pr"), repo.branch(revision)
        base, parent = repo.find(ref), head.get("parentCommit", "")
        if create_pr:
            base = repo.find(parent) if parent else base
            ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}"
        elif not base.sha.startswith(parent):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = repo.changed(base.files, ((operation["key"], operation["value"]) for operation in operations))
        author = self._login(request).name
        commit = repo.commit(ref, files, head["summary"], head.get("description", ""), author, base)
        page = f"{self.url}/{repo.name}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        return answer | ({"pullRequestUrl": f"{page}/discussions/{ref.rpartition('/')[2]}"} if create_pr else {})

    # Download

    @route("GET HEAD", f"/(?:spaces/)?{REPO}/resolve/{REV}/(?P<path>.+)", "read")
    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        user = self._user(request)
        if repo.gated and not (user and user.owns(repo.name)):
            raise RefusalError(403 if user else 401, f"Access to model {repo.name} is restricted", "GatedRepo")
        commit = repo.find(revision)
        place = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise RefusalError(404, "Entry not found", "EntryNotFound", **place)
        blob = commit.files[path]
        if not blob.lfs:
            return self._content(request, blob.data, place | {"ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.sha256}"'}
        return Response(302, b"Found", place | linked | {"Location": self._signed(f"/blob/{repo.name}/{blob.sha256}")})

    @route("GET HEAD", rf"/blob/{REPO}/(?P<oid>\w+)")
    def _blob(self, request: Request, name: str, oid: str) -> Response:
        return self._content(request, self.repos[name].objects[oid], {"ETag": f'"{oid}"'})

    @staticmethod
    def _content(request: Request, data: bytes, headers: dict[str, str]) -> Response:
        headers = headers | {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(?=\d|-\d)(\d*)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            return Response(200, data, headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= stop:
            return Response(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        return Response(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


# Clients


def client_env(server: HubServer, token: str | None = None, **env: str) -> dict[str, str]:
    """The environment of a client of this server alone: its own cache, its token (`""` for none), no proxy."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_", "XDG_CACHE_HOME")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and not k.lower().endswith("_proxy")}
    own = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token if token is None else token, "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HOME": str(server.home), "HF_HUB_CACHE": str(server.home / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | own | env


SHORT_WAITS = "import time\ntime.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02))\n"


def start_client(
    code: str, server: HubServer, *, token: str | None = None, short_waits: bool = True, **env: str
) -> "subprocess.Popen[str]":
    """A Python process running `code`. The client's waits before a new try, 23 s in all, are cut short by default."""
    command = [sys.executable, "-c", (SHORT_WAITS if short_waits else "") + code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=client_env(server, token, **env), stdout=pipe, stderr=pipe, text=True)


def run_client(code: str, server: HubServer, *, fails: bool = False, **options: Any) -> str:
    """Run `code` in a fresh process and return what it prints; with `fails=True` it has to fail, and stderr comes."""
    out, err = (process := start_client(code, server, **options)).communicate()
    server.output += out + err
    assert (process.returncode != 0) == fails, f"exit status {process.returncode}\n{out}\n{err}"
    return err if fails else out


@pytest.fixture(name="hub_server")
def hub_server_fixture(tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer(tmp_path / "hf_home")
    yield server
    server.close()
