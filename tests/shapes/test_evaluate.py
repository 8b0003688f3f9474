import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from examples.shapes import configuration
from omni_video_hf.cli.evaluate import Sources
from omni_video_hf.cli.main import app
from omni_video_hf.shapes import ShapesDataset
from omni_video_hf.shapes.evaluate import SOURCES, Evaluation, checked_lines, save_evaluation
from omni_video_hf.shapes.other_renderer import render_otherwise
from omni_video_hf.shapes.scores import LINES


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    built = configuration.pipeline()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def evaluated(pipe):
    evaluation = Evaluation(pipe, count=2, batch_size=2, steps=1)
    return evaluation, evaluation.run()


@pytest.mark.slow
def test_every_line_of_the_table_is_measured_and_an_untrained_model_fails(evaluated):
    _, report = evaluated
    found = {(score.line, score.split) for score in report.scores}
    assert found == {(line, split) for line in LINES for split in ("seen", "composition")} - {
        ("routing", "composition")
    }
    assert all(score.counts["all"].total == 2 for score in report.scores)
    assert sum(score.counts["all"].right for score in report.scores) == 0
    assert not report.passed


@pytest.mark.slow
def test_results_are_written_as_json_and_pictures(evaluated, tmp_path):
    evaluation, report = evaluated
    save_evaluation(report, evaluation.shown, tmp_path)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["settings"]["count"] == 2
    assert len(written["scores"]) == len(report.scores)
    sheets = {f"{line}_{split}.png" for line in LINES if line != "routing" for split in ("seen", "composition")}
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "strip.png", *sheets}


def test_edits_report_places(evaluated):
    _, report = evaluated
    for score in report.scores:
        frames = {"v2v": 2 * 17, "i2i": 2}.get(score.line)
        assert (len(score.place.distances) if score.place else None) == frames
        if frames:
            assert {"attributes right", "place kept", "outside kept"} <= set(score.counts)


def test_edits_of_sources_of_another_renderer(pipe):
    evaluations = [Evaluation(pipe, count=2, steps=1, sources=sources) for sources in ("renderer", "other-renderer")]
    reports = [evaluation.run(["i2i"]) for evaluation in evaluations]
    assert [report.to_dict()["settings"]["sources"] for report in reports] == ["renderer", "other-renderer"]
    own, other = (evaluation.shown["i2i", "seen"] for evaluation in evaluations)
    dataset = ShapesDataset("i2i", "seen", 2)
    for number in range(2):
        assert np.array_equal(own[number].source, dataset[number]["source"])
        assert np.array_equal(other[number].source, render_otherwise(dataset.example(number).source, 1))
        assert other[number].caption == own[number].caption


def test_sources_of_another_renderer_are_for_edits_only(pipe):
    assert checked_lines(None, "other-renderer") == ("v2v", "i2i")
    with pytest.raises(ValueError, match=r"among v2v, i2i with `sources='other-renderer'`, got t2v"):
        Evaluation(pipe, sources="other-renderer").run(["t2v", "i2i"])
    with pytest.raises(ValueError, match="`sources` must be one of renderer, other-renderer, got 'pil'"):
        Evaluation(pipe, sources="pil")
    assert tuple(Sources) == SOURCES


def test_what_is_nulled_changes_what_is_drawn(pipe):
    drawn = {}
    for line in ("t2v", "t2v_visual_only", "t2v_text_only"):
        evaluation = Evaluation(pipe, count=1, steps=1)
        evaluation.run([line])
        drawn[line] = evaluation.shown[line, "seen"][0].result.tobytes()
    assert len(set(drawn.values())) == 3


def test_the_same_seed_draws_the_same_whatever_the_batch(pipe):
    pictures = []
    for batch_size in (1, 3):
        evaluation = Evaluation(pipe, count=3, batch_size=batch_size, steps=1)
        evaluation.run(["i2i"])
        pictures.append(np.stack([shown.result for shown in evaluation.shown["i2i", "seen"]]).astype(int))
    assert pictures[0].shape == (3, 1, 64, 64, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize(("arguments", "message"), [({"count": 0}, "`count` must be at least 1, got 0")])
def test_numbers_that_make_no_sense_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(pipe, **arguments)


@pytest.mark.slow
def test_the_command_prints_the_table(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    words = ["eval", "shapes", "--model", str(tmp_path / "model"), "--count", "1", "--steps", "1"]
    result = CliRunner().invoke(app, [*words, "--line", "t2i", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "t2i" in result.output
    assert "0.0 %" in result.output
    assert (tmp_path / "out" / "scores.json").is_file()
    result = CliRunner().invoke(app, [*words, "--line", "t3i"])
    assert result.exit_code == 2
    assert "`lines` must be among" in result.output
    result = CliRunner().invoke(app, [*words, "--line", "t2i", "--sources", "other-renderer"])
    assert result.exit_code == 2
    assert "`sources='other-renderer'`" in result.output
