import io
import json
import logging
import shutil
import tarfile

import numpy as np
import pytest
import tiny
from datasets import Dataset
from golden import DATA
from raw_data import datasets_cache, make_clip, make_image, write_jsonl  # noqa: F401 - a fixture
from rich.console import Console

from omni_video_hf.media.video_loading import load_video
from omni_video_hf.training.data.bad_data import SHOWN, BadDataError, Offender, offenders_table, stop_or_count
from omni_video_hf.training.data.framing import FramingRules, centre_crop
from omni_video_hf.training.data.media_table import MediaTable, check_row, load_media_table, probe

CLIP = DATA / "bigbuckbunny.mp4"
PRESET = {"width": 64, "height": 32, "num_frames": 5, "fps": 8}


def problems(table):
    return {offender.sample: offender.problem for row in table for offender in check_row(row, tiny.processor())}


# --- formats --------------------------------------------------------------------------------------------------------


def test_jsonl_names_files_beside_it(tmp_path):
    make_clip(tmp_path / "clips" / "a.mp4")
    make_image(tmp_path / "a.png")
    table = load_media_table(
        write_jsonl(
            tmp_path / "data.jsonl",
            {"task": "t2v", "prompt": "a fox", "media": "clips/a.mp4"},
            {"task": "i2v", "prompt": "move", "media": "clips/a.mp4", "source": "a.png"},
            {"task": "understand", "question": "what?", "answer": "red", "media": "a.png"},
            {"task": "understand", "question": "why?", "answer": "so", "media": None},
        )
    )
    assert problems(table) == {}
    assert table.ids == ["t2v:clips/a.mp4", "i2v:clips/a.mp4", "understand:a.png", "understand:-"]
    assert [row.text for row in table] == ["a fox", "move", "what?", "why?"]
    assert table[1].source.path == tmp_path / "a.png"
    assert table[2].answer == "red"


def test_videofolder_with_and_without_metadata(tmp_path):
    folder = tmp_path / "folder"
    for name in ("a", "b", "b_source"):
        make_clip(folder / f"{name}.mp4", seed=len(name))
    write_jsonl(
        folder / "metadata.jsonl",
        {"file_name": "a.mp4", "source_file_name": None, "task": "t2v", "prompt": "a fox"},
        {"file_name": "b.mp4", "source_file_name": "b_source.mp4", "task": "v2v", "prompt": "more red"},
    )
    table = load_media_table(folder)
    assert problems(table) == {}
    assert table[1].source.path == folder / "b_source.mp4"
    assert [row.media.path.name for row in table] == ["a.mp4", "b.mp4"]
    assert table.ids == ["t2v:a.mp4", "v2v:b.mp4"]


def test_imagefolder(tmp_path):
    folder = tmp_path / "folder"
    make_image(folder / "a.png")
    make_image(folder / "b.jpg")
    rows = ({"file_name": name, "caption": name} for name in ("a.png", "b.jpg"))
    write_jsonl(folder / "metadata.jsonl", *rows)
    table = load_media_table(folder, task="t2i", columns={"prompt": "caption"})
    assert problems(table) == {}
    assert [row.text for row in table] == ["a.png", "b.jpg"]
    assert {row.task for row in table} == {"t2i"}


