import ast
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
import training
import yaml
from hub_cards import card_problems
from hub_server import hub_server_fixture, run_client  # noqa: F401
from huggingface_hub import ModelCard
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from strangers import WITHOUT_PACKAGE, expected_outputs, last_json, open_doors

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline, collect_lora_layers
from omni_video_hf.hub.model_card import (
    TrainingSummary,
    is_generated,
    plain,
    render_model_card,
    write_model_card,
)
from omni_video_hf.hub.push import LORA_NAME, check_complete, repository_files
from omni_video_hf.hub.repository import complete_repository, missing_parts
from omni_video_hf.training.reporting.publishing import summarize

NAME, BASE = "lab/fine-tune", "lab/omni-video-tiny"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repositories") / "omni-video-tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


def command(*arguments) -> str:
    argv = ["omni-video", *map(str, arguments)]
    return f"import sys; sys.argv = {argv!r}; from omni_video_hf.cli.main import main; main()"


def served(server, name):
    files = server.repos[name].find("main").files
    return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}


# --- pushing --------------------------------------------------------------------------------------------------------


def test_a_pushed_pipeline_is_the_saved_folder_with_a_card(repository, hub_server):
    code = f"""
from omni_video_hf import OmniVideoPipeline
pipe = OmniVideoPipeline.from_pretrained({str(repository)!r})
print(pipe.push_to_hub({NAME!r}, private=True).commit_url)
"""
    assert f"/{NAME}/commit/" in run_client(code, hub_server)
    files = served(hub_server, NAME)
    card = files.pop("README.md").decode()
    saved = {p.relative_to(repository).as_posix(): p.read_bytes() for p in repository.rglob("*") if p.is_file()}
    assert files == saved
    assert card_problems(card) == ([], [])
    assert hub_server.repos[NAME].private
    assert len(hub_server.calls("POST", "/commit/")) == 1


@pytest.mark.slow
def test_a_fine_tune_is_pushed_whole_and_loads_with_both_libraries(repository, hub_server):
    hub_server.add_repo(BASE, repository)
    code = f"""
import torch
from omni_video_hf import OmniVideoForConditionalGeneration
model = OmniVideoForConditionalGeneration.from_pretrained({BASE!r})
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.startswith(("vision_head.", "adapter.", "decoder.blocks.0")):
            parameter.mul_(1.25)
model.push_to_hub({NAME!r})
"""
    run_client(code, hub_server)
    card = served(hub_server, NAME)["README.md"].decode()
    assert ModelCard(card).data.base_model == BASE
    assert ModelCard(card).data.base_model_relation == "finetune"

    base = OmniVideoPipeline.from_pretrained(repository)
    model = OmniVideoForConditionalGeneration.from_pretrained(repository)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("vision_head.", "adapter.", "decoder.blocks.0")):
                parameter.mul_(1.25)
    pipe = OmniVideoPipeline.from_pretrained(repository, **model.pipeline_components())
    expected = expected_outputs(pipe, model, base.processor)
    plain = OmniVideoForConditionalGeneration.from_pretrained(repository)
    assert expected != expected_outputs(base, plain, base.processor)
    assert last_json(run_client(open_doors(NAME), hub_server)) == expected


