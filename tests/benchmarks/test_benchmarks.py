"""Every benchmark at its smallest, what they rest on, and the numbers that do not depend on the machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from benchmarks import activations, data, folding, loading, media, operations, sampling, training
from benchmarks.__main__ import BENCHMARKS, main
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
PERFORMANCE = Path(__file__).parents[2] / "docs" / "performance.md"
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


@pytest.fixture
def smallest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The smallest settings of what is timed; what is counted takes no time that depends on its sizes."""
    case = sampling.Setting("t2i", 48, 48, 1, steps=2, repetitions=1)
    monkeypatch.setattr(sampling, "settings", lambda: (4, (case,)))
    monkeypatch.setattr(training, "REPETITIONS", 1)
    monkeypatch.setattr(training, "LATENTS", (16, 1, 6, 6))
    monkeypatch.setattr(loading, "REPETITIONS", 1)
    monkeypatch.setattr(folding, "CASES", {"small": (20, 8)})
    monkeypatch.setattr(folding, "REPETITIONS", 1)
    monkeypatch.setattr(data, "ROWS", 200)
    monkeypatch.setattr(data, "CHECKED", 1000)
    monkeypatch.setattr(loading, "SMALL", TINY)
    monkeypatch.setattr(media, "REPETITIONS", 1)
    monkeypatch.setattr(media, "WRITTEN", (64, 48, 5))
    monkeypatch.setattr(media, "LONG", (64, 48, 480))
    # What a command may set for its process.
    libraries, threads = (transformers, diffusers), torch.get_num_threads()
    levels = [library.logging.get_verbosity() for library in libraries]
    yield
    torch.set_num_threads(threads)
    for library, level in zip(libraries, levels, strict=True):
        library.logging.set_verbosity(level)
        library.logging.enable_progress_bar()


@pytest.mark.usefixtures("smallest")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_writes_its_table(name, tmp_path):
    main([name], tmp_path, threads=1)
    rows = json.loads((tmp_path / "benchmarks.json").read_text())[name]["rows"]
    assert rows
    text = (tmp_path / "benchmarks.md").read_text()
    module = BENCHMARKS[name]
    lines = [f"| {' | '.join(str(column(row)) for column in module.COLUMNS.values())} |" for row in rows]
    assert all(line in text for line in (f"| {' | '.join(module.COLUMNS)} |", *lines))
    if module is sampling:
        assert all(0 < row["difference"] < 1e-5 for row in rows)
    if module is folding:
        assert all(0 < row["error"] < 1e-5 for row in rows)
    if module is training:
        assert len({round(row["loss"], 5) for row in rows}) == 1
    if module in (operations, activations):  # counted: the same everywhere
        assert all(line in PERFORMANCE.read_text() for line in lines)
