import json
import shutil

import pytest
import torch
from hub_server import hub_server_fixture, run_client  # noqa: F401
from safetensors.torch import save_file

from omni_video_hf import OmniVideoForConditionalGeneration
from omni_video_hf.hub.inspection import repository_parts, repository_table
from omni_video_hf.hub.repository import finalize_repository, read_header, write_root_index
from omni_video_hf.media.images import load_image

NAME = "lab/omni-video-tiny"


def test_root_index_names_every_weight_of_the_component_folders_once(converted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        (folder / name).unlink()
    finalize_repository(folder)
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (converted / name).read_bytes()
    loaded, report = OmniVideoForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in loaded.state_dict().values())
    assert index["metadata"]["total_size"] == stored


def test_a_weight_in_two_folders_is_refused(converted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    save_file(
        {"proj_out.weight": torch.zeros(1)}, folder / "adapter" / "diffusion_pytorch_model-00001-of-00001.safetensors"
    )
    with pytest.raises(ValueError, match=r"proj_out\.weight.*also in adapter/diff"):
        write_root_index(folder)


def test_header(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.zeros(0, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
        "c": ("BOOL", (0,), 0),
    }
    data = (tmp_path / "x.safetensors").read_bytes()
    for damaged in (b"", data[:20], data[:-1]):
        (tmp_path / "x.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.safetensors: not a complete"):
            read_header(tmp_path / "x.safetensors")


def test_parts_of_a_folder(converted):
    parts = {part.name: part for part in repository_parts(converted)}
    assert set(parts) == {"mllm", "vision_head", "adapter", "transformer", "vae", "text_encoder"}
    model = OmniVideoForConditionalGeneration.from_pretrained(converted)
    for name, module in (("mllm", model.mllm), ("vision_head", model.vision_head), ("transformer", model.decoder)):
        assert parts[name].parameters == sum(tensor.numel() for tensor in module.state_dict().values())
        assert parts[name].dtypes == {"float32": parts[name].parameters}
        assert parts[name].num_bytes == 4 * parts[name].parameters
    assert repository_table(list(parts.values()), "x").row_count == len(parts) + 1


@pytest.mark.slow
def test_the_command_takes_a_hub_repository(converted, hub_server, tmp_path):
    hub_server.add_repo(NAME, converted)
    arguments = ["generate", "a fox", "-o", str(tmp_path / "fox.png"), "--size", "64x32", "--steps", "1", "-m", NAME]
    code = f"import sys; sys.argv = ['omni-video', *{arguments!r}]; from omni_video_hf.cli.main import main; main()"
    run_client(code, hub_server)
    assert load_image(tmp_path / "fox.png").size == (64, 32)


def test_parts_of_a_hub_repository_are_read_without_its_weights(converted, hub_server):
    hub_server.add_repo(NAME, converted)
    code = "import sys; sys.argv = ['omni-video', 'info', '%s', '--json']"
    code += "\nfrom omni_video_hf.cli.main import main\nmain()"
    parts = json.loads(run_client(code % NAME, hub_server))
    assert {part["name"]: part["num_bytes"] for part in parts} == {
        part.name: part.num_bytes for part in repository_parts(converted)
    }
    error = run_client(code % "lab/nothing", hub_server, fails=True)
    assert error.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
