import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from omni_video_hf.shapes import Example, Scene, ShapesDataset, render
from omni_video_hf.shapes.scores import (
    LINES,
    Count,
    Report,
    Score,
    check_answer,
    check_edit,
    check_generation,
    check_routing,
    score_table,
    wilson_interval,
)

SOURCE = Scene("red", "circle", "large", "black", "left")
T2V = Example("t2v", "video", "a large red circle moving left on black", target=SOURCE)
V2V = Example("v2v", "video", "make it yellow", SOURCE, replace(SOURCE, color="yellow"), attribute="color")
QUESTION = Example("understand", "video", "what color is it?", source=SOURCE, answer="red", attribute="color")


def right(count, total, name="all"):
    return [{"all": index < count, name: index < count} for index in range(total)]


def test_wilson_intervals_are_the_published_ones():
    """Newcombe 1998, table I (method 3, without continuity correction)."""
    for (count, total), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        np.testing.assert_allclose(wilson_interval(count, total), (low, high), atol=5e-5)
        np.testing.assert_allclose(wilson_interval(total - count, total), (1 - high, 1 - low), atol=5e-5)
    for count, total in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"got {count} of {total}"):
            wilson_interval(count, total)


@pytest.mark.parametrize(("task", "kind"), [("t2v", "video"), ("t2i", "image"), ("v2v", "video"), ("i2i", "image")])
@pytest.mark.parametrize("split", ["seen", "composition"])
def test_what_was_asked_for_is_right(task, kind, split):
    dataset = ShapesDataset(task, split, 12)
    check = check_generation if task.startswith("t") else check_edit
    for index in range(12):
        example = dataset.example(index)
        verdict = check(example, dataset[index]["target"])
        assert all(verdict.values())
        if task.endswith("2i"):
            assert "motion" not in verdict
        if task in ("i2i", "v2v"):  # the source unchanged is not an edit
            verdict = check(example, dataset[index]["source"])
            assert verdict == {
                "changed": False,
                "attributes kept": True,
                "attributes right": False,
                f"changed {example.attribute}": False,
                "place kept": example.attribute != "motion",
                "outside kept": example.attribute != "background",
                "all": False,
            }


def test_what_was_not_asked_for_is_wrong():
    assert check_generation(T2V, render(replace(SOURCE, motion="up"))) == {
        "color": True,
        "shape": True,
        "size": True,
        "background": True,
        "motion": False,
        "all": False,
    }
    also_smaller = check_edit(V2V, render(replace(V2V.target, size="small")))
    assert (also_smaller["changed"], also_smaller["attributes kept"], also_smaller["all"]) == (True, False, False)
    assert not any(check_generation(T2V, np.zeros((17, 64, 64, 3)))[name] for name in ("color", "shape", "all"))


def test_answers_and_tasks():
    assert check_answer(QUESTION, " red\n") == {"color": True, "all": True}
    for answer in ("Red", "red.", "it is red", ""):
        assert check_answer(QUESTION, answer) == {"color": False, "all": False}
    assert check_routing(T2V, "t2v") == {"t2v": True, "all": True}
    assert check_routing(T2V, "t2i") == {"t2v": False, "all": False}


def test_misuse_is_refused():
    image = ShapesDataset("t2i", "seen", 1)
    with pytest.raises(ValueError, match="must be a clip, got 1"):
        check_generation(T2V, render(SOURCE, 1))
    with pytest.raises(ValueError, match="must be one image, got 17"):
        check_generation(image.example(0), render(SOURCE))
    assert check_generation(image.example(0), image[0]["target"][0])["all"]
    with pytest.raises(ValueError, match=r"something to draw.*'understand'"):
        check_generation(QUESTION, render(SOURCE))
    with pytest.raises(ValueError, match=r"an edit.*'t2v'"):
        check_edit(T2V, render(SOURCE))
    with pytest.raises(ValueError, match=r"a question.*'t2v'"):
        check_answer(T2V, "red")
    with pytest.raises(ValueError, match=r"`line` must be one of t2v.*'t3v'"):
        Score.of("t3v", "seen", right(1, 1))
    with pytest.raises(ValueError, match=r"`split` must be one of seen.*'train'"):
        Score.of("t2v", "train", right(1, 1))
    with pytest.raises(ValueError, match="at least one example"):
        Score.of("t2v", "seen", [])
    with pytest.raises(ValueError, match=r"several of \[\('t2v', 'seen'\)\]"):
        Report((Score.of("t2v", "seen", right(1, 1)),) * 2)


