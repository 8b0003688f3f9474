"""The test Hub, driven by huggingface_hub's own client and, where that would never ask, by plain requests."""

import base64
import hashlib
import json
import random
import time
import urllib.error
import urllib.request

import pytest
from hub_cards import card_problems
from hub_server import hub_server_fixture, run_client, start_client  # noqa: F401

NAME = "tester/model"
WAIT = 900  # seconds after which a test that hangs fails
CARD = b"---\nlicense: apache-2.0\npipeline_tag: any-to-any\nbase_model: org/name\ntags:\n- video\n---\n# Model\n"
CREATE = f"from huggingface_hub import HfApi\napi = HfApi()\napi.create_repo({NAME!r}, exist_ok=True)\n"


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)  # noqa: S311


@pytest.fixture
def folder(tmp_path):
    files = {
        "README.md": CARD,
        "config.json": b"{}\n",
        "empty.txt": b"",
        "model.safetensors": noise(300_000),
        "vae/weights.safetensors": noise(200_000, 1),
        "assets/image.png": b"\x89PNG\r\n" + noise(2_000, 2),
        ".git/config": b"not for the Hub",
    }
    for path, data in files.items():
        target = tmp_path / "folder" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return tmp_path / "folder"


def upload(folder, **options):
    arguments = {"repo_id": NAME, "folder_path": str(folder), **options}
    return f"{CREATE}print(api.upload_folder(**{arguments!r}).oid)\n"


