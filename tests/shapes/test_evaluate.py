import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from examples.shapes import configuration
from omni_video_hf.cli.main import app
from omni_video_hf.shapes.evaluate import Evaluation, save_evaluation
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
