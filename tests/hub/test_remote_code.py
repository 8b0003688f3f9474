"""Repositories as people load them who have transformers and diffusers, but not this package."""

import filecmp
import json
import re
import shutil
import tarfile

import pytest
import tiny
import torch
from golden import DATA
from hub_server import hub_server_fixture, run_client  # noqa: F401
from PIL import Image
from strangers import (
    OUTPUTS,
    TRANSFORMERS_DOOR,
    WITHOUT_PACKAGE,
    expected_outputs,
    last_json,
    open_doors,
    run_stranger,
)

import omni_video_hf
from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline, OmniVideoProcessor
from omni_video_hf.hub import remote_code
from omni_video_hf.hub.remote_code import CODE_FILE, COMPONENT_CLASSES, EXPORTS, code_files

NAME = "lab/omni-video-tiny"
MAX_REQUESTS = 700  # of version 0.1.0, whose code lay in every component: 1,809


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repositories") / "omni-video-tiny"
    pipe = tiny.pipeline()
    pipe.mllm.generation_config.update(do_sample=True, temperature=0.7, eos_token_id=[97, 98])
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(repository):
    pipe = OmniVideoPipeline.from_pretrained(repository)
    return expected_outputs(pipe, OmniVideoForConditionalGeneration.from_pretrained(repository), pipe.processor)


def same_files(left, right) -> bool:
    def names(folder):
        return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())

    return names(left) == names(right) and all(
        filecmp.cmp(left / name, right / name, shallow=False) for name in names(left)
    )


# --- the code -------------------------------------------------------------------------------------------------------


def modules_in(files):
    return set(re.findall(r"^# ---- (\S+)\.py$", "".join(files.values()), flags=re.MULTILINE))


def test_every_file_imports_files_that_are_exported_too():
    files = code_files()
    for name, text in files.items():
        imported = re.findall(r"^\s*from \.(\S*) import", text, flags=re.MULTILINE)
        assert {f"{module}.py" for module in imported} <= files.keys(), name
        assert "omni_video_hf" not in re.findall(r"^\s*(?:from|import) (\w+)", text, flags=re.MULTILINE), name
    entry = list(files)[-1]
    named = set(re.findall(r"^from \.(\S+) import __name__", files[entry], flags=re.MULTILINE))
    assert {f"{name}.py" for name in named} == files.keys() - {entry}, "diffusers copies what the entry file names"


def test_every_file_compiles():
    for name, text in code_files().items():
        compile(text, name, "exec")


def test_a_future_import_is_refused(monkeypatch, tmp_path):
    copy = tmp_path / "omni_video_hf"
    shutil.copytree(remote_code.Path(remote_code.__file__).parents[1], copy)
    monkeypatch.setattr(remote_code, "__file__", str(copy / "hub" / "remote_code.py"))
    path = copy / "models" / "connectors.py"
    path.write_text(f"from __future__ import annotations\n{path.read_text()}")
    with pytest.raises(ValueError, match=r"models\.connectors: `from __future__`"):
        code_files()


def test_a_repository_carries_what_loading_and_running_need_and_nothing_else(repository):
    files = list(repository.rglob("*.py"))
    assert len(files) <= 30
    carried = modules_in(code_files())
    assert {module.replace(".", "/") for module in EXPORTS.values()} <= carried
    assert not carried & {
        "hub/push",
        "hub/model_card",
        "hub/inspection",
        "pipelines/memory/profiles",
        "utils/safe_load",
    }
    text = "".join(path.read_text() for path in files)
    assert not re.findall(r"create_commit|ModelCard|MEDIA_SUFFIXES|hf_\[A-Z|rich\.table", text)


@pytest.mark.slow
def test_code_that_is_not_exported_raises_an_error(repository, tmp_path):
    code = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(repository)!r}, trust_remote_code=True)