@pytest.mark.slow
def test_without_the_package_a_push_is_refused_and_nothing_is_sent(repository, hub_server):
    hub_server.add_repo(BASE, repository)
    code = f"""
from diffusers import DiffusionPipeline
from transformers import AutoModel
pipe = DiffusionPipeline.from_pretrained({BASE!r}, trust_remote_code=True)
model = AutoModel.from_pretrained({BASE!r}, trust_remote_code=True)
for part in (pipe, model):
    try:
        part.push_to_hub({NAME!r})
    except ImportError as error:
        print(error)
"""
    told = [line for line in run_client(WITHOUT_PACKAGE + code, hub_server).splitlines() if "pip install" in line]
    assert len(told) == 2
    assert all("omni_video_hf.hub.push" in line for line in told)
    assert set(hub_server.repos) == {BASE}
    assert not hub_server.uploads


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "fault"), [("PUT", "/upload/", "cut"), ("POST", "/commit/", "cut")])
def test_a_push_that_is_cut_changes_nothing_and_is_completed_by_the_next(repository, hub_server, method, path, fault):
    old = hub_server.add_repo(NAME, {"README.md": b"---\nlicense: mit\n---\n"})
    head = old.refs["refs/heads/main"]
    hub_server.fail(method, path, fault, times=50, after_bytes=2000 if method == "PUT" else 0)
    error = run_client(command("push", repository, NAME), hub_server, fails=True)
    assert error.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    assert hub_server.repos[NAME].refs["refs/heads/main"] == head
    hub_server._faults.clear()
    before = len(hub_server.uploads)
    output = run_client(command("push", repository, NAME), hub_server)
    assert f"/{NAME}/commit/" in output
    sent = [oid for _, oid, _ in hub_server.uploads]
    assert len(sent) == len(set(sent)), "uploaded files are not sent again"
    if method == "POST":
        assert len(hub_server.uploads) == before
    assert set(served(hub_server, NAME)) == {
        *(path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()),
        "README.md",
    }
    requests = len(hub_server.uploads)
    run_client(command("push", repository, NAME), hub_server)
    assert len(hub_server.uploads) == requests
    for token in (hub_server.token,):
        assert token not in hub_server.output
        assert not hub_server.leaks(token)


@pytest.mark.slow
def test_old_shards_and_old_code_go_with_the_same_commit(repository, hub_server, tmp_path):
    pipe = OmniVideoPipeline.from_pretrained(repository)
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    sharded = tmp_path / "sharded"
    files = {p.relative_to(sharded).as_posix(): p.read_bytes() for p in sharded.rglob("*.*")}
    hub_server.add_repo(
        NAME, files | {"modeling_omni_video_00000000.py": b"old = 1", "notes.txt": b"mine", "my_script.py": b"x = 1"}
    )
    run_client(command("push", repository, NAME), hub_server)
    now = set(served(hub_server, NAME))
    assert not [name for name in now if "-of-" in name or "00000000" in name]
    assert "mllm/model.safetensors.index.json" not in now
    assert {"notes.txt", "my_script.py", "model.safetensors.index.json", "mllm/model.safetensors"} <= now


@pytest.mark.slow
def test_revision_pull_request_and_copy_of_a_repository(repository, hub_server):
    hub_server.add_repo(BASE, repository)
    assert "/commit/" in run_client(command("push", BASE, NAME, "--revision", "try", "--private"), hub_server)
    repo = hub_server.repos[NAME]
    assert repo.private
    assert not repo.find("main").files.keys() - {".gitattributes"}
    copied = {path: blob.data for path, blob in repo.find("try").files.items() if path != ".gitattributes"}
    card = copied.pop("README.md").decode()
    assert copied == {path: data for path, data in served(hub_server, BASE).items() if path != ".gitattributes"}
    assert ModelCard(card).data.base_model == BASE
    head = hub_server.repos[BASE].refs["refs/heads/main"]
    output = run_client(command("push", repository, BASE, "--create-pr", "--message", "A card"), hub_server)
    assert f"/{BASE}/discussions/1" in output
    assert hub_server.repos[BASE].refs["refs/heads/main"] == head


@pytest.mark.slow
def test_who_may_not_push(repository, hub_server):
    for token in (hub_server.read_token, hub_server.stranger_token, ""):
        error = run_client(command("push", repository, NAME), hub_server, fails=True, token=token)
        assert error.strip().splitlines()[-1].startswith("error: ")
        assert "Traceback" not in error
        assert not token or token not in error
    assert NAME not in hub_server.repos


# --- what is pushed -------------------------------------------------------------------------------------------------