def expected(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def content(repo, revision="main"):
    return {path: data for path, data in repo.files(revision).items() if path != ".gitattributes"}


def ask(server, method, path, body=None, token=None):
    """Status and text of a plain request, without a client that would refuse to send it."""
    url = path if path.startswith("http") else f"{server.url}{path}"
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def commit(server, *operations):
    lines = [{"key": "header", "value": {"summary": "by hand"}}, *({"key": k, "value": v} for k, v in operations)]
    body = "\n".join(map(json.dumps, lines)).encode()
    return ask(server, "POST", f"/api/models/{NAME}/commit/main", body, server.token)


def test_a_push_is_complete_and_a_second_one_sends_only_what_changed(hub_server, folder):
    sha = run_client(upload(folder), hub_server).strip()
    repo = hub_server.repos[NAME]
    assert content(repo) == expected(folder)
    assert repo.find("main").sha == sha
    lfs = {path for path, blob in repo.find("main").files.items() if blob.lfs}
    assert lfs == {"model.safetensors", "vae/weights.safetensors", "assets/image.png"}
    assert b"assets/image.png filter=lfs" in repo.files()[".gitattributes"]  # as the Hub notes it
    assert len(hub_server.uploads) == 3
    before = hub_server.received()

    assert run_client(upload(folder), hub_server).strip() == sha
    assert len(hub_server.uploads) == 3
    assert hub_server.received() - before < 10_000

    (folder / "vae/weights.safetensors").write_bytes(noise(200_000, 3))
    assert run_client(upload(folder), hub_server).strip() != sha
    assert [size for _, _, size in hub_server.uploads[3:]] == [200_000]
    assert content(repo) == expected(folder)
    assert not hub_server.leaks(hub_server.token)
    assert hub_server.token not in hub_server.output


def test_large_objects_come_in_parts(hub_server, folder):
    hub_server.multipart_size = 128_000
    run_client(upload(folder), hub_server)
    assert content(hub_server.repos[NAME]) == expected(folder)
    assert len(hub_server.calls("PUT", "^/part/")) == 5
    assert len(hub_server.calls("PUT", "^/upload/")) == 1


def test_pull_requests_branches_tags_and_history(hub_server, folder):
    code = f"""
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
name = {NAME!r}

def status(call, **options):
    try:
        call(name, **options)
    except HfHubHTTPError as error:
        return error.response.status_code

found = {{}}
main = api.model_info(name).sha
api.create_branch(name, branch="next/one")
api.create_tag(name, tag="v1", revision=main[:7])
pull = api.upload_folder(repo_id=name, folder_path={str(folder)!r}, create_pr=True)
found["pull"] = [pull.pr_revision, pull.pr_num]
found["main moved"] = api.model_info(name).sha != main
api.upload_folder(repo_id=name, folder_path={str(folder)!r}, revision="next/one")
api.delete_file("config.json", name, revision="next/one")
api.delete_folder("vae", name, revision="next/one")
refs = api.list_repo_refs(name, include_pull_requests=True)
found["refs"] = [ref.ref for ref in refs.branches + refs.tags + refs.pull_requests]
found["tag"] = refs.tags[0].target_commit == main
found["titles"] = [commit.title for commit in api.list_repo_commits(name, revision="next/one")]
found["tree"] = [entry.path for entry in api.list_repo_tree(name, recursive=True, revision="refs/pr/1")]
found["top"] = [entry.path for entry in api.list_repo_tree(name, revision="refs/pr/1")]
found["vae"] = [entry.path for entry in api.list_repo_tree(name, "vae", revision="refs/pr/1")]
info = api.model_info(name, revision="refs/pr/1", files_metadata=True)
sizes = {{s.rfilename: [s.size, s.lfs and s.lfs.sha256] for s in info.siblings}}
found["weights"] = sizes["model.safetensors"]
found["card"] = [info.pipeline_tag, info.card_data.license, info.tags]
found["expand"] = api.model_info(name, expand=["sha"]).sha == main
found["paths"] = [f.path for f in api.get_paths_info(name, ["empty.txt", "no"], revision="refs/pr/1")]
add = [CommitOperationAdd("a.txt", b"a")]
first = api.create_commit(name, add, commit_message="one", parent_commit=main).oid
stale = [CommitOperationAdd("a.txt", b"b")]
found["statuses"] = [
    status(api.create_commit, operations=stale, commit_message="two", parent_commit=main),
    status(api.create_commit, operations=stale, commit_message="two", revision="nowhere"),
    status(api.create_commit, operations=[CommitOperationDelete("no.txt")], commit_message="two"),
    status(api.create_repo), status(api.create_branch, branch="main"), status(api.create_tag, tag="v1"),
]
print(json.dumps(found))
"""
    hub_server.page_size = 3  # six files, two folders: three pages
    found = json.loads(run_client(CREATE + code, hub_server))
    top = [".gitattributes", "README.md", "config.json", "empty.txt", "model.safetensors"]
    assert found == {
        "pull": ["refs/pr/1", 1],
        "main moved": False,
        "refs": ["refs/heads/main", "refs/heads/next/one", "refs/tags/v1", "refs/pr/1"],
        "tag": True,
        "titles": [
            "Delete folder vae with huggingface_hub",
            "Delete config.json with huggingface_hub",
            "Upload folder using huggingface_hub",
            "initial commit",
        ],
        "tree": sorted([*top, "assets", "assets/image.png", "vae", "vae/weights.safetensors"]),
        "top": sorted([*top, "assets", "vae"]),
        "vae": ["vae/weights.safetensors"],
        "weights": [300_000, hashlib.sha256(noise(300_000)).hexdigest()],
        "card": ["any-to-any", "apache-2.0", ["video"]],
        "expand": True,
        "paths": ["empty.txt"],
        "statuses": [412, 404, 404, 409, 409, 409],
    }


def test_a_snapshot_then_a_pinned_one_then_offline(hub_server, folder):
    repo = hub_server.add_repo(NAME, expected(folder), private=True)
    pinned = repo.find("main").sha
    repo.commit("refs/heads/main", {}, "gone", "", "tester", repo.find("main"))
    code = f"""
import pathlib
from huggingface_hub import hf_hub_download, snapshot_download
folder = pathlib.Path(snapshot_download({NAME!r}, revision={pinned!r}))
print(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
print(sum(map(ord, pathlib.Path(hf_hub_download({NAME!r}, "config.json", revision={pinned!r})).read_text())))
"""
    online = run_client(code, hub_server)
    assert online.splitlines()[0] == str(sorted(repo.files(pinned)))
    asked = len(hub_server.requests)
    assert run_client(code, hub_server, HF_HUB_OFFLINE="1") == online
    assert len(hub_server.requests) == asked
    storage = [request for request in hub_server.requests if request.host == "storage"]
    assert len(storage) == 3
    assert not any("Authorization" in request.headers for request in storage)
    missing = f"from huggingface_hub import hf_hub_download\nhf_hub_download({NAME!r}, 'config.json')"
    assert "EntryNotFoundError" in run_client(missing, hub_server, fails=True)
    unknown = f"from huggingface_hub import snapshot_download\nsnapshot_download({NAME!r}, revision='v9')"
    assert "RevisionNotFoundError" in run_client(unknown, hub_server, fails=True)


def test_a_cut_download_goes_on_where_it_stopped(hub_server):
    chunk = 10 * 1024**2  # the client keeps what arrived in whole pieces of this size only
    data = noise(chunk + 500_000)
    hub_server.add_repo(NAME, {"model.safetensors": data})
    hub_server.fail("GET", "^/blob/", "cut", after_bytes=chunk + 100_000)
    code = f"""
import hashlib
from huggingface_hub import hf_hub_download
print(hashlib.sha256(open(hf_hub_download({NAME!r}, "model.safetensors"), "rb").read()).hexdigest())
"""
    assert run_client(code, hub_server).strip() == hashlib.sha256(data).hexdigest()
    first, second = hub_server.calls("GET", "^/blob/")
    assert (first.status, second.status) == (200, 206)
    assert second.headers["Range"] == f"bytes={chunk}-"


def test_who_may_do_what(hub_server):
    hub_server.add_repo(NAME, {"config.json": b"{}"}, private=True)
    hub_server.add_repo("lab/gated", {"config.json": b"{}"}).gated = True
    hub_server.add_repo("lab/public", {"config.json": b"{}"})
    code = """
from huggingface_hub import CommitOperationAdd, HfApi, get_token

def tell(call, *arguments, **options):
    try:
        call(*arguments, **options)
        print("yes")
    except Exception as error:
        print(error.response.status_code if getattr(error, "response", None) else "", type(error).__name__)

api = HfApi()
tell(api.whoami)
tell(api.model_info, "tester/model")
tell(api.hf_hub_download, "lab/gated", "config.json")
tell(api.model_info, "lab/public")
for pull_request in (False, True):
    operations = [CommitOperationAdd("a.txt", b"a")]
    tell(api.create_commit, "lab/public", operations, commit_message="a", create_pr=pull_request)
tell(api.create_repo, "lab/new")
"""

    def told(token):  # each with a cache of its own: a file in the cache is given where the Hub refuses it
        answers = run_client(code, hub_server, token=token, HF_HUB_CACHE=str(hub_server.home / f"cache{token}"))
        return [answer.replace("HfHubHTTPError", "refused") for answer in answers.splitlines()]

    assert told(hub_server.token) == ["yes"] * 7
    read_only = ["yes", "yes", "yes", "yes", "403 refused", "yes", "403 refused"]
    assert told(hub_server.read_token) == read_only
    hidden = ["404 RepositoryNotFoundError", "403 GatedRepoError"]
    assert told(hub_server.stranger_token) == [read_only[0], *hidden, *read_only[3:]]
    assert told("hf_wrong") == ["401 refused"] * 7
    hidden = ["401 RepositoryNotFoundError", "401 GatedRepoError"]
    assert told("") == [" LocalTokenNotFoundError", *hidden, "yes", *["401 refused"] * 3]


def test_a_push_that_dies_half_way_changes_nothing_and_is_resumed(hub_server, folder):
    last = hashlib.sha256((folder / "vae/weights.safetensors").read_bytes()).hexdigest()
    fault = hub_server.fail("PUT", f"^/upload/.*{last}", "cut", times=99, after_bytes=70_000)
    process = start_client(upload(folder), hub_server, short_waits=False)
    assert fault.hit.wait(WAIT)
    while len(hub_server.uploads) < 2 and process.poll() is None:  # the two other objects
        time.sleep(0.01)
    process.kill()
    process.communicate()
    repo = hub_server.repos[NAME]
    assert [commit.title for commit in repo.commits.values()] == ["initial commit"]

    fault.times = 0
    run_client(upload(folder), hub_server)
    assert content(repo) == expected(folder)
    assert len(hub_server.uploads) == 3  # none of them twice
    assert [commit.title for commit in repo.commits.values()][1:] == ["Upload folder using huggingface_hub"]


def test_the_client_tries_six_times(hub_server, folder):
    cut = hub_server.fail("PUT", "^/upload/", "cut", times=2, after_bytes=1_000)
    busy = hub_server.fail("POST", "/preupload/", 503, times=5)
    run_client(upload(folder), hub_server)
    assert cut.times == busy.times == 0
    hub_server.add_repo(NAME, {})
    hub_server.fail("POST", "/preupload/", 503, times=6)
    assert "503" in run_client(upload(folder), hub_server, fails=True)
    hub_server.fail("GET", "^/api/models/", 500)
    assert "500" in run_client(f"{CREATE}api.model_info({NAME!r})", hub_server, fails=True)  # this one is not retried


def test_a_commit_whose_answer_is_lost_is_there(hub_server, folder):
    hub_server.fail("POST", "/commit/", "lost")
    assert "RemoteProtocolError" in run_client(upload(folder), hub_server, fails=True)
    repo = hub_server.repos[NAME]
    assert content(repo) == expected(folder)
    assert run_client(upload(folder), hub_server).strip() == repo.find("main").sha
    assert len(repo.commits) == 2


def test_what_a_commit_may_not_hold(hub_server):
    repo = hub_server.add_repo(NAME, {"config.json": b"{}"})
    head, text = repo.find("main").sha, base64.b64encode(b"text").decode()
    for path in ("../a", "a/../../b", "/etc/passwd", ".git/config", "a/.git/hooks", "", "a//b", "config.json/a"):
        assert commit(hub_server, ("file", {"path": path, "content": text}))[0] == 400, path
    absent = {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 4}
    assert commit(hub_server, ("lfsFile", absent))[0] == 400
    bad = base64.b64encode(b"---\nbase_model: ./outputs/run\n---\n").decode()
    status, reason = commit(hub_server, ("file", {"path": "README.md", "content": bad}))
    assert status == 400
    assert "base_model" in reason
    assert repo.find("main").sha == head


def test_an_object_that_is_not_the_one_announced_is_refused(hub_server):
    repo = hub_server.add_repo(NAME, {})
    oid = hashlib.sha256(b"abcd").hexdigest()
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 4}]}
    _, answer = ask(hub_server, "POST", f"/{NAME}.git/info/lfs/objects/batch", batch, hub_server.token)
    place = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
    assert ask(hub_server, "PUT", place, b"abce")[0] == 422
    assert ask(hub_server, "PUT", place, b"abc")[0] == 422
    assert ask(hub_server, "PUT", place, b"abcd", hub_server.token)[0] == 400  # a token has no business there
    assert ask(hub_server, "PUT", place[:-1], b"abcd")[0] == 403
    assert not repo.objects
    assert ask(hub_server, "PUT", place, b"abcd")[0] == 200
    assert commit(hub_server, ("lfsFile", {"path": "a.bin", "oid": oid, "size": 4}))[0] == 200


