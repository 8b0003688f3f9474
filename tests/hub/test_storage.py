"""Nothing is lost: what is removed and replaced, what is refused, and what kills and planted files can do."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from interrupted import interrupt_save
from raw_data import write_pickle
from safetensors.torch import save_file
from typer.testing import CliRunner

from examples.shapes.training.runs import save_folder
from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline
from omni_video_hf.cli.main import app
from omni_video_hf.hub import push
from omni_video_hf.hub.push import check_complete
from omni_video_hf.hub.repository import check_indices, finish_saving
from omni_video_hf.training.features.cache import FeatureCache
from omni_video_hf.training.features.cache_files import SCHEMA
from omni_video_hf.training.features.import_features import import_features
from omni_video_hf.utils.files import complete_or_absent, workspace, write_mark

TESTS = Path(__file__).parents[1] / "support"


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repositories") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pickles(tmp_path):
    for number in range(2):
        write_pickle(tmp_path / "pickles" / f"{number}.pkl", number)
    return tmp_path / "pickles"


@pytest.fixture
def cache(pickles, tmp_path):
    import_features([pickles], tmp_path / "cache")
    return tmp_path / "cache"


# --- output folders of caches ---------------------------------------------------------------------------------------

OTHERS = {
    "archives": {"shards/train-00000.tar": "mine"},
    "parts": {"parts/thesis.txt": "mine"},
    "index": {"index-mine.parquet": "mine"},
    "another program's manifest": {"manifest.json": '{"name": "app"}', "shards/a.tar": "mine"},
    "a manifest that is a list": {"manifest.json": "[]", "shards/a.tar": "mine"},
    "a mark of another's": {"begun.json": "{}", "shards/a.tar": "mine"},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("through_link", [False, True])
def test_a_folder_that_is_no_cache_is_refused_before_anything_is_read(tmp_path, name, through_link):
    output = tmp_path / "mine"
    for file, text in OTHERS[name].items():
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        (output / file).write_text(text)
    before = tree(tmp_path)
    if through_link:
        (tmp_path / "link").symlink_to(output)
        output = tmp_path / "link"
    # Neither the data nor the model exist: reading either would be another error.
    for command in (["precompute", "nowhere", "-m", "no/model"], ["import-features", "nowhere"]):
        run = CliRunner().invoke(app, [*command, "-o", str(output)])
        assert run.exit_code != 0
        words = " ".join(run.stderr.split())
        assert f"{output}: is not empty" in words or "manifest.json: has the format" in words
    assert {file: data for file, data in tree(tmp_path).items() if not file.startswith("link/")} == before


@pytest.mark.parametrize("name", ["shards", "parts"])
def test_a_cache_with_a_linked_folder_is_refused(cache, pickles, tmp_path, name):
    (cache / name).rename(tmp_path / "elsewhere")
    (cache / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine.safetensors").write_text("mine")
    before = tree(tmp_path / "elsewhere")
    write_pickle(pickles / "0.pkl", 7)
    with pytest.raises(ValueError, match=f"{name}: must be a folder, not a link"):
        import_features([pickles], cache)
    assert tree(tmp_path / "elsewhere") == before


def test_a_cache_keeps_the_files_that_no_run_wrote(cache, pickles):
    mine = ("notes.txt", "shards/a.tar", "shards/00007-00.safetensors", "parts/thesis.txt", "index-mine.parquet")
    for name in mine:
        (cache / name).write_text("mine")
    (old,) = [path for path in cache.glob("index-*.parquet") if path.name != "index-mine.parquet"]
    write_pickle(pickles / "0.pkl", 7)
    import_features([pickles], cache)
    assert all((cache / name).read_text() == "mine" for name in mine)
    assert not old.exists()
    assert len(FeatureCache(cache)) == 2


# --- hostile and damaged caches -------------------------------------------------------------------------------------


def rows(cache, change):
    """Rewrite the index."""
    (index,) = cache.glob("index-*.parquet")
    content = pq.read_table(index).to_pylist()
    change(content)
    pq.write_table(pa.Table.from_pylist(content, SCHEMA), index)


def manifest(cache, **changes):
    content = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(content | changes))


def index_of(cache):
    return next(cache.glob("index-*.parquet"))


def moved_out(path):
    """Put a file beside the cache, with a link to it in its place."""
    target = path.rename(path.parents[2 if path.parent.name == "shards" else 1] / "outside")
    path.symlink_to(target)


HOSTILE = {
    "shard up": lambda c: rows(c, lambda r: r[0].update(shard="../../secret")),
    "shard absolute": lambda c: rows(c, lambda r: r[0].update(shard="/etc/secret")),
    "shard null": lambda c: rows(c, lambda r: r[0].update(shard=None)),
    "shard linked": lambda c: moved_out(next((c / "shards").iterdir())),
    "number null": lambda c: rows(c, lambda r: r[0].update(number=None)),
    "number below 0": lambda c: rows(c, lambda r: r[0].update(number=-1)),
    "number of nothing": lambda c: rows(c, lambda r: r[0].update(number=99)),
    "key null": lambda c: rows(c, lambda r: r[0].update(key=None)),
    "key twice": lambda c: rows(c, lambda r: r[0].update(key=r[1]["key"])),
    "task unknown": lambda c: rows(c, lambda r: r[0].update(task="t2w")),
    "task null": lambda c: rows(c, lambda r: r[0].update(task=None)),
    "no shapes": lambda c: rows(c, lambda r: [r[0].update({n: None}) for n in r[0] if n.endswith("_shape")]),
    "shape of 0": lambda c: rows(c, lambda r: r[0].update(latents_shape=[16, 0, 8, 4])),
    "shape too short": lambda c: rows(c, lambda r: r[0].update(prompt_embeds_shape=[])),
    "shape with null": lambda c: rows(c, lambda r: r[0].update(latents_shape=[16, None, 8, 4])),
    "index of other columns": lambda c: pq.write_table(pa.table({"a": [1]}), index_of(c)),
    "index of other types": lambda c: pq.write_table(pa.table({"key": [{"a": 1}], "shard": [[1]]}), index_of(c)),
    "index cut": lambda c: index_of(c).write_bytes(index_of(c).read_bytes()[:-20]),
    "index empty": lambda c: index_of(c).write_bytes(b""),
    "index missing": lambda c: index_of(c).unlink(),
    "index linked": lambda c: moved_out(index_of(c)),
    "manifest index up": lambda c: manifest(c, index="../index.parquet"),
    "manifest index absolute": lambda c: manifest(c, index="/etc/passwd"),
    "manifest index null": lambda c: manifest(c, index=None),
    "manifest list": lambda c: (c / "manifest.json").write_text("[1]"),
    "manifest cut": lambda c: (c / "manifest.json").write_text('{"format'),
    "manifest binary": lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "shard cut": lambda c: next((c / "shards").iterdir()).write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "shard empty": lambda c: next((c / "shards").iterdir()).write_bytes(b""),
    "shard of other tensors": lambda c: save_file({}, next((c / "shards").iterdir())),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_cache_is_one_error_with_a_file_name(cache, name):
    HOSTILE[name](cache)
    with pytest.raises(ValueError, match=r"(manifest\.json|index-\w+\.parquet|\.safetensors): ") as caught:
        FeatureCache(cache)[0]
    assert "\n" not in str(caught.value)
    assert type(caught.value) is ValueError


def test_a_downloaded_cache_may_consist_of_links_into_the_hubs_cache(cache, tmp_path):
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "c0ffee", tmp_path / "datasets--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(tree(cache).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    assert FeatureCache(snapshot)[1]["task"] == "t2v"


# --- weight indices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "mllm"])
@pytest.mark.parametrize(
    "entry", ["/etc/hosts", "../secret.safetensors", "a/../../secret.safetensors", "C:\\x", "link"]
)
def test_an_index_that_names_files_elsewhere_is_neither_read_nor_pushed(repository, tmp_path, place, entry):
    folder = tmp_path / "repository"
    shutil.copytree(repository, folder)
    (tmp_path / "secret.safetensors").write_bytes(
        (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    (folder / place / "link").symlink_to(tmp_path / "secret.safetensors")
    index = folder / place / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": entry}}))
    for read in (OmniVideoForConditionalGeneration.from_pretrained, OmniVideoPipeline.from_pretrained, check_complete):
        with pytest.raises(ValueError, match=r"index\.json: names the file .* outside of"):
            read(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: (cannot be read|is not a weight index)"):
        check_indices(tmp_path)


# --- saving over something ------------------------------------------------------------------------------------------


def test_saving_over_another_models_files_is_refused(repository, tmp_path):
    pipe = OmniVideoPipeline.from_pretrained(repository)
    for name, text in {
        "model.safetensors": "mine", "config.json": '{"model_type": "llama"}',
        "model_index.json": '{"_class_name": "WanPipeline"}', "vae/diffusion_pytorch_model.safetensors": "mine",
    }.items():  # fmt: skip
        folder = tmp_path / name.replace("/", "_")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: was not written by a save of an Omni-Video model"):
            pipe.save_pretrained(folder)
        assert {file: data.decode() for file, data in tree(folder).items()} == {name: text}


def test_a_save_keeps_weights_and_code_that_no_save_wrote(repository, tmp_path):
    pipe, folder = OmniVideoPipeline.from_pretrained(repository), tmp_path / "x"
    pipe.save_pretrained(folder, max_shard_size="100KB")
    mine = ("mllm/model-00001-of-00077.safetensors", "modeling_omni_video_00000000.py", "mllm/notes.txt")
    for name in mine:
        (folder / name).write_text("mine")
    pipe.save_pretrained(folder)
    assert all((folder / name).read_text() == "mine" for name in mine)
    assert sorted(path.name for path in (folder / "mllm").glob("*.safetensors")) == [
        Path(mine[0]).name,
        "model.safetensors",
    ]


def test_a_save_does_not_write_through_a_linked_folder(repository, tmp_path):
    pipe, folder = OmniVideoPipeline.from_pretrained(repository), tmp_path / "x"
    pipe.save_pretrained(folder)
    (folder / "mllm").rename(tmp_path / "base")
    (folder / "mllm").symlink_to(tmp_path / "base")
    before = tree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"mllm: is a link to .*base, whose files saving would replace"):
        pipe.save_pretrained(folder)
    assert tree(tmp_path / "base") == before


def test_an_unfinished_repository_is_refused_and_finished(tmp_path):
    folder = tmp_path / "x"
    (folder / "a").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "omni_video", "old": 1}')
    (folder / "model_index.json").write_text('{"_class_name": "OmniVideoPipeline"}')
    (folder / "a" / "0.txt").write_text("old")
    interrupt_save(folder)
    assert not (folder / "config.json").exists()
    assert not (folder / "model_index.json").exists()
    for load in (OmniVideoForConditionalGeneration.from_pretrained, OmniVideoPipeline.from_pretrained, check_complete):
        with pytest.raises(ValueError, match="is unfinished: a save was interrupted"):
            load(folder)
    name = str(folder)
    generate = ["generate", "a fox", "-m", name, "-o", str(tmp_path / "fox.mp4")]
    for command in (["info", name], ["push", name, "a/b"], generate):
        run = CliRunner().invoke(app, command)
        assert run.exit_code != 0
        assert "is unfinished" in " ".join(run.stderr.split())
    assert finish_saving(folder)
    found = tree(folder)
    assert json.loads(found.pop("config.json"))["new"] == 1
    assert found.pop("model_index.json") == b'{"_class_name": "OmniVideoPipeline"}'
    assert found == {f"{name}/{number}.txt": b"new" for name in "ab" for number in range(5)}
    assert not finish_saving(folder)


def test_a_part_of_shapes_replaces_only_what_a_training_wrote(tmp_path):
    def write(text):
        return lambda folder: (folder.mkdir(), (folder / "config.json").write_text(text))

    folder = tmp_path / "vae"
    save_folder(write("first"), folder)
    save_folder(write("second"), folder)
    assert (folder / "config.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    for name in ("mine", "link"):
        with pytest.raises(ValueError, match="move it away"):
            save_folder(write("third"), tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert (folder / "config.json").read_text() == "second"


def test_make_clean_removes_what_make_wrote_and_nothing_else(tmp_path):
    makefile = (TESTS.parents[1] / "Makefile").read_text()
    names = re.search(r"^DEMO := (.*)$", makefile, flags=re.MULTILINE)[1].split()
    code = (TESTS.parents[1] / "demo.py").read_text()
    assert all(f'"{name}"' in code for name in names)
    (tmp_path / "Makefile").write_text(makefile)
    for folder in ("demo", ".venv/bin", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (*names, "thesis.txt"):
        (tmp_path / "demo" / name).write_text("x")
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("mine")  # not set up by make
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)  # noqa: S607
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["thesis.txt"]
    assert (tmp_path / ".venv" / "pyvenv.cfg").exists()
    (tmp_path / ".venv" / ".installed").touch()
    (tmp_path / "demo" / "thesis.txt").unlink()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)  # noqa: S607
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "elsewhere"]


# --- workspaces -----------------------------------------------------------------------------------------------------


def left_behind(target):
    """A workspace whose process was killed."""
    pid = os.fork()
    if pid == 0:
        with workspace(target) as folder:
            (folder / "40 GB").write_text("half")
            os._exit(0)
    os.waitpid(pid, 0)


def test_what_a_killed_save_left_is_removed_by_the_next_one_and_nothing_else(tmp_path):
    target = tmp_path / "x"
    left_behind(target)
    left_behind(tmp_path / "y")
    lookalike = tmp_path / ".x.abcdefgh.unfinished"
    lookalike.mkdir()
    (lookalike / "thesis.txt").write_text("mine")
    (tmp_path / ".x.12345678.unfinished").symlink_to(lookalike)
    with workspace(target) as alive:
        (alive / "mine").write_text("in use")
        with complete_or_absent(target) as partial:
            partial.write_text("new")
        assert (alive / "mine").read_text() == "in use"
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".y."))
    assert names == [".x.12345678.unfinished", ".x.abcdefgh.unfinished", "x"]
    assert (lookalike / "thesis.txt").read_text() == "mine"
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".y.")]) == 1


def test_a_folder_of_a_process_that_was_killed_before_it_marked_it_goes_after_a_while(tmp_path):
    folder = tmp_path / ".x.abcdefgh.unfinished"
    folder.mkdir()
    with complete_or_absent(tmp_path / "x") as partial:
        partial.write_text("new")
    assert folder.exists()
    os.utime(folder, (time.time() - 120,) * 2)
    with complete_or_absent(tmp_path / "x") as partial:
        partial.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.fixture
def shared_folder():
    """A folder that everybody may write to, and this process as an ordinary user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    is_root = os.geteuid() == 0
    left_behind(folder / "x")
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes two users")
def test_what_another_user_left_in_a_shared_folder_is_let_be(shared_folder):
    with complete_or_absent(shared_folder / "x") as partial:
        partial.write_text("new")
    assert (shared_folder / "x").read_text() == "new"
    assert len(list(shared_folder.iterdir())) == 2