def test_webdataset_bytes_are_read(tmp_path):
    clip = make_clip(tmp_path / "a.mp4")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for name in ("one", "two"):
            fields = {"task": "t2v", "prompt": name}
            for suffix, content in (("mp4", clip.read_bytes()), ("json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    table = load_media_table(tmp_path / "data.tar")
    assert problems(table) == {}
    assert table.ids == ["one", "two"]
    assert [row.text for row in table] == ["one", "two"]
    info = probe(table[0].media)
    assert (info.kind, info.width, info.height, info.video.num_frames) == ("video", 64, 48, 9)
    assert FramingRules().frame(info, PRESET).load(table[0].media).frames.shape == (5, 32, 64, 3)
    assert table[0].media.sha256() == load_media_table(write_jsonl(
        tmp_path / "same.jsonl", {"task": "t2v", "prompt": "one", "media": "a.mp4"}
    ))[0].media.sha256()  # fmt: skip


def test_parquet(tmp_path):
    make_clip(tmp_path / "a.mp4")
    rows = {"id": ["x", "y"], "task": ["t2v"] * 2, "prompt": ["one", "two"], "media": ["a.mp4"] * 2}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    table = load_media_table(tmp_path / "data.parquet")
    assert problems(table) == {}
    assert table.ids == ["x", "y"]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"prompt": "x"}], {}, "have no column `task`"),
        ([{"task": "t2v"}], {"columns": {"promt": "x"}}, r"unknown 'promt' \(did you mean 'prompt'\?\)"),
        ([{"task": "t2v"}], {"columns": {"prompt": "caption"}}, "`columns`: unknown 'caption'"),
        ([{"task": "t2v", "id": 1}, {"task": "t2v", "id": 1}], {}, "must be unique, but these occur twice: 1"),
        ([{"task": "t2v"}], {"data_format": "jsonl"}, r"unknown 'jsonl'"),
    ],
)
def test_tables_that_make_no_sense_are_refused(tmp_path, rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_media_table(write_jsonl(tmp_path / "data.jsonl", *rows), **arguments)


def test_sources_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_media_table(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"contains no videos, images or \.tar"):
        load_media_table(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"the suffix must be one of \.jsonl"):
        load_media_table(tmp_path / "x.txt")
    (tmp_path / "broken.jsonl").write_text('{"task": "t2v"\n')
    with pytest.raises(ValueError, match=r"broken.jsonl: cannot be read as json"):
        load_media_table(tmp_path / "broken.jsonl")
    make_clip(tmp_path / "both" / "a.mp4")
    make_image(tmp_path / "both" / "a.png")
    with pytest.raises(ValueError, match="contains both videos and images"):
        load_media_table(tmp_path / "both")


# --- offenders ------------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_found_at_once(tmp_path):
    good, image = make_clip(tmp_path / "good.mp4"), make_image(tmp_path / "a.png")
    (tmp_path / "cut.mp4").write_bytes(CLIP.read_bytes()[:200_000])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    cases = {
        "missing": ({"media": "nowhere.mp4"}, "nowhere.mp4: no such file"),
        "cut": ({"media": "cut.mp4"}, "cut.mp4"),
        "empty": ({"media": "empty.mp4"}, "the file is empty"),
        "noise": ({"media": "noise.mp4"}, "is not a video of a known format"),
        "no media": ({"media": None}, "`media` is empty; the task 't2v' needs the target video"),
        "image for video": ({"media": "a.png"}, "is an image; the task 't2v' needs a video"),
        "video for image": ({"task": "t2i"}, "is a video; the task 't2i' needs an image"),
        "no prompt": ({"prompt": "  "}, "`prompt` is empty"),
        "control token": ({"prompt": "a <image>"}, "contains '<image>', which is a control token"),
        "unknown task": ({"task": "t2w"}, "unknown task 't2w'; known: t2i, t2v"),
        "no task": ({"task": None}, "unknown task None"),
        "no source": ({"task": "v2v"}, "`source` is empty; the task 'v2v' needs a video"),
        "wrong source": ({"task": "v2v", "source": "a.png"}, "`source` a.png: is an image; the task 'v2v' needs a"),
        "bad source": ({"task": "v2v", "source": "noise.mp4"}, "`source`"),
        "spare source": ({"source": "a.png"}, "`source` has a value, but the task 't2v' does not use it"),
        "no answer": ({"task": "understand", "prompt": None, "question": "what?"}, "`answer` is empty"),
        "no question": ({"task": "understand", "prompt": None, "answer": "a"}, "`question` is empty"),
    }
    columns = {"task": "t2v", "prompt": "a fox", "media": "good.mp4", "source": None, "question": None, "answer": None}
    rows = [{"id": "good", **columns}, *({"id": name, **columns, **change} for name, (change, _) in cases.items())]
    assert good.is_file()
    assert image.is_file()
    found = problems(load_media_table(write_jsonl(tmp_path / "data.jsonl", *rows)))
    assert set(found) == set(cases)
    for name, (_, problem) in cases.items():
        assert problem in found[name], (name, found[name])


def test_the_list_is_capped_with_a_count():
    offenders = [Offender(f"sample {number}", "is bad") for number in range(SHOWN + 7)]
    with pytest.raises(BadDataError) as caught:
        stop_or_count(offenders, 100, "stop")
    assert len(caught.value.offenders) == SHOWN + 7
    text = str(caught.value)
    assert text.startswith(f"{SHOWN + 7} problems in 100 samples.")
    assert f"sample {SHOWN - 1}: is bad" in text
    assert f"sample {SHOWN}:" not in text
    assert text.endswith("and 7 more")
    assert offenders_table(offenders, 100).row_count == SHOWN + 1
    console = Console(file=io.StringIO(), width=80)
    console.print(offenders_table([Offender("[bold].mp4", "[red] is bad")], 1))
    assert "[bold].mp4" in console.file.getvalue()
    assert "[red] is bad" in console.file.getvalue()
    with pytest.raises(ValueError, match=r"unknown 'skp' \(did you mean 'skip'\?\)"):
        stop_or_count([], 1, "skp")


def test_what_is_skipped_is_counted(caplog):
    offenders = [Offender("a", "is bad"), Offender("a", "is worse"), Offender("b", "is bad")]
    caplog.set_level(logging.WARNING, "omni_video_hf")  # the command line turns it up for the whole process
    assert stop_or_count(offenders, 5, "skip") == {"a", "b"}
    assert "Left out 2 of 5 samples" in caplog.text
    with pytest.raises(BadDataError):
        stop_or_count(offenders, 2, "skip")


# --- framing --------------------------------------------------------------------------------------------------------


def media(path):
    return MediaTable(Dataset.from_list([{"task": "t2v", "media": str(path)}]))[0].media


def test_buckets_of_size_and_frames(tmp_path):
    rules = FramingRules([(64, 32), (32, 32), (32, 64)], [1, 5, 9], "source")

    def frame(size, frames, fps=8):
        path = tmp_path / f"{size[0]}x{size[1]}x{frames}.mp4"
        return rules.frame(probe(media(make_clip(path, frames, size, fps))), PRESET)

    wide = frame((128, 72), 12)
    assert (wide.width, wide.height, wide.num_frames, wide.fps) == (64, 32, 9, 8)
    assert wide.crop == (0, 4, 128, 68)
    assert (frame((70, 64), 5).width, frame((70, 64), 5).height) == (32, 32)
    assert (frame((48, 90), 4).height, frame((48, 90), 4).num_frames) == (64, 1)


def test_frames_are_resampled_from_the_start(tmp_path):
    path = make_clip(tmp_path / "a.mp4", frames=25, size=(64, 48), fps=24)
    framing = FramingRules([(64, 32)], [5], 8).frame(probe(media(path)), PRESET)
    clip = framing.load(media(path))
    assert clip.frames.shape == (5, 32, 64, 3)
    assert np.array_equal(clip.frames, load_video(path).frames[0:13:3, 8:40])


def test_of_two_sizes_of_one_shape_the_larger_is_taken(tmp_path):
    path = make_image(tmp_path / "a.png", (100, 100))
    framing = FramingRules([(32, 32), (64, 64), (64, 32)]).frame(probe(media(path)), PRESET)
    assert (framing.width, framing.height, framing.num_frames, framing.fps) == (64, 64, 1, None)


def test_presets_stand_in_for_what_is_left_open():
    framing = FramingRules().frame(probe(media(CLIP)), PRESET)
    assert (framing.width, framing.height, framing.num_frames, framing.fps) == (64, 32, 5, 8.0)
    assert framing.crop == (0, 40, 1280, 680)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (FramingRules(frames=[81], fps=8), "has 42 frames at 8 per second, fewer than 81"),
        (FramingRules(fps=30), "has 25 frames per second; at 30, frames would be repeated"),
    ],
)
def test_a_video_that_does_not_fill_its_bucket_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        rules.frame(probe(media(CLIP)), PRESET)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (FramingRules([(60, 32)]), "`sizes` must be multiples of 32 pixels, got 60x32"),
        (FramingRules(frames=[6]), r"must be 4n\+1, got 6"),
        (FramingRules(fps=0), "`fps` must be positive or 'source', got 0"),
    ],
)
def test_rules_off_the_grid_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        rules.check(tiny.pipeline().grid)