def test_the_client_reports_a_bad_card_before_it_uploads(hub_server, folder):
    (folder / "README.md").write_text("---\nlicense: my-own\n---\n")
    assert "Invalid metadata in README.md" in run_client(upload(folder), hub_server, fails=True)
    assert not hub_server.uploads
    code = f"{CREATE}from huggingface_hub import ModelCard\nModelCard({CARD.decode()!r}).push_to_hub({NAME!r})"
    run_client(code, hub_server)
    assert content(hub_server.repos[NAME]) == {"README.md": CARD}


@pytest.mark.parametrize(
    "metadata",
    [
        "license: Apache 2",
        "license: [apache-2.0, nonsense]",
        "base_model: ./outputs/checkpoint-10",
        "base_model: /home/me/model",
        "base_model: wan",
        "base_model: [org/name, a/b/c]",
        "base_model_relation: child",
        "pipeline_tag: video-editing",
        "pipeline_tag: [any-to-any]",
        "library_name: 3",
        "library_name: null",
        "tags: video",
        "tags: [1]",
        "datasets: ./data",
        "widget: text",
        "- a\n- b",
        "a: b: c",
        "tags: [a",
    ],
)
def test_card_metadata_that_is_refused(metadata):
    assert card_problems(f"---\n{metadata}\n---\n# Model\n")[0]


def test_card_metadata_that_is_accepted():
    assert card_problems(CARD.decode()) == ([], [])
    assert card_problems("# No metadata") == ([], ["empty or missing yaml metadata in repo card"])
    full = "library_name: diffusers\ndatasets: [org/data, mnist]\nlanguage: en\nwidget: [{text: a}]\nlicense: [mit]"
    assert card_problems(f"---\n{full}\nbase_model: [a/b, c/d.e-2]\nbase_model_relation: finetune\n---\n") == ([], [])