pipe.push_to_hub("lab/x")
"""
    error = run_stranger(WITHOUT_PACKAGE + code, tmp_path, fails=True).splitlines()[-1]
    assert "omni_video_hf.hub.push" in error
    assert "pip install" in error


def test_the_code_lies_at_the_root_once_and_carries_version_and_hash(repository):
    files = code_files()
    assert all(text.startswith(f"# omni_video_hf {omni_video_hf.__version__}, ") for text in files.values())
    assert {path.name: path.read_text() for path in repository.glob("*.py")} == files
    for name in COMPONENT_CLASSES:
        (component,) = (repository / name).glob("*.py")
        assert component.name.startswith("omni_video_hf_component_")
        assert CODE_FILE.fullmatch(component.name)


def test_a_changed_line_changes_every_name(monkeypatch, tmp_path):
    copy = tmp_path / "omni_video_hf"
    shutil.copytree(remote_code.Path(remote_code.__file__).parents[1], copy)
    before = code_files()
    monkeypatch.setattr(remote_code, "__file__", str(copy / "hub" / "remote_code.py"))
    assert code_files() == before
    with (copy / "models" / "connectors.py").open("a") as file:
        file.write("# one line more\n")
    assert not code_files().keys() & before.keys()


def test_names_that_cannot_be_exported_are_refused(monkeypatch, tmp_path):
    copy = tmp_path / "omni_video_hf"
    shutil.copytree(remote_code.Path(remote_code.__file__).parents[1], copy)
    monkeypatch.setattr(remote_code, "__file__", str(copy / "hub" / "remote_code.py"))
    with (copy / "models" / "connectors.py").open("a") as file:
        file.write("\nfrom . import modeling_vila\n")
    with pytest.raises(ValueError, match=r"models\.connectors, line \d+"):
        code_files()


def test_two_meanings_of_a_name_in_one_folder_are_refused(monkeypatch, tmp_path):
    copy = tmp_path / "omni_video_hf"
    shutil.copytree(remote_code.Path(remote_code.__file__).parents[1], copy)
    monkeypatch.setattr(remote_code, "__file__", str(copy / "hub" / "remote_code.py"))
    with (copy / "models" / "connectors.py").open("a") as file:
        file.write("\n\ndef folded_context():\n    pass\n")
    with pytest.raises(ValueError, match="are exported in one file and both define 'folded_context'"):
        code_files()


# --- loading with both libraries ------------------------------------------------------------------------------------


def test_both_libraries_load_a_folder(repository, expected, tmp_path):
    assert last_json(run_stranger(open_doors(repository), tmp_path)) == expected


@pytest.mark.slow
def test_both_libraries_load_a_hub_repository_a_pinned_revision_and_the_cache(repository, expected, hub_server):
    server = hub_server
    repo = server.add_repo(NAME, repository)
    pinned = repo.refs["refs/heads/main"]
    assert last_json(run_client(open_doors(NAME), server)) == expected
    # A first load, through both libraries: each of them asks for every file of code again and again.
    assert 0 < len(server.requests) < MAX_REQUESTS

    files = {name: blob.data for name, blob in repo.find("main").files.items()}
    changed = json.loads(files["model_index.json"])
    changed["presets"]["t2v"]["guidance_scale"] = 1.0
    files["model_index.json"] = json.dumps(changed).encode()
    server.add_repo(NAME, files)
    server.repos[NAME].commits |= repo.commits
    assert last_json(run_client(open_doors(NAME), server)) != expected
    assert last_json(run_client(open_doors(NAME, revision=pinned), server)) == expected


@pytest.mark.slow
def test_both_libraries_load_the_offline_cache(repository, expected, hub_server):
    hub_server.add_repo(NAME, repository)
    folder = run_client(
        f"from huggingface_hub import snapshot_download; print(snapshot_download({NAME!r}))", hub_server
    )
    requests = len(hub_server.requests)
    offline = run_client(open_doors(folder.strip()), hub_server, HF_HUB_OFFLINE="1")
    assert last_json(offline) == expected
    assert len(hub_server.requests) == requests


@pytest.mark.slow
def test_transformers_finds_its_cache_by_name(repository, expected, hub_server):
    hub_server.add_repo(NAME, repository)
    code = open_doors(NAME, TRANSFORMERS_DOOR)
    online = last_json(run_client(code, hub_server))
    requests = len(hub_server.requests)
    assert last_json(run_client(code, hub_server, HF_HUB_OFFLINE="1")) == online
    assert online["AutoModel"] == expected["AutoModel"]
    assert len(hub_server.requests) == requests


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="diffusers 0.42.1 asks the Hub for the commit of a file that it has")
def test_diffusers_finds_its_cache_by_name(repository, hub_server):
    hub_server.add_repo(NAME, repository)
    code = f"from diffusers import DiffusionPipeline as P; P.from_pretrained({NAME!r}, trust_remote_code=True)"
    run_client(WITHOUT_PACKAGE + code, hub_server)
    run_client(WITHOUT_PACKAGE + code, hub_server, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    "auto_class",
    [
        "AutoModel",
        *(
            pytest.param(auto_class, marks=pytest.mark.slow)
            for auto_class in ("AutoConfig", "AutoModelForImageTextToText")
        ),
        pytest.param("AutoProcessor", marks=pytest.mark.slow),
    ],
)
def test_transformers_refuses_without_the_flag(repository, tmp_path, auto_class):
    code = (
        WITHOUT_PACKAGE + f"from transformers import {auto_class}; {auto_class}.from_pretrained({str(repository)!r})"
    )
    assert "trust_remote_code=True" in run_stranger(code, tmp_path, fails=True).splitlines()[-1]


@pytest.mark.slow
def test_diffusers_refuses_without_the_flag(repository, hub_server):
    hub_server.add_repo(NAME, repository)
    for name in (str(repository), NAME):
        code = f"from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained({name!r})"
        assert "trust_remote_code=True" in run_client(WITHOUT_PACKAGE + code, hub_server, fails=True).splitlines()[-1]


@pytest.mark.slow
def test_image_text_to_text_pipeline_answers_as_the_model_does(repository, tmp_path):
    code = f"""