def test_crops_are_centred_and_whole():
    assert centre_crop(100, 50, 1.0) == (25, 0, 75, 50)
    assert centre_crop(50, 100, 1.0) == (0, 25, 50, 75)
    assert centre_crop(101, 51, 101 / 51) == (0, 0, 101, 51)


def test_a_name_stays_when_the_data_move(tmp_path):
    first = tmp_path / "first"
    make_clip(first / "clips" / "a.mp4")
    write_jsonl(first / "data.jsonl", *[{"task": "t2v", "prompt": str(n), "media": "clips/a.mp4"} for n in range(2)])
    ids = load_media_table(first / "data.jsonl").ids
    assert ids == ["t2v:clips/a.mp4", "t2v:clips/a.mp4#2"]
    shutil.move(first, tmp_path / "second")
    assert load_media_table(tmp_path / "second" / "data.jsonl").ids == ids


# --- CSV, captions beside media, what is elsewhere ------------------------------------------------------------------


def test_csv_cells_are_texts_and_empty_ones_none(tmp_path):
    make_clip(tmp_path / "a.mp4")
    text = 'task,prompt,media,question,answer\nt2v,007,a.mp4,,\nunderstand,,a.mp4,"what, then?",NA\n'
    (tmp_path / "data.csv").write_text(text, encoding="utf-8-sig")
    table = load_media_table(tmp_path / "data.csv")
    assert problems(table) == {}
    assert [row.text for row in table] == ["007", "what, then?"]
    assert table[1].answer == "NA"
    for wrong, message in (
        ("", "the file is empty"),
        ("task,task\nt2v,t2v\n", "the column name 'task' is empty or occurs twice"),
        ("task,prompt\nt2v,a, b\n", "line 2 has 3 cells instead of 2: put texts with commas in double quotes"),
        ("task,prompt\n", "contains no rows below its column names"),
    ):
        (tmp_path / "data.csv").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            load_media_table(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_bytes("task,prompt\nt2v,f\xfcr\n".encode("latin-1"))
    with pytest.raises(ValueError, match="cannot be read as CSV in UTF-8"):
        load_media_table(tmp_path / "data.csv")


def test_captions_lie_beside_their_media(tmp_path):
    for name in ("1", "more/2", "3"):
        make_clip(tmp_path / "in" / f"{name}.mp4")
    (tmp_path / "in" / "1.txt").write_text("a fox\n")
    (tmp_path / "in" / "more" / "2.txt").write_text("a hare")
    table = load_media_table(tmp_path / "in", task="t2v")
    assert {row.id: row.text for row in table} == {"t2v:1.mp4": "a fox", "t2v:more/2.mp4": "a hare", "t2v:3.mp4": None}
    assert problems(table) == {"t2v:3.mp4": "`prompt` is empty (None)"}
    with pytest.raises(ValueError, match="The data have no column `task`"):
        load_media_table(tmp_path / "in")
    (tmp_path / "in" / "4.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"1 captions have no image or video of the same name \(4\.txt\)"):
        load_media_table(tmp_path / "in", task="t2v")
    (tmp_path / "in" / "4.txt").unlink()
    make_image(tmp_path / "in" / "1.png")
    with pytest.raises(ValueError, match=r"these captions have several images or videos of the same name: 1\.txt"):
        load_media_table(tmp_path / "in", task="t2v")


def test_a_data_set_of_the_hub_is_read_from_its_folder(tmp_path):
    make_image(tmp_path / "a.png")
    data = tmp_path / "downloaded" / "data"
    data.mkdir(parents=True)
    row = {"task": "t2i", "prompt": "red", "media": {"path": None, "bytes": (tmp_path / "a.png").read_bytes()}}
    Dataset.from_list([row]).to_parquet(data / "train-00000-of-00001.parquet")
    assert problems(load_media_table(tmp_path / "downloaded")) == {}
    Dataset.from_list([row]).to_parquet(data / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"contains files of several splits \(test, train\): pass one file"):
        load_media_table(tmp_path / "downloaded")
    for name in ("lab/foxes", "hf://datasets/lab/foxes", "datasets/lab/foxes"):
        with pytest.raises(ValueError, match=r"no such file or folder\. .*`hf download lab/foxes --repo-type dataset"):
            load_media_table(name)
    with pytest.raises(ValueError, match="is a URL: download it"):
        load_media_table("https://host/data.jsonl")
    with pytest.raises(ValueError, match=r"data\.jsonl: no such file or folder\.$"):
        load_media_table(tmp_path / "data.jsonl")


def test_urls_in_a_table_are_named_with_what_to_do(tmp_path):
    rows = [{"task": "t2i", "prompt": "a", "media": "https://host/a.png"}]
    rows += [{"task": "i2v", "prompt": "b", "media": "s3://c/b.mp4", "source": "http://host/b.png"}]
    found = problems(load_media_table(write_jsonl(tmp_path / "data.jsonl", *rows)))
    advice = "is a URL; download the file and write its path there"
    assert list(found.values()) == [f"`media` https://host/a.png: {advice}", f"`media` s3://c/b.mp4: {advice}"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("task", ["t2v"]),
        ("prompt", {"en": "a fox"}),
        ("prompt", ["a fox"]),
        ("media", ["a.mp4"]),
        ("media", {"file": "a.mp4"}),
        ("id", {"n": 1}),
    ],
)
def test_a_column_of_lists_or_structures_is_refused(column, value):
    rows = Dataset.from_list([{"id": "a", "task": "t2v", "prompt": "a fox", "media": "a.mp4"} | {column: value}])
    with pytest.raises(ValueError, match=rf"The column `{column}` \({column}\) must hold"):
        MediaTable(rows)