def test_only_files_of_a_repository_are_taken(repository, tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    for name in (
        "config.json", "mllm/model.safetensors", "assets/clip.mp4", "LICENSE", ".env", ".git/config", "train.py",
        "optimizer.pt", "training_args.bin", "checkpoint-5/model.safetensors", "x.safetensors.incomplete",
        "__pycache__/a.pyc", "modeling_omni_video_0a1b2c3d.py", "notes.exe", "runs/events.out.tfevents.1",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    files, left_out = repository_files(folder)
    taken = {"config.json", "mllm/model.safetensors", "assets/clip.mp4", "LICENSE", "modeling_omni_video_0a1b2c3d.py"}
    assert set(files) == taken
    assert {".env", ".git/", "train.py", "optimizer.pt", "training_args.bin", "checkpoint-5/"} < set(left_out)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_out_of_the_folder_are_refused(repository, tmp_path, kind):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = tmp_path / "repo"
    folder.mkdir()
    if kind == "file":
        (folder / "config.json").symlink_to(secret)
        with pytest.raises(ValueError, match=r"config\.json: is a link to .*secret\.json, outside the folder"):
            repository_files(folder)
        assert set(repository_files(folder, [tmp_path])[0]) == {"config.json"}
    else:
        (folder / "assets").symlink_to(tmp_path)
        files, left_out = repository_files(folder)
        assert not files
        assert left_out == ["assets"]


def test_a_token_in_a_file_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("login with hf_" + "a" * 34)
    with pytest.raises(ValueError, match=r"README\.md: contains an access token"):
        repository_files(tmp_path)


def test_incomplete_and_damaged_repositories_are_refused(repository, tmp_path, hub_server):
    model = OmniVideoForConditionalGeneration.from_pretrained(repository)
    model.save_pretrained(tmp_path / "model")
    assert missing_parts(tmp_path / "model") == ["model_index.json", "processor_config.json"]
    error = run_client(command("push", tmp_path / "model", NAME), hub_server, fails=True)
    assert "is not a complete repository" in error
    assert "--base" in error
    assert NAME not in hub_server.repos

    added = complete_repository(tmp_path / "model", repository)
    assert {"vae", "text_encoder", "tokenizer", "scheduler", "processor", "model_index.json"} < set(added)
    check_complete(tmp_path / "model")
    assert OmniVideoPipeline.from_pretrained(tmp_path / "model").vae.config.base_dim == 4

    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"vae.*not a complete safetensors file"):
        check_complete(tmp_path / "model")
    weights.unlink()
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json: names transformer/.* does not exist"):
        check_complete(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        complete_repository(tmp_path / "model", tmp_path)


@pytest.mark.slow
def test_push_with_base_completes_a_model(repository, tmp_path, hub_server):
    hub_server.add_repo(BASE, repository)
    OmniVideoForConditionalGeneration.from_pretrained(repository).save_pretrained(tmp_path / "model")
    run_client(command("push", tmp_path / "model", NAME, "--base", BASE), hub_server)
    files = served(hub_server, NAME)
    assert ModelCard(files.pop("README.md").decode()).data.base_model == BASE
    assert files == served(hub_server, BASE)


# --- saving ---------------------------------------------------------------------------------------------------------


def test_shards_variants_and_the_files_they_replace(tmp_path):
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path / "x", max_shard_size="100KB")
    shards = sorted(path.name for path in (tmp_path / "x" / "mllm").glob("*.safetensors"))
    assert len(shards) > 1
    pipe.save_pretrained(tmp_path / "x", variant="fp16")
    assert sorted(path.name for path in (tmp_path / "x" / "mllm").glob("*.safetensors")) == sorted(
        [*shards, "model.fp16.safetensors"]
    )
    for variant in (None, "fp16"):
        OmniVideoPipeline.from_pretrained(tmp_path / "x", variant=variant)
        _, report = OmniVideoForConditionalGeneration.from_pretrained(
            tmp_path / "x", variant=variant, output_loading_info=True
        )
        assert not any(report.values())
    pipe.save_pretrained(tmp_path / "x")
    names = sorted(path.name for path in (tmp_path / "x" / "mllm").iterdir() if "safetensors" in path.name)
    assert names == ["model.fp16.safetensors", "model.safetensors"]
    weight_map = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.partition("/")[0] for name in weight_map.values()} == {"mllm", "adapter", "transformer"}