from transformers import pipeline
from PIL import Image
ask = pipeline("image-text-to-text", model={str(repository)!r}, trust_remote_code=True)
image = Image.new("RGB", (40, 30), "red")
parts = [{{"type": "image", "image": image}}, {{"type": "text", "text": "rot"}}]
greedy = {{"do_sample": False, "max_new_tokens": 6}}
answer = ask(text=[{{"role": "user", "content": parts}}], generate_kwargs=greedy, return_full_text=False)
import json; print(json.dumps(answer[0]["generated_text"]))
"""
    processor = OmniVideoProcessor.from_pretrained(repository)
    model = OmniVideoForConditionalGeneration.from_pretrained(repository)
    image = Image.new("RGB", (40, 30), "red")
    inputs = processor.apply_task_template("understand", "rot", images=[image], return_tensors="pt")
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(answer, skip_special_tokens=True)[0]
    assert expected
    assert last_json(run_stranger(WITHOUT_PACKAGE + code, tmp_path)) == expected


@pytest.mark.slow
def test_without_pyav_pictures_still_work(repository, tmp_path):
    hidden = "import importlib.metadata, importlib.util, sys; sys.modules['av'] = None\n"
    code = f"""
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
repo = {str(repository)!r}
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
inputs = processor.apply_task_template("understand", "rot", images=[Image.new("RGB", (9, 9))], return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=2).shape)
try:
    processor.apply_task_template("v2v", "rot", videos=["clip.mp4"])
except ImportError as error:
    print(error)
"""
    output = run_stranger(WITHOUT_PACKAGE + hidden + code, tmp_path)
    assert "torch.Size" in output
    assert "pip install av" in output


# --- with the package -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_the_package_no_flag_and_the_packages_classes(repository, expected, hub_server):
    hub_server.add_repo(NAME, repository)
    code = (
        OUTPUTS
        + f"""
from transformers import AutoModelForImageTextToText, AutoProcessor
from omni_video_hf import OmniVideoPipeline
pipe = OmniVideoPipeline.from_pretrained({NAME!r})
model = AutoModelForImageTextToText.from_pretrained({NAME!r})
processor = AutoProcessor.from_pretrained({NAME!r})
for part in (pipe, pipe.mllm, pipe.adapter, pipe.processor, model, processor):
    assert type(part).__module__.startswith("omni_video_hf."), type(part)
import json; print(json.dumps([pipeline_outputs(pipe), model_outputs(model, processor)]))
"""
    )
    assert last_json(run_client(code, hub_server)) == [expected["pipeline"], expected["AutoModel"]]
    assert not hub_server.calls("GET", r"/(mllm|adapter)/.*\.py$"), "code that is not needed is not downloaded"
    before = len(hub_server.requests)
    assert last_json(run_client(code, hub_server, HF_HUB_OFFLINE="1"))[0] == expected["pipeline"]
    assert len(hub_server.requests) == before


@pytest.mark.slow
def test_components_that_are_passed_are_not_downloaded(repository, hub_server):
    hub_server.add_repo(NAME, repository)
    code = f"""
