import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from golden import CORE
from safetensors.torch import load_file, save_file

from conversion.original_checkpoint import (
    ADAPTER,
    TRAINED,
    VISION_HEAD,
    OriginalCheckpoint,
    read_json,
    read_tokenizer,
    read_weights,
)

ORIGINAL = CORE / "omni_ckpts"
LLM = "ar_model/checkpoint/llm"


@pytest.fixture
def original(tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(ORIGINAL, tmp_path / "omni_ckpts"))


# --- parts ----------------------------------------------------------------------------------------------------------


def test_every_part_has_a_place_for_every_weight():
    checkpoint = OriginalCheckpoint(ORIGINAL)
    for load in (checkpoint.mllm, checkpoint.adapter, checkpoint.transformer, checkpoint.vae, checkpoint.text_encoder):
        part = load()
        assert part.tensors
        assert part.unknown == []
        assert all((ORIGINAL / file).is_file() for file in part.files)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at the process's memory map")
def test_weights_stay_on_the_disk(original):
    checkpoint = OriginalCheckpoint(original)
    parts = checkpoint.mllm(), checkpoint.vae(), checkpoint.text_encoder()
    maps = Path("/proc/self/maps").read_text()
    # The vision head's own file is not among them: the trained model's weights win over all of it.
    files = {file for part in parts for file in part.files if not file.startswith("vision_head/")}
    assert all(str(original / file) in maps for file in files if not file.endswith(".pkl"))
    assert TRAINED in files


def test_the_file_of_higher_priority_wins_key_by_key(original):
    def head(value, *names):
        return {name: torch.full_like(content[name], value) for name in names}

    content = torch.load(original / VISION_HEAD[1], weights_only=True)
    lowest = original / VISION_HEAD[0]
    lowest.parent.mkdir()
    a, b, c = "fc.0.bias", "fc.2.bias", "decoder_query"
    torch.save(head(1.0, a, b, c), lowest)
    torch.save(content | head(2.0, b, c), original / VISION_HEAD[1])
    trained = torch.load(original / TRAINED, weights_only=True)["module"]
    trained = {name: tensor for name, tensor in trained.items() if not name.startswith("ar_vision_head.")}
    torch.save(trained | {f"ar_vision_head.{c}": torch.full_like(content[c], 3.0)}, original / TRAINED)
    del content[a]
    torch.save(content | head(2.0, b, c), original / VISION_HEAD[1])

    part = OriginalCheckpoint(original).mllm()
    net = "vision_head.query_transformer."
    values = [part.tensors[net + name].mean().item() for name in ("input_proj_1.bias", "input_proj_2.bias")]
    assert values == [1.0, 2.0]
    assert part.tensors[net + "query_tokens"].mean().item() == 3.0
    assert part.superseded == 3  # two by the second file, one by the trained model
    assert {*VISION_HEAD, TRAINED} <= part.files


def test_adapter_under_its_other_name(original):
    before = {name: tensor.clone() for name, tensor in OriginalCheckpoint(original).adapter().tensors.items()}
    trained = torch.load(original / TRAINED, weights_only=True)["module"]
    adapter = {name: tensor for name, tensor in trained.items() if name.startswith("adapter.")}
    torch.save({name: tensor for name, tensor in trained.items() if name not in adapter}, original / TRAINED)
    (original / ADAPTER[1]).unlink()
    torch.save({name.removeprefix("adapter."): t for name, t in adapter.items()}, original / ADAPTER[0])
    after = OriginalCheckpoint(original).adapter().tensors
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_weight_in_two_shards_is_refused(original):
    weights = load_file(original / LLM / "model.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, original / LLM / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"another file has, too: model\.norm\.weight"):
        OriginalCheckpoint(original).mllm()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("text", "str"),
        ([], "list"),
        ([torch.zeros(2, 3), torch.zeros(2, 3)], "list"),
        (torch.zeros(2, 5, 48), r"\[2, 5, 48\]"),
        (torch.zeros(48), r"\[48\]"),
        (torch.zeros(1, 5, 48, dtype=torch.int64), r"\[5, 48\]"),
    ],
)
def test_null_states_must_be_one_tensor(original, value, found):
    path = original / "unconditioned_context" / "context.pkl"
    path.write_bytes(pickle.dumps({"vlm_last_hidden_states": value, "text_emb": value}))
    for load in (OriginalCheckpoint(original).mllm, OriginalCheckpoint(original).adapter):
        with pytest.raises(ValueError, match=rf"context\.pkl.*got {found}"):
            load()
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="has no 'text_emb'"):
        OriginalCheckpoint(original).adapter()


@pytest.mark.parametrize("row", [torch.zeros(1, 5), torch.zeros(2, 32), torch.zeros(32), "x", None])
def test_markers_must_be_six_rows_of_one_width(original, row):
    path = original / "special_tokens" / "tokens.pkl"
    with path.open("rb") as file:
        markers = pickle.load(file)  # noqa: S301 - the project's own
    markers["<ipl_ed>"] = row
    if row is None:
        del markers["<ipl_ed>"]
    path.write_bytes(pickle.dumps(markers))
    with pytest.raises(ValueError, match=r"tokens\.pkl.*<ipl_ed>"):
        OriginalCheckpoint(original).adapter()


def test_files_of_weights_that_were_not_read(original):
    checkpoint = OriginalCheckpoint(original)
    used = {path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file()}
    for name in ("README.md", "assets/figure.png", ".cache/download/part.pt"):
        (original / name).parent.mkdir(parents=True, exist_ok=True)
        (original / name).write_text("x")
    assert checkpoint.unread_weights(used) == []
    (original / "adapter" / "ema.pt").write_text("x")
    assert checkpoint.unread_weights(used) == ["adapter/ema.pt"]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["model_state_dict", "module", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_and_prefixes(tmp_path, wrap, prefix):
    weights = {f"{prefix}a.weight": torch.ones(2), f"{prefix}b.bias": torch.zeros(1)}
    torch.save({wrap: weights, "epoch": 3, "step": 7} if wrap else weights, tmp_path / "x.pt")
    assert set(read_weights(tmp_path / "x.pt")) == {"a.weight", "b.bias"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds no weights"),
        ({}, "holds no weights"),
        ({"model_state_dict": {}, "epoch": 3}, "holds no weights"),
        ({"a": torch.zeros(1), "epoch": 3}, "no plain tensors: epoch"),
        ({1: torch.zeros(1)}, "no plain tensors: 1"),
        ({"a": torch.zeros(2, device="meta")}, "no plain tensors: a"),
        ({"a": torch.eye(2).to_sparse()}, "no plain tensors: a"),
        ({"a": torch.zeros(1), "module.a": torch.ones(1)}, "twice"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "[" * 100_000, '{"a": '])
def test_json_must_be_an_object(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"y\.json"):
        read_json(tmp_path / "y.json")


@pytest.mark.parametrize("damage", ["no settings", "no bos", "code", "no vocabulary", "cut"])
def test_tokenizers_that_are_refused(original, monkeypatch, damage):
    folder = original / LLM
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if damage == "no settings":
        (folder / "tokenizer_config.json").unlink()
    elif damage == "no vocabulary":
        (folder / "tokenizer.json").unlink()
    elif damage == "cut":
        os.truncate(folder / "tokenizer.json", 100)
    else:
        settings = settings | {"bos_token": None} if damage == "no bos" else settings
        settings |= {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}} if damage == "code" else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("raise SystemExit('the code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is told to go ahead
    with pytest.raises(ValueError, match=r"llm") as error:
        read_tokenizer(folder, "bos_token")
    assert "\n" not in str(error.value)
