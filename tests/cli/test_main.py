import json

import numpy as np
import pytest
import torch
from golden import DATA
from PIL import Image
from typer.testing import CliRunner

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.cli import generation as cli_generation
from omni_video_hf.cli.main import app
from omni_video_hf.cli.output import OutputFile
from omni_video_hf.media.images import load_image
from omni_video_hf.media.record import read_media_record
from omni_video_hf.media.video_loading import load_video
from omni_video_hf.media.video_reader import probe_video
from omni_video_hf.media.video_writer import save_video

CLIP = DATA / "bigbuckbunny.mp4"
FAST = ["--steps", "1", "--seed", "0", "--device", "cpu"]


@pytest.fixture
def run(converted, tmp_path, monkeypatch):
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments, model=converted):
        model = ["--model", str(model)] if model is not None else []
        return CliRunner().invoke(app, [*map(str, arguments), *model])

    return invoke


def ok(result):
    assert result.exit_code == 0, result.output
    return result


def refused(result, message, code=None):
    """One line that says why; exit code 2 for an argument that cannot be used, 1 for what fails otherwise."""
    assert result.exit_code in ((1, 2) if code is None else (code,)), result.output
    lines = [line for line in result.output.splitlines() if line.strip() and "it/s]" not in line]  # progress bars
    assert len(lines) == 1, result.output
    assert message in lines[0], result.output
    assert "Traceback" not in result.output


def test_generate_a_video(run, tmp_path):
    result = ok(run("generate", "a fox", "-o", "fox.mp4", "--size", "64x32", "--frames", 5, "--fps", 12, *FAST))
    info = probe_video(tmp_path / "fox.mp4")
    assert (info.width, info.height, info.num_frames, info.fps) == (64, 32, 5, 12)
    assert result.stdout.strip().endswith("fox.mp4")
    assert "guidance_scale" in result.stderr


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_generate_an_image(run, tmp_path, suffix):
    ok(run("generate", "a fox", "-o", f"fox.{suffix}", "--size", "64x32", *FAST))
    assert load_image(tmp_path / f"fox.{suffix}").size == (64, 32)


def test_same_seed_same_file(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ok(run("generate", "a fox", "-o", f"{name}.png", "--size", "64x32", "--steps", 1, "--seed", seed))
    pictures = {name: np.asarray(load_image(tmp_path / f"{name}.png")) for name in "abc"}
    assert np.array_equal(pictures["a"], pictures["b"])
    assert not np.array_equal(pictures["a"], pictures["c"])


def test_edit_a_video_keeps_rate_and_size(run, tmp_path):
    save_video(np.random.default_rng(0).integers(0, 255, (6, 64, 96, 3), dtype=np.uint8), tmp_path / "in.mp4", fps=12)
    result = ok(run("edit", "in.mp4", "more red", "-o", "out.mp4", "--max-context-length", 400, *FAST))
    info = probe_video(tmp_path / "out.mp4")
    assert (info.width, info.height, info.num_frames, info.fps) == (96, 64, 6, 12)
    assert "left out" not in result.stderr


def test_edit_a_real_clip(run, tmp_path):
    ok(run("edit", CLIP, "snow", "-o", "out.mp4", "--size", "64x32", "--frames", 5, "--fps", 8, *FAST))
    assert probe_video(tmp_path / "out.mp4").num_frames == 5
    ok(run("edit", CLIP, "snow", "-o", "even.mp4", "--size", "64x32", "--frames", 5, *FAST))
    assert probe_video(tmp_path / "even.mp4").fps == pytest.approx(25 * 4 / 131, rel=0.01)


def test_edit_an_image(run, tmp_path):
    Image.new("RGBA", (100, 70), (255, 0, 0, 128)).save(tmp_path / "in.PNG")
    result = ok(run("edit", "in.PNG", "more red", "-o", "out.png", "--max-context-length", 300, *FAST))
    assert load_image(tmp_path / "out.png").size == (96, 64)
    assert "100x70" in result.stderr


def test_ask(run, tmp_path):
    answer = ok(run("ask", CLIP, "what is it?", "--max-new-tokens", 5, "--seed", 0)).stdout
    assert answer == ok(run("ask", CLIP, "what is it?", "--max-new-tokens", 5, "--seed", 0)).stdout
    Image.new("L", (30, 20)).save(tmp_path / "grey.jpeg")
    ok(run("ask", "grey.jpeg", "what is it?", "--max-new-tokens", 5))
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".mp4"]