def test_one_copy_of_every_weight(repository):
    index = json.loads((repository / "model.safetensors.index.json").read_text())["weight_map"]
    model = OmniVideoForConditionalGeneration.from_pretrained(repository)
    assert len(index) == len(model.state_dict())
    assert not list(repository.glob("*.safetensors"))


def test_pickles_are_not_written(tmp_path):
    pipe = tiny.pipeline()
    for saved in (pipe, tiny.model()):
        with pytest.raises(ValueError, match="safe_serialization"):
            saved.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_a_whole_model_is_saved_from_given_weights_and_from_the_disk(repository, tmp_path):
    model = OmniVideoForConditionalGeneration.from_pretrained(repository)
    doubled = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "doubled", state_dict=doubled)
    loaded = OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "doubled").state_dict()
    assert loaded.keys() == doubled.keys()
    assert all(torch.equal(loaded[name], doubled[name]) for name in doubled)

    device_map = {"mllm": "cpu", "vision_head": "cpu", "adapter": "disk", "decoder": "disk"}
    offloaded = OmniVideoForConditionalGeneration.from_pretrained(
        repository, device_map=device_map, offload_folder=tmp_path / "disk"
    )
    offloaded.save_pretrained(tmp_path / "offloaded")
    for name in ("mllm/model", "adapter/diffusion_pytorch_model", "transformer/diffusion_pytorch_model"):
        file = f"{name}.safetensors"
        assert (tmp_path / "offloaded" / file).read_bytes() == (repository / file).read_bytes()


def test_a_save_that_fails_leaves_what_was_there(repository, tmp_path, monkeypatch):
    pipe = OmniVideoPipeline.from_pretrained(repository)
    pipe.save_pretrained(tmp_path / "x")
    before = {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(type(pipe.vae), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path / "x")
    assert {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


# --- cards ----------------------------------------------------------------------------------------------------------


SUMMARY = TrainingSummary(
    stage="joint",
    description="Knows how foxes run.",
    base_model=BASE,
    datasets=["lab/foxes", "a folder of mine"],
    num_samples=120,
    steps=500,
    batch_size=8,
    learning_rate=1e-5,
    losses={"flow_matching_loss": 0.1234},
    scores={"CLIP score": 0.31},
    dtype="bfloat16",
    hardware="1 x A100",
    peak_memory=31_000_000_000,
    seconds=5400.0,
    seed=7,
    license="apache-2.0",
    limits=["Only foxes."],
    samples=[{"prompt": "a fox", "file": "assets/fox.mp4"}],
)


def test_a_card_has_the_facts_of_the_run(repository, tmp_path):
    folder = tmp_path / "repo"
    OmniVideoPipeline.from_pretrained(repository).save_pretrained(folder)
    (folder / "assets").mkdir()
    (folder / "assets" / "fox.mp4").write_bytes(b"")
    SUMMARY.save(folder)
    text = render_model_card(folder, NAME)
    assert card_problems(text) == ([], [])
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "any-to-any", "apache-2.0")
    assert (data.base_model, data.base_model_relation, data.datasets) == (BASE, "finetune", ["lab/foxes"])
    assert data.widget == [{"text": "a fox", "output": {"url": "assets/fox.mp4"}}]
    assert {"omni-video", "text-to-video", "custom_code"} <= set(data.tags)
    facts = ["joint", "500", "0.1234", "a folder of mine", "31.0 GB", "1.5 hours", "Only foxes.", "| t2v | 64x32 |"]
    assert [fact for fact in facts if fact not in text] == []
    assert "No scores were measured" not in text


def test_a_card_without_facts_omits_them_and_names_no_path(repository, tmp_path):
    text = render_model_card(repository, NAME, base_model=repository)
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.license is None
    assert str(repository) not in text
    assert "Not stated" in text
    assert "No scores were measured" in text
    assert "None" not in text


def test_a_card_that_a_person_edited_stays(repository, tmp_path):
    folder = tmp_path / "repo"
    OmniVideoPipeline.from_pretrained(repository).save_pretrained(folder)
    assert write_model_card(folder, NAME)
    card = folder / "README.md"
    assert is_generated(card.read_text())
    SUMMARY.save(folder)
    assert write_model_card(folder, NAME)
    assert "Knows how foxes run" in card.read_text()
    card.write_text(card.read_text().replace("foxes", "wolves"))
    edited = card.read_text()
    assert not write_model_card(folder, "lab/other")
    assert card.read_text() == edited


def test_an_unknown_entry_of_the_summary_is_refused(repository, tmp_path):
    (tmp_path / "training_summary.json").write_text('{"stages": "joint"}')
    with pytest.raises(ValueError, match=r"unknown entries stages; allowed are .*stage"):
        render_model_card(tmp_path, NAME)


HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Owned",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    '")\nimport os; os.system("touch owned")\n("',
    "[click](javascript:alert(1)) ![pixel](https://evil.org/x.png)",
    "a | b | c\n| --- | --- |\n```python\nprint()\n```",
    "{{ card_data }} {% for x in range(9) %}",
    "# heading",
    "- item: 'quoted' \"twice\" \\ `code` *bold* __bold__ $$x$$",
]


