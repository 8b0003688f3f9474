import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from golden import CORE
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner

from conversion.convert_omni_video import app, convert
from conversion.unfinished import alone
from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline
from omni_video_hf.hub.repository import read_header

ORIGINAL = CORE / "omni_ckpts"
ROOT = Path(__file__).parents[2]
TORCH_FILES = (
    "transformer/model.pt",
    "adapter/model.pt",
    "vision_head/vision_head/pytorch_model.bin",
    "wan/wanxiang1_3b/Wan2.1_VAE.pth",
    "wan/wanxiang1_3b/models_t5_umt5-xxl-enc-bf16.pth",
)
PICKLES = ("special_tokens/tokens.pkl", "unconditioned_context/context.pkl")
SAFETENSORS = (
    "wan/wanxiang1_3b/diffusion_pytorch_model.safetensors",
    "ar_model/checkpoint/llm/model.safetensors",
    "ar_model/checkpoint/vision_tower/model.safetensors",
    "ar_model/checkpoint/mm_projector/model.safetensors",
)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def slow(*values):
    """Parameters that `make test` leaves out: reading a checkpoint takes a second, converting one takes five."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture
def original(tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(ORIGINAL, tmp_path / "omni_ckpts"))


def refused(original, output, *messages, **options):
    """The conversion stops with one error and leaves nothing behind."""
    with pytest.raises(ValueError) as error:
        convert(original, output, **options)
    text = str(error.value)
    assert all(str(message) in text for message in messages), text
    assert not output.exists()
    assert not output.with_name(f"{output.name}.incomplete").exists()
    assert not output.with_name(f"{output.name}.lock").exists()


def weights(folder):
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


# --- what comes out -------------------------------------------------------------------------------------------------


def test_layout(converted):
    names = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    assert names >= {
        "model_index.json",
        "config.json",
        "model.safetensors.index.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "mllm/config.json",
        "mllm/model.safetensors",
        "mllm/generation_config.json",
        "adapter/config.json",
        "adapter/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "processor/processor_config.json",
    }
    assert not [name for name in names if name.endswith((".partial", "conversion.json", ".bin", ".pt", ".pkl"))]
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    stored = [
        name
        for folder in ("mllm", "adapter", "transformer")
        for name in read_header(next((converted / folder).glob("*.safetensors")))
    ]
    assert sorted(index["weight_map"]) == sorted(stored)
    assert all((converted / file).is_file() for file in index["weight_map"].values())


def test_both_libraries_load_the_same(converted):
    whole, report = OmniVideoForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(report.values())
    pipe = OmniVideoPipeline.from_pretrained(converted)
    pairs = [
        (whole.mllm, pipe.mllm.mllm),
        (whole.vision_head, pipe.mllm.vision_head),
        (whole.adapter, pipe.adapter),
        (whole.decoder, pipe.transformer),
    ]
    for left, right in pairs:
        state = right.state_dict()
        assert set(state) == set(left.state_dict())
        assert all(torch.equal(tensor, state[name]) for name, tensor in left.state_dict().items())
    assert pipe.mllm.config.image_generation_token_id == whole.config.image_generation_token_id == 98
    assert pipe.mllm.config.video_generation_token_id == 99
    assert whole.generation_config.eos_token_id == [97, 105]
    assert whole.generation_config.temperature == 0.2
    assert pipe.config.presets["t2v"]["guidance_scale"] == 6.0
    assert pipe.processor.model_max_length == 400
    assert pipe.scheduler.config.flow_shift == 5.0


def test_text_encoder_loads_without_complaint(converted):
    _, report = UMT5EncoderModel.from_pretrained(converted / "text_encoder", output_loading_info=True)
    assert not any(report.values())


@pytest.mark.slow
def test_the_trained_model_wins_key_by_key(original, tmp_path, converted):
    path = original / "transformer" / "model.pt"
    trained = torch.load(path, weights_only=True)["module"]
    name = "adapter.fc.0.bias"
    kept = "adapter.fc.2.bias"
    trained[name] = torch.full_like(trained[name], 7.0)
    del trained[kept]
    adapter = torch.load(original / "adapter" / "model.pt", weights_only=True)
    adapter["model_state_dict"]["module.fc.2.bias"] = torch.full_like(
        adapter["model_state_dict"]["module.fc.2.bias"], 3.0
    )
    torch.save(adapter, original / "adapter" / "model.pt")
    torch.save(trained, path)  # bare, too
    convert(original, tmp_path / "out", max_context_length=64)
    out, before = weights(tmp_path / "out"), weights(converted)
    changed = {key for key in out if not torch.equal(out[key], before[key])}
    assert changed == {"adapter/query_transformer.input_proj_1.bias", "adapter/query_transformer.input_proj_2.bias"}
    assert float(out["adapter/query_transformer.input_proj_1.bias"].mean()) == 7.0
    assert float(out["adapter/query_transformer.input_proj_2.bias"].mean()) == 3.0


@pytest.mark.slow
def test_legacy_torch_files_and_the_other_place_of_the_vision_head(original, tmp_path, converted):
    for name in TORCH_FILES:
        content = torch.load(original / name, weights_only=True)
        torch.save(content, original / name, _use_new_zipfile_serialization=False)
    target = original / "ar_model" / "checkpoint" / "vision_head"
    target.mkdir()
    (original / TORCH_FILES[2]).rename(target / "pytorch_model.bin")
    convert(original, tmp_path / "out", max_context_length=64)
    out, before = weights(tmp_path / "out"), weights(converted)
    assert set(out) == set(before)
    assert all(torch.equal(out[name], before[name]) for name in out)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(tmp_path, converted, dtype):
    convert(ORIGINAL, tmp_path / "out", dtype=dtype, max_context_length=64)
    out, before = weights(tmp_path / "out"), weights(converted)
    assert all(torch.equal(out[name], before[name].to(dtype)) for name in before)
    assert OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == dtype


@pytest.mark.slow
def test_shards(tmp_path, converted):
    convert(ORIGINAL, tmp_path / "out", max_shard_size="100KB", max_context_length=64)
    files = list((tmp_path / "out" / "mllm").glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 150_000 for file in files)
    out, before = weights(tmp_path / "out"), weights(converted)
    assert all(torch.equal(out[name], before[name]) for name in before)
    whole = OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(whole.decoder.proj_out.weight, before["transformer/proj_out.weight"])
    OmniVideoPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_missing_parts_come_from_a_wan_repository(original, tmp_path, converted):
    shutil.rmtree(original / "wan/wanxiang1_3b/google")
    for name in TORCH_FILES[3:]:
        (original / name).unlink()
    refused(original, tmp_path / "out", "--wan-repo", TORCH_FILES[4])
    refused(original, tmp_path / "out", "has no folder 'text_encoder'", wan_repo=str(tmp_path))
    wan = Path(shutil.copytree(converted, tmp_path / "wan"))
    (wan / "vae" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    convert(original, tmp_path / "out", wan_repo=str(wan), max_context_length=64)
    out, before = weights(tmp_path / "out"), weights(converted)
    assert all(torch.equal(out[name], before[name]) for name in before)
    assert not list((tmp_path / "out").rglob("*.bin"))
    OmniVideoPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "no weights", "config", "code", "width"])
def test_a_wan_repository_that_does_not_fit_is_refused(original, tmp_path, converted, damage):
    (original / TORCH_FILES[4]).unlink()
    folder = Path(shutil.copytree(converted, tmp_path / "wan")) / "text_encoder"
    if damage == "cut":
        os.truncate(folder / "model.safetensors", 5000)
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "width":
        UMT5EncoderModel(UMT5Config(d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)).save_pretrained(folder)
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"d_model": "wide"} if damage == "config" else {"auto_map": {"AutoConfig": "code.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
    refused(original, tmp_path / "out", "text_encoder", wan_repo=str(tmp_path / "wan"))


@pytest.mark.slow
def test_files_that_belong_to_no_part_are_named(original, tmp_path, capsys):
    torch.save({}, original / "ar_model" / "checkpoint" / "training_args.bin")
    convert(original, tmp_path / "out")
    assert "training_args.bin" in "".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "name", ["ar_model/checkpoint/llm/tokenizer.json", "wan/wanxiang1_3b/google/umt5-xxl/tokenizer.json"]
)
def test_damaged_tokenizers(original, tmp_path, name):
    (original / name).write_text("{}")
    refused(original, tmp_path / "out", (original / name).parent)


def test_settings_that_refer_to_code_are_refused(original, tmp_path):
    path = original / "ar_model/checkpoint/llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}))
    refused(original, tmp_path / "out", "auto_map", path)


@pytest.mark.slow
def test_without_markers(original, tmp_path):
    (original / "special_tokens" / "tokens.pkl").unlink()
    refused(original, tmp_path / "out", "--without-markers")
    convert(original, tmp_path / "out", with_markers=False)
    pipe = OmniVideoPipeline.from_pretrained(tmp_path / "out")
    assert pipe.adapter.marker_embeds is None


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TORCH_FILES, *PICKLES])
@pytest.mark.parametrize("kind", ["pickle", *slow("torch", "legacy")])
def test_hostile_files_are_refused_and_nothing_runs(original, tmp_path, name, kind):
    marker = tmp_path / "ran"
    content = {"x": Payload(marker), "weight": torch.zeros(1)}
    if kind == "pickle":
        (original / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, original / name, _use_new_zipfile_serialization=kind == "torch")
    refused(original, tmp_path / "out", original / name)
    assert not marker.exists()


@pytest.mark.parametrize("name", [*TORCH_FILES, *PICKLES, *SAFETENSORS])
@pytest.mark.parametrize("damage", ["cut", *slow("empty", "missing", "noise")])
def test_damaged_files_are_refused_by_name(original, tmp_path, name, damage):
    path = original / name
    if damage == "missing":
        path.unlink()
        if name in (*TORCH_FILES[1:3], SAFETENSORS[0]):
            return  # the trained model has it all
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    else:
        data = path.read_bytes()
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    refused(original, tmp_path / "out", path.parent)


def change(original, name, edit):
    """Edit the weights of a file."""
    path = original / name
    if path.suffix == ".safetensors":
        content = load_file(path)
        edit(content)
        save_file(content, path, {"format": "pt"})
        return
    content = torch.load(path, weights_only=True)
    edit(content["module"] if "module" in content else content.get("model_state_dict", content))
    torch.save(content, path)


PLACES = {
    "transformer/model.pt": "wan_model.blocks.1.ffn.0.weight",
    "wan/wanxiang1_3b/Wan2.1_VAE.pth": "decoder.conv1.weight",
    "wan/wanxiang1_3b/models_t5_umt5-xxl-enc-bf16.pth": "blocks.0.ffn.fc2.weight",
    "ar_model/checkpoint/llm/model.safetensors": "model.layers.1.mlp.up_proj.weight",
    "ar_model/checkpoint/vision_tower/model.safetensors": "vision_model.encoder.layers.1.mlp.fc1.weight",
    "ar_model/checkpoint/mm_projector/model.safetensors": "layers.4.weight",
}


@pytest.mark.parametrize("name", ["transformer/model.pt", *slow(*list(PLACES)[1:])])
def test_every_key_must_be_used_and_fit(original, tmp_path, name):
    key = PLACES[name]

    change(original, name, lambda content: content.update({key: content[key][:-1].clone()}))
    refused(original, tmp_path / "out", "1 of another shape", name)
    shutil.copy(ORIGINAL / name, original / name)

    prefix = "wan_model." if name == "transformer/model.pt" else ""
    change(original, name, lambda content: content.update({f"{prefix}surprise.weight": torch.zeros(2)}))
    refused(original, tmp_path / "out", "1 left over", "surprise.weight")
    shutil.copy(ORIGINAL / name, original / name)

    if name != "transformer/model.pt":  # the file below it has the key, too
        change(original, name, lambda content: content.pop(key))
        refused(original, tmp_path / "out", "missing", name)


def test_strangers_in_the_trained_model(original, tmp_path):
    change(original, "transformer/model.pt", lambda content: content.update({"optimizer.step": torch.zeros(1)}))
    refused(original, tmp_path / "out", "optimizer.step")


@pytest.mark.slow
def test_values_that_are_not_finite(original, tmp_path):
    def poison(content):
        content[
            "wan_model.proj_out.weight" if "wan_model.proj_out.weight" in content else PLACES["transformer/model.pt"]
        ][0, 0] = float("nan")

    change(original, "transformer/model.pt", poison)
    with pytest.raises(ValueError, match="not finite"):
        convert(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "s2", True),
        ("config.json", "mm_use_im_start_end", True),
        ("config.json", "mm_use_im_patch_token", None),  # upstream's class default is True
        ("config.json", "mm_vision_select_feature", "patch"),
        ("config.json", "mm_vision_select_layer", None),
        ("mm_projector/config.json", "mm_projector_type", "linear"),
        ("vision_tower/config.json", "model_type", "clip_vision_model"),
    ],
)
def test_vila_settings_that_are_not_reproduced(original, tmp_path, file, key, value):
    path = original / "ar_model" / "checkpoint" / file
    config = json.loads(path.read_text())
    config[key] = value
    if value is None:
        del config[key]
    path.write_text(json.dumps(config))
    refused(original, tmp_path / "out", path, f"{key} is {config.get(key)!r}" if file != "config.json" else key)


def test_tokenizer_and_embedding_must_agree(original, tmp_path):
    change(
        original,
        "ar_model/checkpoint/llm/model.safetensors",
        lambda content: content.update(
            {"model.embed_tokens.weight": content["model.embed_tokens.weight"][:-1].clone()}
        ),
    )
    refused(original, tmp_path / "out", "160 tokens", "159 rows")


def test_an_existing_output_is_leftalone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert(ORIGINAL, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    (tmp_path / "out" / "mine.txt").unlink()
    convert(ORIGINAL, tmp_path / "out")
    with pytest.raises(ValueError, match=r"is no folder"):
        convert(tmp_path / "nothing", tmp_path / "other")


# --- interrupted runs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    convert(ORIGINAL, whole, max_shard_size="20KB")
    partial = resumed.with_name("resumed.incomplete")
    command = [
        sys.executable,
        "-m",
        "conversion",
        "--original",
        str(ORIGINAL),
        "--output",
        str(resumed),
        "--max-shard-size",
        "20KB",
    ]
    finished_before: set[str] = set()
    for wanted in (3, 25):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if len(list(partial.rglob("*.safetensors"))) >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
        assert not resumed.exists()
        state = json.loads((partial / "conversion.json").read_text())
        assert finished_before <= set(state["shards"])
        finished_before = set(state["shards"])
    times = {name: (partial / name).stat().st_mtime_ns for name in finished_before}
    convert(ORIGINAL, resumed, max_shard_size="20KB")
    assert {name: (resumed / name).stat().st_mtime_ns for name in times} == times  # not written again
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(resumed) for path in resumed.rglob("*") if path.is_file())
    assert all((whole / file).read_bytes() == (resumed / file).read_bytes() for file in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]


@pytest.mark.slow
def test_shards_of_other_sources_or_options_are_not_kept(original, tmp_path):
    output, partial = tmp_path / "out", tmp_path / "out.incomplete"
    change(
        original, "wan/wanxiang1_3b/models_t5_umt5-xxl-enc-bf16.pth", lambda c: c["norm.weight"].fill_(float("nan"))
    )
    with pytest.raises(ValueError, match="not finite"):
        convert(original, output)
    assert (partial / "mllm" / "model.safetensors").exists()
    shutil.copy(ORIGINAL / TORCH_FILES[4], original / TORCH_FILES[4])
    convert(original, output, dtype=torch.bfloat16)
    assert {dtype for dtype, _, _ in read_header(output / "mllm" / "model.safetensors").values()} == {"BF16"}


def test_two_runs_at_once_are_refused(tmp_path):
    with alone(tmp_path / "out"), pytest.raises(ValueError, match="another conversion"):
        convert(ORIGINAL, tmp_path / "out")
    convert(ORIGINAL, tmp_path / "out")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_prints_a_table(tmp_path):
    result = CliRunner().invoke(app, ["--original", str(ORIGINAL), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for word in ("mllm", "vision_head", "adapter", "transformer", "vae", "text_encoder", "float32", "659,535"):
        assert word in result.stdout
    said = " ".join(result.stderr.split())
    assert "unused by upstream, left out: mllm.model.vision_tower.encoder.layers.2.* (16)" in said
    assert "327 weights of other files gave way" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--original", "nothing"], "is no folder"),
        (["--original", str(ORIGINAL), "--dtype", "int4"], "must be one of"),
        (["--original", str(ORIGINAL), "--max-shard-size", "big"], "Got 'big'"),
    ],
)
def test_command_errors_are_one_line(tmp_path, arguments, message):
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
