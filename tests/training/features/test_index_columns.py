import pickle
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_video_hf.training.data.collator import TENSORS, bucket_of
from omni_video_hf.training.features.cache_files import SCHEMA, read_table
from omni_video_hf.training.features.index_columns import IndexColumns

SHAPES = (
    {"latents": [16, 1, 8, 8], "prompt_embeds": [5, 32], "mllm_hidden_states": [20, 48]},
    {"latents": [16, 1, 8, 8], "prompt_embeds": [9, 32], "mllm_hidden_states": [21, 48]},
    {"latents": [16, 1, 8, 4], "source_latents": [16, 1, 8, 4], "prompt_embeds": [5, 32], "input_ids": [7]},
    {"input_ids": [3], "labels": [3], "attention_mask": [3], "pixel_values": [2, 3, 42, 42]},
)
TASKS_OF = ("t2i", "t2i", "i2i", "understand")


def rows(count):
    return [
        {
            "key": f"row {number}",
            "shard": f"{number // 3:05d}-00",
            "number": number % 3,
            "task": TASKS_OF[number % 4],
            "instruction": None if number % 4 == 0 else ("states", "tokens")[number % 2],
            **{f"{name}_shape": shape for name, shape in SHAPES[number % 4].items()},
        }
        for number in range(count)
    ]


def write(path, entries, schema=SCHEMA):
    pq.write_table(pa.Table.from_pylist(entries, schema), path)
    return path


@pytest.mark.parametrize("count", [1, 10])
def test_columns_hold_what_the_rows_hold(tmp_path, monkeypatch, count):
    monkeypatch.setattr("omni_video_hf.training.features.index_columns.PIECE", 4)  # read in several pieces
    path = write(tmp_path / "index.parquet", rows(count))
    columns = IndexColumns.read(path)
    records = read_table(path)
    for kept in (columns, pickle.loads(pickle.dumps(columns))):  # noqa: S301 - our own
        assert len(kept) == count
        for number, record in enumerate(records):
            assert kept.key(number) == record["key"]
            assert kept.numbers[number] == record["number"]
            assert all(kept.word(name, number) == record[name] for name in ("shard", "task", "instruction"))
            shapes = {name: record[f"{name}_shape"] for name in TENSORS if record[f"{name}_shape"] is not None}
            assert kept.shapes_of(number) == shapes
            assert list(kept.shapes_of(number)) == list(shapes)
    assert columns.buckets() == [
        bucket_of(record["task"], columns.shapes_of(number)) for number, record in enumerate(records)
    ]


def test_some_entries_alone(tmp_path):
    columns = IndexColumns.read(write(tmp_path / "index.parquet", rows(12)))
    some = columns.with_tasks(["i2i", "understand"])
    assert [some.key(number) for number in range(len(some))] == [f"row {n}" for n in (2, 3, 6, 7, 10, 11)]
    assert sorted(some.values("task")) == ["i2i", "understand"]
    assert len({id(bucket) for bucket in some.buckets()}) == 2
    assert columns.widths("prompt_embeds", 1).tolist() == [32, 32, 32, 0] * 3
    assert len(columns.with_tasks([])) == 0


BAD = [
    ({"key": ""}, "`key` is ''"),
    ({"key": None}, "`key` is None"),
    ({"key": "row 0"}, "the `key` 'row 0' comes twice"),
    ({"task": "t2x"}, "unknown task 't2x'"),
    ({"task": None}, "unknown task None"),
    ({"shard": "../00000-00"}, "`shard` '../00000-00' must be"),
    ({"shard": None}, "`shard` None must be"),
    ({"number": -1}, "`number` is -1"),
    ({"number": None}, "`number` is None"),
    ({f"{name}_shape": None for name in SHAPES[1]}, "no tensor has a shape"),
    ({"latents_shape": [16, 0, 8, 8]}, "`latents_shape` is [16, 0, 8, 8]"),
    ({"latents_shape": [16, 1, 8]}, "`latents_shape` is [16, 1, 8]"),
    ({"latents_shape": [16, None, 8, 8]}, "`latents_shape` is [16, None, 8, 8]"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_row_that_is_not_valid_is_named(tmp_path, change, message):
    entries = rows(6)
    entries[5] |= change
    with pytest.raises(ValueError, match=re.escape(f"row 5: {message}")):
        IndexColumns.read(write(tmp_path / "index.parquet", entries))


def test_files_of_another_kind(tmp_path):
    fewer = SCHEMA.remove(SCHEMA.get_field_index("target_features_shape"))
    older = IndexColumns.read(write(tmp_path / "older.parquet", rows(4), fewer))  # of a version with fewer inputs
    assert older.shapes_of(3) == SHAPES[3]
    whole = write(tmp_path / "index.parquet", rows(4))
    cut = shutil.copy(whole, tmp_path / "cut.parquet")
    cut.write_bytes(whole.read_bytes()[:-40])
    for path in (cut, write(tmp_path / "other.parquet", [{"a": 1}], pa.schema({"a": pa.int32()}))):
        with pytest.raises(ValueError, match=str(path)):
            IndexColumns.read(path)
    assert len(IndexColumns.read(write(tmp_path / "empty.parquet", []))) == 0