def test_plain_text_has_no_markup():
    for text in HOSTILE:
        shown = plain(text)
        assert "\n" not in shown and "<" not in shown
        assert re.search(r"(?<!\\)[\[\]*`|$]", shown.replace("\\\\", "")) is None
        assert not shown.startswith(("#", "-", "+", "="))
    assert plain("flow_matching_loss of 3 foxes, lab/foxes-2.0 (mine)") == (
        "flow_matching_loss of 3 foxes, lab/foxes-2.0 (mine)"
    )
    assert (plain("1. one"), plain("1) one"), plain("= one")) == ("1\\. one", "1\\) one", "\\= one")


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("is_lora", [False, True])
def test_texts_of_others_are_shown_and_not_obeyed(repository, tmp_path, hostile, is_lora):
    folder = tmp_path / "repo"
    folder.mkdir()
    file = "lora.safetensors" if not is_lora else LORA_NAME
    save_file({"transformer.a.lora_A.weight": torch.zeros(1)}, folder / file)
    name = hostile.replace("/", "").replace("\0", "")[:40]
    (folder / "assets").mkdir()
    (folder / "assets" / f"{name}.mp4").write_bytes(b"")
    preset = {"width": hostile, "height": 8, "num_frames": 5, "num_inference_steps": hostile, "guidance_scale": 1}
    index = {"presets": {hostile: preset | {"flow_shift": 1, "fps": hostile}}}
    (folder / "model_index.json").write_text(json.dumps(index))
    TrainingSummary(
        stage=hostile,
        description=hostile,
        base_model=hostile,
        datasets=[hostile],
        steps=3,
        learning_rate={hostile: 1e-3},
        losses={hostile: 1.0},
        scores={hostile: 1.0},
        dtype=hostile,
        hardware=hostile,
        license=hostile,
        limits=[hostile],
        samples=[{"prompt": hostile, "file": f"assets/{name}.mp4"}, {"prompt": "x", "file": "../secret"}],
    ).save(folder)
    text = render_model_card(folder, hostile)
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    data = yaml.safe_load(front)
    assert data["license"] == hostile and data["widget"][0]["text"] == hostile
    assert [entry["output"]["url"] for entry in data["widget"]] == [f"assets/{name}.mp4"]
    assert "base_model" not in data
    own = {"# " + plain(hostile), "## Use", "## Settings", "## Memory", "## Training", "## Scores", "## Samples",
           "## Limits", "## Licence"}  # fmt: skip
    prose = re.sub(r"^```python\n.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert {line for line in prose.splitlines() if line.startswith("#")} <= own
    seal = "<!-- written by omni_video_hf"
    assert "<" not in prose.replace(seal, "") and "```" not in prose.replace(r"\`\`\`", "")
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", prose)
    assert [link for link in links if ":" in link and not link.startswith("https://arxiv.org/")] == []
    for code in re.findall(r"^```python\n(.*?)^```$", body, flags=re.DOTALL | re.MULTILINE):
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        assert "system" not in {getattr(call.func, "attr", None) for call in calls}
        texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert hostile in texts
    tables = [line for line in prose.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {3, 8}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"steps": "<b>"}', "`steps`"),
        ('{"losses": {"loss": "a"}}', "`losses`"),
        ('{"samples": [{"prompt": 3, "file": "x"}]}', "`samples`"),
        ('{"datasets": "lab/foxes"}', "`datasets`"),
        ('{"seconds": true}', "`seconds`"),
        ("[1]", "JSON object"),
        ("{", "JSON file"),
        ("[" * 100_000, "JSON file"),
    ],
)
def test_a_summary_of_wrong_kinds_is_refused(tmp_path, content, word):
    (tmp_path / "training_summary.json").write_text(content)
    with pytest.raises(ValueError, match=rf"training_summary\.json: .*{word}"):
        render_model_card(tmp_path, NAME)