def test_scores_count_every_kind_of_verdict():
    score = Score.of("understand", "seen", [*right(3, 4, "color"), *right(2, 2, "shape")])
    assert score.counts == {"all": Count(5, 6), "color": Count(3, 4), "shape": Count(2, 2)}
    assert score.counts["color"].rate == 0.75
    assert score.counts["color"].interval == wilson_interval(3, 4)


def test_a_table_of_every_kind_of_verdict():
    """Of a clip there are verdicts that an image has not; the score is last though it is counted first."""
    scores = [
        Score.of("t2i", "seen", right(1, 2, "color")),
        Score.of("t2v", "seen", [{"all": True, "color": True, "motion": True}]),
    ]
    table = score_table(scores, "Read")
    assert [column.header for column in table.columns] == ["", "split", "color", "motion", "all", "of"]
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [("t2i", "seen", "50.0", "-", "50.0", "2"), ("t2v", "seen", "100.0", "100.0", "100.0", "1")]


def test_bars_are_the_lines():
    assert Score.of("t2v", "seen", right(190, 200)).passed is True
    assert Score.of("t2v", "seen", right(189, 200)).passed is False
    assert Score.of("t2v", "composition", right(160, 200)).passed is True
    assert Score.of("t2v_text_only", "seen", right(0, 200)).passed is None
    assert Score.of("routing", "composition", right(0, 200)).passed is None


def test_places_have_bars_of_their_own():
    near, far = [0.5] * 97, [9.0] * 3
    score = Score.of("v2v", "seen", right(1, 1), near + far)
    assert score.place.passed
    assert score.place.median == 0.5
    assert score.place.within == Count(97, 100)
    assert Report((score,)).passed
    for distances in (near + far * 2, [0.71] * 100):
        missed = Score.of("v2v", "seen", right(1, 1), distances)
        assert missed.passed
        assert not missed.place.passed
        assert not Report((missed,)).passed
    assert Score.of("v2v", "composition", right(1, 1), [0.8] * 95 + [9.0] * 5).place.passed


def test_frames_without_a_shape_count_as_far():
    score = Score.of("i2i", "seen", right(1, 1), [0.1, np.inf, np.inf])
    stored = json.loads(json.dumps(score.to_dict(), allow_nan=False))["place"]
    assert stored["median_pixels"] is None
    assert (stored["frames"], stored["frames_without_shape"]) == (3, 2)
    assert stored["share_within"] == 1 / 3
    assert not score.place.passed
    assert "place" not in Score.of("t2v", "seen", right(1, 1)).to_dict()


def test_the_table_shows_places():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(Report((Score.of("v2v", "composition", right(1, 1), [0.25] * 3 + [9.0]),)).table())
    row = next(line for line in console.export_text().splitlines() if "place kept" in line)
    assert "0.2 px, 75.0 % of 4, wanted 0.8 px, 95 %" in row
    assert "v2v, place kept: median distance, frames within 2 px" in row


def test_a_report_is_json_and_a_table():
    scores = (
        Score.of("t2v", "seen", right(199, 200)),
        Score.of("t2v", "composition", right(120, 200)),
        Score.of("t2v_text_only", "seen", right(7, 200)),
    )
    report = Report(scores, {"seed": 3})
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["settings"] == {"seed": 3}
    assert stored["passed"] is report.passed is False
    assert Report(scores[:1]).passed
    assert stored["scores"][1]["counts"]["all"] == {
        "right": 120,
        "total": 200,
        "rate": 0.6,
        "interval": list(wilson_interval(120, 200)),
    }
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "99.5 % (97.2 to 99.9) of 200, wanted 95 %" in text
    assert "60.0 % (53.1 to 66.5) of 200, wanted 80 %" in text
    assert LINES["t2v_text_only"].title in text
    assert LINES["i2i"].title not in text
