"""What the benchmarks rest on: a synthetic checkpoint that converts, and results that are kept."""

import json

import pytest

from benchmarks.measure import Timing
from benchmarks.results import Results
from benchmarks.synthetic_checkpoint import Sizes, write_checkpoint
from conversion.convert_omni_video import convert
from omni_video_hf.hub.inspection import repository_parts

TINY = Sizes(
    llm_width=64, llm_ffn=64, llm_layers=1, llm_heads=2, llm_key_heads=1, vocabulary=170, tower_width=64, tower_ffn=64,
    tower_layers=3, tower_image=42, head_width=64, bridge_layers=1, text_width=64, text_ffn=64, text_layers=1,
    text_vocabulary=64, decoder_layers=1, queries=2, vae_width=8, null_length=3,
)  # fmt: skip
TABLES = {"one": ("One", {"what": lambda row: row["what"], "value": lambda row: f"{row['value']:.1f}"})}


def test_a_synthetic_checkpoint_takes_no_room_and_converts(tmp_path):
    written = write_checkpoint(tmp_path / "omni_ckpts", TINY)
    files = [file for file in (tmp_path / "omni_ckpts").rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix in (".pth", ".pt", ".bin", ".safetensors")]
    assert sum(file.stat().st_size for file in weights) >= written
    assert sum(512 * file.stat().st_blocks for file in weights) < written / 10
    convert(tmp_path / "omni_ckpts", tmp_path / "omni-video")
    parts = {part.name: part for part in repository_parts(tmp_path / "omni-video")}
    assert parts.keys() == {"mllm", "vision_head", "adapter", "transformer", "text_encoder", "vae"}
    assert set(parts["text_encoder"].dtypes) == {"bfloat16"}
    assert set(parts["vae"].dtypes) == {"float32"}


def test_results_are_kept_and_replaced(tmp_path):
    results = Results(tmp_path / "out")
    assert not results.has("one")
    results.add("one", [{"what": "a", "value": 1.0}], 0.1)
    results.write(TABLES)
    again = Results(tmp_path / "out")
    assert again.has("one")
    again.add("one", [{"what": "b", "value": 2.25}], 0.1)
    again.write(TABLES)
    text = (tmp_path / "out" / "benchmarks.md").read_text()
    assert "| b | 2.2 |" in text
    assert "| a |" not in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["benchmarks.json", "benchmarks.md"]

    entries = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    entries["one"]["machine"]["cores"] = -1
    (tmp_path / "out" / "benchmarks.json").write_text(json.dumps(entries))
    assert not Results(tmp_path / "out").has("one"), "another machine's"


def test_a_file_that_holds_no_results_is_refused(tmp_path):
    (tmp_path / "benchmarks.json").write_text('{"one": []}')
    with pytest.raises(ValueError, match=r"benchmarks\.json: holds no benchmarks' results"):
        Results(tmp_path)


def test_timings():
    timing = Timing.of([3.0, 1.0, 2.0], [1.0, 1.5, 5.0])
    assert timing.to_dict() == {"median": 2.0, "fastest": 1.0, "slowest": 3.0, "repetitions": 3, "processor": 1.5}