def test_the_base_that_is_given_counts(tmp_path):
    TrainingSummary(base_model=str(tmp_path)).save(tmp_path)
    assert write_model_card(tmp_path, NAME, BASE)
    assert ModelCard((tmp_path / "README.md").read_text()).data.base_model == BASE
    for wrong in (tmp_path, "no-owner", "a/b/c"):
        with pytest.raises(ValueError, match="must be a Hub repository"):
            write_model_card(tmp_path, NAME, wrong)


def test_only_the_parts_that_are_there_are_listed(repository, tmp_path):
    model = OmniVideoForConditionalGeneration.from_pretrained(repository, enable_mllm=False)
    model.save_pretrained(tmp_path / "part")
    TrainingSummary(steps=3).save(tmp_path / "part")
    text = render_model_card(tmp_path / "part", NAME)
    parts = re.findall(r"^\| (\w+) \| [\d.]+ \|$", text, flags=re.MULTILINE)
    assert "vision_head" in parts and "mllm" not in parts
    assert "it understands" not in text and "Parts of an" in text
    whole = render_model_card(repository, NAME)
    assert {"mllm", "vision_head", "adapter", "transformer", "vae"} <= set(
        re.findall(r"^\| (\w+) \| [\d.]+ \|$", whole, flags=re.MULTILINE)
    )
    assert "it understands" in whole
    assert not {"Llama", "Wan", "SigLIP", "umT5"} & set(re.findall(r"\w+", whole.partition("## Licence")[2]))


