import hashlib
import multiprocessing
from dataclasses import asdict, replace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from omni_video_hf.shapes.dataset import SPLITS, ShapesDataset
from omni_video_hf.shapes.prompts import MOTION_WORDS, SHAPE_WORDS, SIZE_WORDS, describe, generation_prompt
from omni_video_hf.shapes.scene import ATTRIBUTES, HELD_OUT, Scene

KINDS = {"t2i": "image", "t2v": "video", "i2i": "image", "v2v": "video"}
ALL = [*KINDS.items(), ("understand", "image"), ("understand", "video")]
DIGEST = "2521e45f14d8a90e95d263a76510fca70cc5078c8a4484b1c1906f14e62d4474"


def examples(task, kind, split="train", count=1500, seed=0):
    dataset = ShapesDataset(task, split, count, seed, kind)
    return [dataset.example(index) for index in range(count)]


def digest(seed):
    """Of the words and the pixels of some examples of every kind."""
    found = hashlib.sha256()
    for task, kind in ALL:
        for split in SPLITS:
            dataset = ShapesDataset(task, split, 4, seed, kind)
            for item in dataset:
                for name in sorted(item):
                    value = item[name]
                    found.update(value.encode() if isinstance(value, str) else value.tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_examples_are_the_same_everywhere():
    """Stored: another version of numpy, another machine or another process must draw the same."""
    assert digest(7) == DIGEST
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(digest, (7,)) == DIGEST
    assert digest(8) != DIGEST


def test_an_example_does_not_depend_on_the_others():
    short, long = (ShapesDataset("v2v", "train", length) for length in (3, 100))
    assert long.example(2) == short.example(2) == short.example(-1)
    with pytest.raises(IndexError):
        short.example(3)
    assert len(list(short)) == len(short) == 3


@pytest.mark.parametrize(("task", "kind"), ALL)
def test_splits_share_no_stream(task, kind):
    train, seen = ({str(asdict(example)) for example in examples(task, kind, split)} for split in ("train", "seen"))
    assert len(train) == len(seen) == 1500
    assert not train & seen


@pytest.mark.parametrize(("task", "kind"), ALL)
@pytest.mark.parametrize("split", ["train", "seen"])
def test_held_out_pairs_are_neither_shown_nor_named(task, kind, split):
    for example in examples(task, kind, split):
        for scene in (example.source, example.target):
            assert scene is None or not scene.is_held_out
        words = f"{example.prompt} {example.answer}".lower()
        for color, shape in HELD_OUT:
            assert not any(f"{color} {word}" in words for word in SHAPE_WORDS[shape])


@pytest.mark.parametrize(("task", "kind"), ALL)
def test_composition_is_exactly_the_held_out_pairs(task, kind):
    found = examples(task, kind, "composition")
    assert all((example.target or example.source).is_held_out for example in found)
    assert {(scene.color, scene.shape) for scene in (e.target or e.source for e in found)} == HELD_OUT
    if task in ("i2i", "v2v"):
        for example in found:
            assert example.source.is_held_out == (example.attribute not in ("color", "shape"))


@pytest.mark.parametrize(("task", "kind"), ALL)
def test_everything_occurs_about_equally_often(task, kind):
    scenes = [example.target or example.source for example in examples(task, kind)]
    for attribute in ATTRIBUTES if kind == "video" else list(ATTRIBUTES)[:-1]:
        values, counts = np.unique([getattr(scene, attribute) for scene in scenes], return_counts=True)
        assert set(values) == set(ATTRIBUTES[attribute])
        assert counts.min() > 0.5 * counts.max()
    assert len({(scene.color, scene.shape) for scene in scenes}) == 15


@pytest.mark.parametrize("task", ["i2i", "v2v"])
@pytest.mark.parametrize("split", SPLITS)
def test_an_edit_changes_what_it_names_and_nothing_else(task, split):
    seen = set()
    for example in examples(task, None, split):
        old, new = (getattr(scene, example.attribute) for scene in (example.source, example.target))
        assert old != new
        assert example.target == replace(example.source, **{example.attribute: new})
        words = {"size": SIZE_WORDS, "shape": SHAPE_WORDS}.get(example.attribute, {}).get(new, (new,))
        if new != "still":
            assert any(word in example.prompt for word in words)
        seen.add((example.attribute, new))
    names = [name for name in ATTRIBUTES if task == "v2v" or name != "motion"]
    assert {name for name, _ in seen} == set(names)
    if split != "composition":
        assert seen == {(name, value) for name in names for value in ATTRIBUTES[name]}


def test_prompts_name_every_attribute_and_motion_only_in_videos():
    for kind, task in (("image", "t2i"), ("video", "t2v")):
        for example in examples(task, kind):
            prompt, scene = example.prompt.lower(), example.target
            assert scene.color in prompt
            assert scene.background in prompt
            assert any(word in prompt for word in SIZE_WORDS[scene.size])
            assert any(word in prompt for word in SHAPE_WORDS[scene.shape])
            moving = {motion for motion, words in MOTION_WORDS.items() if any(word in prompt for word in words)}
            assert moving == ({scene.motion} if kind == "video" else set())


def test_there_are_many_ways_to_say_it():
    scene, rng = Scene("green", "square", "small", "grey", "left"), np.random.default_rng(0)
    assert len({generation_prompt(rng, scene, "video") for _ in range(5000)}) > 2500
    assert len({generation_prompt(rng, scene, "image") for _ in range(5000)}) > 500
    for attribute in ATTRIBUTES:
        said = {e.prompt for e in examples("v2v", None) if e.attribute == attribute}
        assert len(said) > 30
    assert len({e.prompt for e in examples("understand", "video")}) > 50


def test_answers_are_exact():
    for kind in ("image", "video"):
        for example in examples("understand", kind):
            if example.attribute == "describe":
                assert example.answer == describe(example.source, kind)
            else:
                assert example.answer == getattr(example.source, example.attribute)
    scene = Scene("red", "circle", "large", "black", "left")
    assert describe(scene, "video") == "a large red circle moving left on a black background"
    assert describe(scene, "image") == "a large red circle on a black background"


@pytest.mark.parametrize(("task", "kind"), ALL)
def test_items_collate(task, kind):
    batch = next(iter(DataLoader(ShapesDataset(task, "train", 3, kind=kind), batch_size=3)))
    pictures = {"t2i": ["target"], "t2v": ["target"], "understand": ["source"]}.get(task, ["source", "target"])
    assert set(batch) == {"prompt", *pictures} | ({"answer"} if task == "understand" else set())
    for name in pictures:
        assert batch[name].shape == (3, 17 if kind == "video" else 1, 64, 64, 3)
        assert batch[name].float().std() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t2a", "train", 1), "`task` must be one of t2i.*'t2a'"),
        (("t2v", "test", 1), "`split` must be one of train.*'test'"),
        (("t2v", "train", -1), "`length` must not be negative, got -1"),
        (("t2v", "train", 1, -2), "`seed` must not be negative, got -2"),
        (("t2v", "train", 1, 0, "image"), "`kind` must be 'video' for task 't2v', got 'image'"),
        (("understand", "train", 1), "`kind` must be 'image' or 'video'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShapesDataset(*arguments)
