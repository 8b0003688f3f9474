"""The page as a Space: its files, and the push."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from hub_server import hub_server_fixture, run_client  # noqa: F401

from omni_video_hf.demo import space
from omni_video_hf.demo.space import space_files

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces" / "omni-video"
NAME = "lab/demo"
PUSH = f"from omni_video_hf.demo.space import push_space; print(push_space({NAME!r}, MODEL).commit_url)"


def front_matter():
    return yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])


def requirements():
    return {re.match(r"[\w-]+", line)[0]: line for line in (SPACE / "requirements.txt").read_text().splitlines()}


def test_the_space_needs_what_the_package_and_its_page_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(requirements().values()) == {*project["dependencies"], *project["optional-dependencies"]["demo"]}


def test_the_front_matter_names_the_app_and_the_tested_gradio():
    card = front_matter()
    assert (SPACE / card["app_file"]).is_file()
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert card["sdk"] == "gradio"
    assert card["sdk_version"] == pinned["gradio"]
    assert len(card["short_description"]) <= 60  # limit of the Hub


def test_the_app_decorates_one_function_and_needs_no_library_of_spaces():
    source = (SPACE / "app.py").read_text()
    assert space.OURS in source.splitlines()[0]
    tree = ast.parse(source)
    (optional,) = [node for node in tree.body if isinstance(node, ast.Try)]
    assert [alias.name for alias in optional.body[0].names] == ["spaces"]
    assert source.count("spaces.GPU(") == 1
    first_import_of_torch = source.index("import torch")
    assert source.index("import spaces") < first_import_of_torch


def test_the_files_are_the_page_and_the_package_with_or_without_its_checkpoint():
    files = space_files()
    assert {"app.py", "README.md", "requirements.txt", "omni_video_hf/demo/page.py"} <= files.keys()
    assert "omni_video_hf/default_checkpoint/model_index.json" in files
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]
    other = space_files("lab/omni-video")
    assert other["model.txt"] == b"lab/omni-video\n"
    assert not [name for name in other if "default_checkpoint" in name]


@pytest.mark.slow
def test_a_push_is_one_commit_and_the_next_one_keeps_what_people_wrote(hub_server):
    code = PUSH.replace("MODEL", "'lab/omni-video'")
    assert f"{NAME}/commit/" in run_client(code, hub_server)
    assert len(hub_server.calls("POST", "/commit/")) == 1
    repo = hub_server.repos[NAME]
    files = dict(repo.find("main").files)
    assert set(space_files("lab/omni-video")) <= set(files)

    edit = f"""
from huggingface_hub import CommitOperationAdd, HfApi
operations = [
    CommitOperationAdd("README.md", b"---\\nsdk: gradio\\n---\\nmine"), CommitOperationAdd("notes.txt", b"mine"),
    CommitOperationAdd("omni_video_hf/old_module.py", b"old"),
]
HfApi().create_commit({NAME!r}, operations, commit_message="edit", repo_type="space")
"""
    run_client(edit, hub_server)
    run_client(PUSH.replace("MODEL", "'lab/other'"), hub_server)
    served = {path: blob.data for path, blob in repo.find("main").files.items()}
    assert served["README.md"].endswith(b"mine")
    assert served["notes.txt"] == b"mine"
    assert served["model.txt"] == b"lab/other\n"
    assert "omni_video_hf/old_module.py" not in served


@pytest.mark.slow
def test_a_space_of_somebody_else_is_refused_and_stays(hub_server):
    hub_server.add_repo(NAME, {"app.py": b"print('mine')\n", "README.md": b"---\nsdk: gradio\n---\n"})
    code = f"""
from omni_video_hf.demo.space import push_space
try:
    push_space({NAME!r})
except ValueError as error:
    print(error)
"""
    assert "did not write" in run_client(code, hub_server)
    assert not hub_server.calls("POST", "/commit/")