def test_the_duration_is_that_of_all_attempts(tmp_path):
    samples = [training.sample("t2v", index) for index in range(4)]
    settings = {"stage": "decoder", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = training.trainer(tmp_path, samples, **settings)
    first.train()
    assert summarize(first).seconds > 0
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    clock = state["stateful_callbacks"]["RunClock"]["args"]
    assert 0 < clock["seconds"] < summarize(first).seconds
    clock["seconds"] += 5000
    path.write_text(json.dumps(state))
    manifest = path.with_name("checkpoint.json")
    content = json.loads(manifest.read_text())
    content["files"][path.name] = path.stat().st_size
    manifest.write_text(json.dumps(content))
    second = training.trainer(tmp_path, samples, **settings)
    second.train(resume_from_checkpoint=str(path.parent))
    assert 5000 < summarize(second).seconds < 6000


@pytest.mark.slow
def test_lora_card_and_push(repository, tmp_path, hub_server):
    model = tiny.model()
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"], r=2, lora_alpha=4), model)
    OmniVideoPipeline.save_lora_weights(tmp_path / "lora", **collect_lora_layers(model))
    TrainingSummary(steps=20, datasets=["lab/foxes"]).save(tmp_path / "lora")
    run_client(command("push", tmp_path / "lora", NAME, "--base", BASE), hub_server)
    files = served(hub_server, NAME)
    text = files["README.md"].decode()
    assert card_problems(text) == ([], [])
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert "lora" in data.tags
    hub_server.add_repo(BASE, repository)
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1].replace(
        'task="t2v"', 'task="t2v", height=32, width=32, num_frames=5, num_inference_steps=1'
    )
    run_client(WITHOUT_PACKAGE + snippet + "\nassert pipe.get_list_adapters()", hub_server)


@pytest.mark.slow
def test_a_bad_card_is_refused_before_anything_is_sent(repository, tmp_path, hub_server):
    folder = tmp_path / "repo"
    OmniVideoPipeline.from_pretrained(repository).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: my-own\npipeline_tag: fox\n---\n")
    error = run_client(command("push", folder, NAME), hub_server, fails=True)
    assert "license" in error
    assert not hub_server.uploads


@pytest.mark.slow
def test_card_command(repository, tmp_path, hub_server):
    folder = tmp_path / "repo"
    OmniVideoPipeline.from_pretrained(repository).save_pretrained(folder)
    assert run_client(command("card", folder, NAME, "--base", BASE), hub_server).strip() == str(folder / "README.md")
    (folder / "README.md").write_text("mine")
    assert "by a person" in run_client(command("card", folder, NAME), hub_server, fails=True)
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.slow
def test_snippets_of_a_card_run_without_the_package(repository, hub_server):
    """At tiny sizes: the settings of the calls are cut down, nothing else is changed."""
    clip = str(Path(__file__).resolve().parents[1] / "data" / "bigbuckbunny.mp4")
    text = render_model_card(repository, NAME)
    hub_server.add_repo(NAME, repository)
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 2
    code = "\n".join(snippets).replace('"fox.mp4"', repr(clip)).replace("torch.bfloat16", "torch.float32")
    code = code.replace('task="t2v"', 'task="t2v", height=32, width=32, num_frames=5, num_inference_steps=1')
    code = code.replace('task="v2v"', 'task="v2v", height=32, width=32, num_frames=5, num_inference_steps=1')
    code = code.replace('task="understand"', 'task="understand", max_new_tokens=2')
    run_client(WITHOUT_PACKAGE + code + "\nassert len(frames) == len(edited) == 5 and answer is not None", hub_server)


# --- Trainer --------------------------------------------------------------------------------------------------------


TRAINER = """
import sys
sys.path.insert(0, {tests!r})
import torch, training
from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline
model = OmniVideoForConditionalGeneration.from_pretrained({base!r}{options})
{prepare}
trainer = training.trainer(
    {output!r}, [training.{sample}(task, i) for i in range(4) for task in {tasks!r}], model=model,
    sampler=training.BatchesInOrder([[i] for i in range(4)]),
    stage={stage!r}, max_steps=2, push_to_hub=True, hub_model_id={name!r}, hub_private_repo=True, {settings}
)
trainer.train()
print(trainer.push_to_hub(dataset="lab/foxes").commit_url)
"""


def trainer_code(output, stage="decoder", options="", sample="sample", settings="", prepare="", tasks=("t2v",)):
    values = {"output": str(output), "stage": stage, "options": options, "sample": sample, "settings": settings}
    values |= {
        "tests": str(Path(__file__).parents[1] / "support"),
        "base": BASE,
        "name": NAME,
        "prepare": prepare,
        "tasks": tasks,
    }
    return TRAINER.format(**values)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["whole", "without the MLLM"])
