"""What a run writes: untrained parts as they are stored, trained ones as precise as they were trained."""

import json

import pytest
import tiny
import torch
import training
from safetensors.torch import load_file
from training_runs import command, write_samples

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline
from omni_video_hf.hub.repository import finalize_repository
from omni_video_hf.training.checkpointing.result import lora_deltas, tied_names, write_pipeline
from omni_video_hf.training.lora import add_lora

COMPONENTS = ("mllm", "adapter", "transformer", "vae", "text_encoder")


def stored(folder, component):
    """All tensors of a component's files."""
    return {
        name: value for file in (folder / component).glob("*.safetensors") for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A repository of several formats, its MLLM in several files."""
    folder = tmp_path_factory.mktemp("result") / "base"
    pipe = tiny.pipeline()
    pipe.mllm.to(torch.float16)
    pipe.transformer.to(torch.bfloat16)
    pipe.text_encoder.to(torch.float16)
    pipe.vae.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    (folder / "mllm" / "model.safetensors").unlink()
    pipe.mllm.save_pretrained(folder / "mllm", max_shard_size="100kB")
    finalize_repository(folder)
    assert len(list((folder / "mllm").glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    samples = [training.sample(task, number) for task in ("t2v", "v2v") for number in range(3)]
    return write_samples(tmp_path_factory.mktemp("samples"), samples)


def assert_changed_only(base, result, names, dtype):
    """`names` are stored in `dtype`, everything else bit for bit as in `base`."""
    for component in COMPONENTS:
        before, after = stored(base, component), stored(result, component)
        assert set(before) == set(after), component
        for name, value in before.items():
            full = {"adapter": "adapter.", "transformer": "decoder."}.get(component, "") + name
            if component in ("mllm", "adapter", "transformer") and full in names:
                assert after[name].dtype == dtype, full
                assert not torch.equal(after[name].float(), value.float()), full
            else:
                assert after[name].dtype == value.dtype, full
                assert torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)), full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_was_trained_changes_and_keeps_its_precision(base, tmp_path, dtype):
    model = OmniVideoForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    wanted = ("vision_head.", "mllm.lm_head.", "decoder.blocks.0.")
    weights = {n: p + 1e-6 * torch.randn(p.shape) + 1e-2 for n, p in model.named_parameters() if n.startswith(wanted)}
    write_pipeline(base, tmp_path / "result", weights, dtype)
    assert_changed_only(base, tmp_path / "result", set(weights), dtype)
    files = stored(tmp_path / "result", "mllm")
    assert torch.equal(files["mllm.lm_head.weight"], weights["mllm.lm_head.weight"].to(dtype))
    index = json.loads((tmp_path / "result" / "mllm" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in files.values())
    again = OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "result", dtype=torch.float32)
    assert all(torch.equal(dict(again.named_parameters())[n], w.to(dtype).float()) for n, w in weights.items())
    assert OmniVideoPipeline.from_pretrained(tmp_path / "result").mllm.dtype == torch.float16


def test_a_weight_that_the_base_lacks_is_refused_and_nothing_is_written(base, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no weight 'decoder\.none' of shape \(2,\), so it is not the base model of the run"
    ):
        write_pipeline(base, tmp_path / "result", {"decoder.none": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"no weight 'decoder\.proj_out\.bias' of shape \(2,\)"):
        write_pipeline(base, tmp_path / "result", {}, deltas={"decoder.proj_out.bias": torch.zeros(2)})
    assert not (tmp_path / "result").exists()


def test_tied_weights_are_found_under_the_name_they_are_stored_by(base, tmp_path):
    model = OmniVideoForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    model.mllm.lm_head.weight = model.get_input_embeddings().weight
    (first,) = tied_names(model)
    assert set(tied_names(model)[first]) == {"mllm.lm_head.weight", "mllm.model.language_model.embed_tokens.weight"}
    value = torch.full_like(dict(model.named_parameters())[first], 0.1)
    write_pipeline(base, tmp_path / "result", {first: value}, aliases=tied_names(model))
    assert_changed_only(base, tmp_path / "result", set(tied_names(model)[first]), torch.float32)


def test_merged_matrices_are_added_to_what_is_stored(base, tmp_path):
    model = OmniVideoForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    add_lora(model, {"r": 2, "parts": ["decoder"], "init_lora_weights": False})
    deltas = lora_deltas(model)
    write_pipeline(base, tmp_path / "result", {}, deltas=deltas)
    assert_changed_only(base, tmp_path / "result", set(deltas), torch.float32)
    name = "blocks.0.attn1.to_q.weight"
    merged = stored(base, "transformer")[name].float() + deltas[f"decoder.{name}"]
    assert torch.equal(stored(tmp_path / "result", "transformer")[name], merged)


def test_a_run_leaves_the_formats_of_its_base(base, data, tmp_path):
    result = command(base, data, tmp_path, "decoder", "--learning_rate", "1e-2", "--result_dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    trained = set(load_file(tmp_path / "checkpoint-4" / "trained.safetensors"))
    assert_changed_only(base, tmp_path / "pipeline", trained, torch.bfloat16)


# --- previews -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_outcome_does_not_depend_on_previews(base, data, tmp_path):
    lora = ["--learning_rate", "1e-2", "--lora", "{r: 2, lora_dropout: 0.2}"]
    previews = ["--previews", "[{prompt: a fox, task: t2i}]"]
    plain = command(base, data, tmp_path / "plain", "lora", *lora)
    assert plain.exit_code == 0, plain.output
    drawn = command(base, data, tmp_path / "drawn", "lora", *lora, *previews, "--preview_steps", "1")
    assert drawn.exit_code == 0, drawn.output
    assert len(list((tmp_path / "drawn" / "previews").glob("*.png"))) == 4
    for file in ("checkpoint-4/trained.safetensors", "lora/pytorch_lora_weights.safetensors"):
        before, after = (load_file(tmp_path / folder / file) for folder in ("plain", "drawn"))
        assert set(before) == set(after)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    for component in COMPONENTS:
        before, after = (stored(tmp_path / folder / "pipeline", component) for folder in ("plain", "drawn"))
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    longer = ["--resume", "--max_steps", "5"]
    again = command(base, data, tmp_path / "plain", "lora", *lora, *previews, "--preview_steps", "5", *longer)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "plain" / "previews" / "step-000005.png").is_file()


def test_previews_leave_chance_as_it_was(tmp_path):
    run = training.trainer(
        tmp_path,
        [training.sample("t2v")],
        tiny.model(),
        preview_pipeline=tiny.pipeline(),
        preview_steps=1,
        previews=[{"prompt": "a fox", "task": "t2i"}],
    )
    run.state.global_step = 1
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run.draw_previews()
    assert torch.equal(torch.rand(3), expected)