def test_ask_loads_only_what_answers(run, converted, monkeypatch):
    loaded = []

    class Recorded(OmniVideoPipeline):
        @classmethod
        def from_pretrained(cls, *arguments, **options):
            loaded.append(OmniVideoPipeline.from_pretrained(*arguments, **options))
            return loaded[0]

    monkeypatch.setattr(cli_generation, "OmniVideoPipeline", Recorded)
    arguments = {"max_new_tokens": 4, "generator": torch.Generator().manual_seed(0)}
    whole = OmniVideoPipeline.from_pretrained(converted)("what is it?", task="understand", **arguments, video=CLIP)
    answer = ok(
        run("ask", CLIP, "what is it?", "--max-new-tokens", 4, "--seed", 0, "--quiet", "--device", "cpu")
    ).stdout
    assert answer.strip() == whole.text[0]
    (pipe,) = loaded
    assert pipe.text_encoder is pipe.tokenizer is pipe.transformer is pipe.vae is None
    assert not list(pipe.adapter.query_transformer.encoder_layers)
    assert not list(pipe.adapter.query_transformer.decoder_layers)


@pytest.mark.parametrize(("answer", "note"), [("a fox", ""), ("", "the answer of the model is empty")])
def test_an_empty_answer_is_reported(capsys, answer, note):
    job = cli_generation.Job("a", 0, OutputFile(None), {})
    cli_generation._print_answer(job, answer, cli_generation.Printing())
    printed = capsys.readouterr()
    assert printed.out == f"{answer}\n"
    assert note in printed.err
    assert bool(printed.err) == bool(note)