def test_a_trainers_push_is_a_complete_repository_with_its_card(repository, hub_server, tmp_path, loaded):
    hub_server.add_repo(BASE, repository)
    options = "" if loaded == "whole" else ", enable_mllm=False"
    run_client(trainer_code(tmp_path / "run", options=options), hub_server)
    files, base = served(hub_server, NAME), served(hub_server, BASE)
    card = files["README.md"].decode()
    summary = (tmp_path / "run" / "training_summary.json").read_bytes()
    assert files["training_summary.json"] == summary
    assert ModelCard(card).data.to_dict() == ModelCard.load(tmp_path / "run" / "README.md").data.to_dict()
    assert card_problems(card) == ([], [])
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation, data.datasets) == (BASE, "finetune", ["lab/foxes"])
    assert "| stage | decoder |" in card
    assert "flow_matching_loss" in card
    assert files.keys() >= base.keys() - {"mllm/model.safetensors"}
    assert ("mllm/model.safetensors" in files) == (loaded == "whole")
    decoder = "transformer/diffusion_pytorch_model.safetensors"
    assert files[decoder] != base[decoder]
    assert files["vae/diffusion_pytorch_model.safetensors"] == base["vae/diffusion_pytorch_model.safetensors"]
    assert not [name for name in files if name.startswith(("checkpoint-", "runs")) or name.endswith((".pt", ".bin"))]
    assert hub_server.token not in hub_server.output

    outputs = last_json(run_client(open_doors(NAME), hub_server))
    model = OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "run")
    whole = OmniVideoForConditionalGeneration.from_pretrained(repository)
    whole.load_state_dict(whole.state_dict() | model.state_dict())
    pipe = OmniVideoPipeline.from_pretrained(repository, **whole.pipeline_components())
    assert outputs == expected_outputs(pipe, whole, pipe.processor)


@pytest.mark.slow
def test_the_push_of_the_stage_without_adapter_and_decoder(repository, hub_server, tmp_path):
    hub_server.add_repo(BASE, repository)
    options = ", adapter_config=None, decoder_config=None"
    run_client(trainer_code(tmp_path / "run", "align", options), hub_server)
    files, base = served(hub_server, NAME), served(hub_server, BASE)
    assert files["mllm/model.safetensors"] != base["mllm/model.safetensors"]
    decoder = "transformer/diffusion_pytorch_model.safetensors"
    assert files[decoder] == base[decoder]
    outputs = last_json(run_client(open_doors(NAME), hub_server))
    assert outputs["AutoModel"]["velocity"]


@pytest.mark.slow
def test_the_push_of_the_lora_stage_is_a_lora_with_its_card(repository, hub_server, tmp_path):
    hub_server.add_repo(BASE, repository)
    prepare = "from omni_video_hf.training.lora import add_lora; add_lora(model, {'r': 2})"
    code = trainer_code(tmp_path / "run", "lora", sample="instructed", tasks=("v2v",), prepare=prepare)
    run_client(code, hub_server)
    files = served(hub_server, NAME)
    assert files.keys() == {LORA_NAME, "README.md", "training_summary.json"}
    card = ModelCard(files["README.md"].decode())
    assert card_problems(card.content) == ([], [])
    assert (card.data.base_model, card.data.base_model_relation) == (BASE, "adapter")
    check = f"""
import json
from omni_video_hf import OmniVideoPipeline
pipe = OmniVideoPipeline.from_pretrained({BASE!r})
pipe.load_lora_weights({NAME!r})
print(json.dumps(pipe.get_list_adapters()))
"""
    adapters = last_json(run_client(check, hub_server))
    assert adapters.keys() == {"mllm", "adapter", "transformer"}


def test_checkpoints_are_not_pushed(tmp_path):
    with pytest.raises(ValueError, match=r"`hub_strategy` 'checkpoint'"):
        training.arguments(tmp_path, push_to_hub=True, hub_strategy="checkpoint", hub_model_id=NAME)