from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline
model = OmniVideoForConditionalGeneration.from_pretrained({str(repository)!r})
pipe = OmniVideoPipeline.from_pretrained({NAME!r}, **model.pipeline_components())
assert pipe.transformer is model.decoder and pipe.mllm.mllm is model.mllm
"""
    run_client(code, hub_server)
    fetched = {request.path.rpartition("/resolve/")[2].partition("/")[2] for request in hub_server.requests}
    weights = {name for name in fetched if name.endswith(".safetensors")}
    assert {name.partition("/")[0] for name in weights} == {"vae", "text_encoder"}


# --- saving again ---------------------------------------------------------------------------------------------------


def test_saving_what_was_loaded_gives_the_same_files(repository, tmp_path):
    pipe = OmniVideoPipeline.from_pretrained(repository)
    pipe("rot", task="t2i", height=32, width=32, num_inference_steps=1)
    pipe.save_pretrained(tmp_path / "again")
    assert same_files(repository, tmp_path / "again")
    pipe.save_pretrained(tmp_path / "again")
    assert same_files(repository, tmp_path / "again")


@pytest.mark.slow
def test_saving_without_the_package_writes_the_same_repository(repository, tmp_path):
    code = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(repository)!r}, trust_remote_code=True)
pipe.save_pretrained({str(tmp_path / "once")!r})
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "once")!r}, trust_remote_code=True)
pipe.save_pretrained({str(tmp_path / "twice")!r})
from transformers import AutoModel
model = AutoModel.from_pretrained({str(repository)!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "model")!r})
AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
"""
    run_stranger(WITHOUT_PACKAGE + code, tmp_path / "home")
    assert same_files(repository, tmp_path / "once")
    assert same_files(repository, tmp_path / "twice")
    path = tmp_path / "model" / "adapter" / "config.json"
    config = json.loads(path.read_text())
    assert "_presets" not in config  # settings of a pipeline, which a model by itself does not have
    path.write_text((repository / "adapter" / "config.json").read_text())
    whole = json.loads(path.read_text())
    assert {name: value for name, value in whole.items() if name != "_presets"} == config
    for name in ("mllm", "adapter", "transformer"):
        assert same_files(repository / name, tmp_path / "model" / name)


@pytest.fixture(scope="module")
def old_repository(repository, tmp_path_factory):
    """What version 0.1.0 wrote for the same pipeline: its own JSON and code; weights are not kept twice."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(DATA / "repository_0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    (folder,) = folder.iterdir()
    for path in repository.rglob("*.safetensors"):
        shutil.copy(path, folder / path.relative_to(repository))
    return folder


@pytest.mark.slow
def test_a_repository_of_version_0_1_0_loads_as_before(old_repository, expected, tmp_path, hub_server):
    assert len(list(old_repository.rglob("*.py"))) == 97
    assert last_json(run_stranger(open_doors(old_repository), tmp_path)) == expected
    hub_server.add_repo(NAME, old_repository)
    assert last_json(run_client(open_doors(NAME), hub_server)) == expected


def test_saving_a_repository_of_version_0_1_0_again_sheds_its_code(old_repository, repository, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(old_repository, folder)
    OmniVideoPipeline.from_pretrained(old_repository).save_pretrained(folder)
    names = {path.relative_to(folder) for path in folder.rglob("*.py")}
    assert names == {path.relative_to(repository) for path in repository.rglob("*.py")}


@pytest.mark.slow
def test_two_repositories_with_other_code_each_get_their_own(repository, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    own, new = re.search(r"_([0-9a-f]{8})\.py", str(next(other.glob("omni_video_hf_entry_*.py")))).group(1), "0" * 8
    for path in list(other.rglob("*")):
        if path.suffix in (".py", ".json"):
            text = path.read_text().replace(f"_{own}", f"_{new}")
            text = text.replace("SYSTEM_PROMPT = (", 'MARK = "other code"\nSYSTEM_PROMPT = (')
            path.write_text(text)
            path.rename(path.with_name(path.name.replace(own, new)))
    code = f"""
from diffusers import DiffusionPipeline
from transformers import AutoProcessor
first = DiffusionPipeline.from_pretrained({str(repository)!r}, trust_remote_code=True)
second = DiffusionPipeline.from_pretrained({str(other)!r}, trust_remote_code=True)
third = DiffusionPipeline.from_pretrained({str(repository)!r}, trust_remote_code=True)
def mark(part): return getattr(sys.modules[type(part).__module__], "MARK", None)
print(json.dumps([mark(pipe.processor) for pipe in (first, second, third)]
    + [mark(AutoProcessor.from_pretrained(repo, trust_remote_code=True))
        for repo in ({str(repository)!r}, {str(other)!r})]
    + [type(first.mllm) is type(third.mllm), type(first.mllm) is type(second.mllm)]))
"""
    marks = last_json(run_stranger(WITHOUT_PACKAGE + "import json, sys\n" + code, tmp_path / "home"))
    assert marks == [None, "other code", None, None, "other code", True, False]


def test_a_class_that_no_repository_knows_is_refused(tmp_path):
    class MyAdapter(omni_video_hf.OmniVideoAdapter):
        pass

    pipe = tiny.pipeline()
    pipe.register_modules(adapter=MyAdapter.from_config(pipe.adapter.config))
    with pytest.raises(ValueError, match=r"`adapter` is a MyAdapter"):
        pipe.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.iterdir())


def test_a_half_precision_repository(tmp_path):
    tiny.pipeline().save_pretrained(tmp_path / "full")
    pipe = OmniVideoPipeline.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "once")
    again = OmniVideoPipeline.from_pretrained(tmp_path / "once", dtype=torch.bfloat16)
    again.save_pretrained(tmp_path / "twice")
    assert same_files(tmp_path / "once", tmp_path / "twice")