def test_info(run, converted):
    result = ok(run("info", converted, model=None))
    for name in ("mllm", "vision_head", "adapter", "transformer", "vae", "text_encoder", "total"):
        assert name in result.stdout
    parts = {part["name"]: part for part in json.loads(ok(run("info", converted, "--json", model=None)).stdout)}
    assert parts["vision_head"]["parameters"] == 69_984
    assert parts["adapter"]["dtypes"] == {"float32": 135_216}
    assert sum(part["num_bytes"] for part in parts.values()) == 2_638_140


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "-o", "x.avi"], "the suffix must be one of .mp4, .mov, .mkv, .webm, .gif"),
        (["generate", "a", "-o", "nowhere/x.mp4"], "does not exist"),
        (["generate", "a", "-o", "there.mp4"], "exists already"),
        (["generate", "a", "-o", "folder.mp4", "--overwrite"], "is a folder"),
        (["generate", "a", "-o", "x" * 252 + ".mp4"], "File name too long"),
        (["generate", "a", "--fps", "-1"], "--fps -1"),
        (["generate", "a", "--guidance-scale", "inf"], "--guidance-scale inf"),
        (["edit", CLIP, "a", "--source-guidance-scale", "nan"], "--source-guidance-scale nan"),
        (
            ["edit", CLIP, "a", "--source-guidance-scale", "2", "--guidance-scale", "1"],
            "`--guidance-scale 1` turns it off",
        ),
        (["generate", "a", "--flow-shift", "0"], "--flow-shift 0"),
        (["generate", "a", "--seed", "-1"], "--seed -1"),
        (["generate", "a", "-o", "x.webp", "--size", "32x16400"], "up to 16383 pixels per side"),
        (["generate", "long " * 600, "-o", "x.mp4"], "tokens for the text encoder"),
        (["generate", "a", "--negative-prompt", "long " * 600], "tokens for the text encoder"),
        (["generate", "a", "-o", "x.png", "--frames", "5"], "the output is one image"),
        (["generate", "a", "--device", "quick"], "--device quick"),
        (["generate", "a", "--lora", "{no json"], "not JSON"),
        (["generate", "--prompts-file", "empty.mp4"], "contains no prompt"),
        (["generate", "--prompts-file", "nothing.txt"], "No such file"),
        (["generate", "a", "b", "-o", "there.mp4"], "exists already"),
        (["generate", "a", "-o", "x.mp4", "--size", "big"], "must be WIDTHxHEIGHT"),
        (["generate", "a", "-o", "x.mp4", "--size", "65x32"], "multiple of 16"),
        (["generate", "a", "-o", "x.mp4", "--frames", "6"], "5 and 9 are the nearest"),
        (["generate", "", "-o", "x.mp4"], "non-empty"),
        (["generate", "a", "-o", "x.mp4", "--cpu-offload", "model", "--device", "cpu"], "needs an accelerator"),
        (["ask", CLIP, "a", "--memory", "16GB", "--device", "cpu"], "`--memory 16GB` needs an accelerator"),
        (["generate", "a", "-o", "x.mp4", "--attention-backend", "quick"], "must be one of"),
        (["generate", "a", "-o", "x.mp4", "--lora", "nowhere.safetensors"], "nowhere"),
        (["edit", "nothing.mp4", "a"], "no such file"),
        (["edit", "text.mp4", "a"], "text.mp4"),
        (["edit", "empty.mp4", "a"], "empty"),
        (["edit", "cut.mp4", "a"], "cut.mp4"),
        (["edit", CLIP, "a"], "What works: `--size 224x128 --frames 1`. Raise `--max-context-length`"),
        (["edit", CLIP, "a", "-o", "x.png"], "choose a suffix for video files"),
        (["edit", "large.png", "a"], "as a source takes"),
        (["edit", CLIP, "a", "--start", "2x"], "`--start 2x` must be seconds, mm:ss or hh:mm:ss"),
        (["edit", CLIP, "a", "--start", "1:75"], "`--start 1:75` must be seconds"),
        (["edit", CLIP, "a", "--start", "9:00"], "`--start` is 540 seconds, but the video is 5.28"),
        (["edit", CLIP, "a", "--start", "5", "--duration", "1"], "`--duration` must be above 0 and at most 0.28"),
        (["edit", CLIP, "a", "--start", "1", "--frames", "5"], "choose frames in two ways"),
        (["edit", "large.png", "a", "--duration", "1"], "large.png is an image"),
        (
            ["edit", CLIP, "a", "-o", "x.webm", "--codec", "h264"],
            "`--codec` is 'h264', but the format does not take it",
        ),
        (["generate", "a", "-o", "x.mp4", "--quality", "101"], "`--quality` must be 0 to 100, got 101"),
        (["generate", "a", "-o", "x.png", "--quality", "50"], "`--quality` is for videos"),
        (["generate", "a", "--resume"], "`--resume` keeps its steps beside the output"),
        (["generate", "a", "b", "-o", "x.mp4", "--resume"], "`--resume` is for one result, but 2"),
        (["generate", "a", "-o", "folder"], "numbered PNG files have a pattern"),
        (["generate", "a", "-o", "%02d.png"], "01.png exists already"),
        (
            ["generate", "a", "-o", "frame-%04d.png", "--overwrite"],
            "several files, which `--overwrite` does not replace",
        ),
        (["ask", "empty.mp4", "a"], "empty"),
        (["ask", "nothing.png", "a"], "no such file"),
    ],
)
def test_errors_are_one_line_before_a_weight_is_loaded(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "there.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "01.png").touch()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "cut.mp4").write_bytes(CLIP.read_bytes()[:500_000])
    Image.new("RGB", (1600, 1600)).save(tmp_path / "large.png")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(cli_generation, "load", None)  # nothing of this may need a weight
    failures = ("text.mp4", "empty", "cut.mp4") if arguments[0] != "generate" else ()
    refused(run(*arguments), message, code=1 if message in failures else 2)
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_models_are_one_line(run, tmp_path):
    refused(run("generate", "a", "-o", "x.mp4", model="nothing"), "neither a folder nor a Hub repository")
    refused(run("info", "/nowhere/model", model=None), "neither a folder nor a Hub repository")
    refused(run("info", tmp_path, model=None), "no .safetensors files")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    refused(run("info", tmp_path, model=None), "not a complete safetensors file")


def test_verbose_shows_the_traceback(run):
    result = run("generate", "a", "-o", "x.avi", "--verbose", "--quiet")
    assert result.exit_code == 2
    assert "Traceback" in result.output


def test_markup_in_prompts_is_text(run, tmp_path):
    words = ["[red]a fox[/blue]", "-o", "[b]fox.png", "--negative-prompt", "[/] no [link"]
    result = ok(run("generate", *words, "--size", "64x32", *FAST))
    assert "[/] no [link" in result.stderr
    assert load_image(tmp_path / "[b]fox.png").size == (64, 32)


def test_the_seed_is_printed_written_and_repeats_the_file(run, tmp_path, converted):
    arguments = ["--size", "64x32", "--frames", 5, "--steps", 1, "--device", "cpu"]
    result = ok(run("generate", "a fox", "-o", "a.mp4", *arguments))
    made = json.loads(ok(run("info", "a.mp4", "--json", model=None)).stdout)
    assert (made["prompt"], made["model"], made["settings"]["num_frames"]) == ("a fox", str(converted), 5)
    assert f"seed {made['seed']}" in " ".join(result.stderr.split())
    assert str(made["seed"]) in ok(run("info", "a.mp4", model=None)).stdout
    again = ok(run("generate", "a fox", "-o", "b.mp4", "--seed", made["seed"], "--json", "-q", *arguments))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    told = json.loads(again.stdout)
    assert (told["file"], told["seed"], told["settings"]) == ("b.mp4", made["seed"], made["settings"])


def test_several_prompts_and_seeds(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\na hat \n")
    options = ["--prompts-file", "prompts.txt", "-n", 2, "-o", "x.png", "--size", "64x32", "--quiet", *FAST]
    result = ok(run("generate", "a cat", *options))
    names = result.stdout.split()
    assert names == ["x.png", *(f"x-{number}.png" for number in range(1, 6))]
    made = [read_media_record(tmp_path / name) for name in names]
    assert [(entry["prompt"], entry["seed"]) for entry in made] == [
        (prompt, seed) for prompt in ("a cat", "a fox", "a hat") for seed in (0, 1)
    ]
    ok(run("generate", "a hat", "-o", "alone.png", "--size", "64x32", "--steps", 1, "--seed", 1, "--device", "cpu"))
    pictures = [np.asarray(load_image(tmp_path / name)) for name in ("alone.png", "x-5.png", "x-4.png")]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_several_sources(run, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 32), (name[0] == "a" and "red") or "blue").save(tmp_path / name)
    result = ok(run("edit", "a.png", "b.png", "more red", "--json", "--max-context-length", 300, *FAST))
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(entry["source"], entry["file"]) for entry in told] == [("a.png", "output.png"), ("b.png", "output-1.png")]
    answers = ok(run("ask", "a.png", "b.png", "what?", "--max-new-tokens", 2, "--seed", 0)).stdout.splitlines()
    assert [line.partition(": ")[0] for line in answers if ".png: " in line] == ["a.png", "b.png"]


def test_help_names_every_flag_of_diffusers_cli():
    text = CliRunner().invoke(app, ["generate", "--help"], terminal_width=200).output
    for flag in (
        "--model", "--dtype", "--device", "--seed", "--steps", "--guidance-scale", "--size", "--frames", "--fps",
        "--cpu-offload", "--memory", "--attention-backend", "--lora", "--output", "--verbose",
    ):  # fmt: skip
        assert flag in text
    commands = CliRunner().invoke(app, ["--help"]).output
    assert all(command in commands for command in ("generate", "edit", "ask", "info"))


def test_a_loaded_video_is_what_was_written(run, tmp_path):
    ok(run("generate", "a fox", "-o", "fox.mp4", "--size", "64x32", "--frames", 5, *FAST))
    frames = load_video(tmp_path / "fox.mp4").frames
    assert frames.std() > 1  # never black frames