@pytest.mark.parametrize("part", ["pipeline", "model"])
def test_what_a_killed_push_left_is_removed_by_the_next_one(part, repository, tmp_path, monkeypatch):
    """A push from memory puts all weights together in a temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pushed = tiny.pipeline() if part == "pipeline" else tiny.model()
    base = {} if part == "pipeline" else {"base": repository}
    monkeypatch.setattr(push, "push_repository", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    pid = os.fork()
    if pid == 0:
        try:
            pushed.push_to_hub("lab/x", **base)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    left = set(tmp_path.iterdir())
    assert left
    found = []
    monkeypatch.setattr(
        push,
        "push_repository",
        lambda folder, *_, **__: found.append((tree(Path(folder)), left & set(tmp_path.iterdir()))),
    )
    pushed.push_to_hub("lab/x", **base)
    ((files, still_there),) = found
    assert "model_index.json" in files
    assert not still_there
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_that_holds_the_list_of_a_save_is_never_cleaned_away(tmp_path):
    left_behind(tmp_path / "x")
    (folder,) = tmp_path.iterdir()
    write_mark(folder, {"target": "x", "files": [], "removed": [], "finalize": False})
    with complete_or_absent(tmp_path / "x") as partial:
        partial.write_text("new")
    assert (folder / "40 GB").exists()


def test_planted_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (".file.partial", "file.partial", "file"):
        (folder / name).symlink_to(victim)
    with complete_or_absent(folder / "file") as partial:
        partial.write_text("new")
    assert victim.read_text() == "mine"
    assert (folder / "file").read_text() == "new"
    assert not (folder / "file").is_symlink()


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_lose_nothing_and_the_next_run_gives_the_same_bits(tmp_path):
    """A handful of the places where a folder changes; `kill_worker.py FOLDER 0` tries all of them."""
    run = subprocess.run(
        [sys.executable, TESTS / "kill_worker.py", tmp_path, "5"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    for name, outcome in outcomes.items():
        assert outcome["tried"] == 5, name
        assert outcome["wrong"] == [], name
        assert outcome["changes"] > 20, name
