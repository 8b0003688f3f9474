import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omni_video_hf.cli.console import UsageProblem
from omni_video_hf.cli.output import OutputFile, UnwrittenError, planned_outputs


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    return tmp_path


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != "tmp")


def text(content):
    return lambda path: path.write_text(content)


def refusal(*arguments, **options):
    with pytest.raises(UsageProblem) as caught, OutputFile(*arguments, **options):
        pass
    return str(caught.value)


def test_the_default_name_counts_up():
    written = [OutputFile(None).open().write(text(str(number)), "video") for number in range(3)]
    assert [path.name for path in written] == ["output.mp4", "output-1.mp4", "output-2.mp4"]
    assert OutputFile(None).open().write(text("image"), "image").name == "output.png"
    assert names() == ["output-1.mp4", "output-2.mp4", "output.mp4", "output.png"]


def test_two_at_once_take_two_names():
    first, second = OutputFile(None).open(), OutputFile(None).open()
    assert [output.write(text("x"), "video").name for output in (second, first)] == ["output.mp4", "output-1.mp4"]


def test_two_processes_at_once_take_two_names():
    """Each waits until the other has its file open."""
    code = """
import sys, time
from pathlib import Path
from omni_video_hf.cli.output import OutputFile
output = OutputFile(None).open()
while len(list(Path().glob(".omni-video-output.*/workspace.json"))) + len(list(Path().glob("output*"))) < 2:
    time.sleep(0.01)
print(output.write(lambda path: path.write_text(sys.argv[1]), "video"))
"""
    # Started as the command, the package does not import torch.
    started = f"import sys; sys.argv[0] = 'omni-video'; exec({code!r})"
    processes = [
        subprocess.Popen([sys.executable, "-c", started, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    printed = {process.communicate(timeout=900)[0].strip() for process in processes}
    assert printed == {"output.mp4", "output-1.mp4"}
    assert {Path(name).read_text() for name in printed} == {"a", "b"}
    assert names() == ["output-1.mp4", "output.mp4"]


def test_a_name_that_is_taken_meanwhile_stays_with_its_owner():
    output = OutputFile(Path("fox.mp4")).open()
    Path("fox.mp4").write_text("theirs")
    assert output.write(text("ours"), "video") == Path("fox-1.mp4")
    assert Path("fox.mp4").read_text() == "theirs"


def test_overwrite_replaces_the_file_when_the_new_one_is_complete():
    Path("fox.mp4").write_text("old")
    seen = []
    output = OutputFile(Path("fox.mp4"), overwrite=True).open()
    output.write(lambda path: seen.append(Path("fox.mp4").read_text()) or path.write_text("new"), "video")
    assert (seen, Path("fox.mp4").read_text(), names()) == (["old"], "new", ["fox.mp4"])


def test_names_that_cannot_be_written_are_refused_before_the_work():
    Path("there.mp4").touch()
    Path("folder.mp4").mkdir()
    Path("link.mp4").symlink_to("folder.mp4")
    os.mkfifo("pipe.mp4")
    assert "exists already" in refusal(Path("there.mp4"))
    for overwrite in (False, True):
        assert "is a folder" in refusal(Path("folder.mp4"), overwrite=overwrite)
        assert "link to a folder" in refusal(Path("link.mp4"), overwrite=overwrite)
        assert "no regular file" in refusal(Path("pipe.mp4"), overwrite=overwrite)
        assert "too long" in refusal(Path("x" * 252 + ".mp4"), overwrite=overwrite)
        assert "does not exist" in refusal(Path("nowhere/a.mp4"), overwrite=overwrite)
        assert "suffix" in refusal(Path("a.avi"), overwrite=overwrite)


def test_a_folder_that_cannot_be_written_to_is_refused_when_it_is_opened():
    assert "cannot be written to" in refusal(Path("/proc/a.mp4"))


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_the_longest_name_is_written(suffix):
    name = "x" * (255 - len(suffix)) + suffix
    outputs = planned_outputs(Path(name), 2, overwrite=False)
    written = [output.write(text("x"), "video") for output in outputs]
    assert [len(path.name) for path in written] == [255, 255]
    assert written[0].name == name
    assert names() == sorted(path.name for path in written)


def test_no_half_written_file_under_a_final_name():
    """While a file is written, all that is there is one marked folder; a kill leaves no more."""
    seen = []

    def write(path):
        path.write_text("half")
        seen.extend(names())

    OutputFile(Path("fox.mp4")).open().write(write, "video")
    assert len(seen) == 1
    assert seen[0].startswith(".omni-video-output.")
    assert names() == ["fox.mp4"]


KILLED = """
import os, sys
sys.argv[0] = "omni-video"
from pathlib import Path
from omni_video_hf.cli.output import OutputFile
moment, path = sys.argv[1:]
def die(path):
    path.write_text("half")
    os.kill(os.getpid(), 9)
output = OutputFile(Path(path)).open()
os.kill(os.getpid(), 9) if moment == "opened" else output.write(die, "video")
"""


@pytest.mark.parametrize("moment", ["opened", "written"])
def test_the_next_run_removes_what_a_killed_one_left(moment):
    Path(".omni-video-1-a.partial").write_text("not known to be ours")
    Path(".omni-video-output.mine.unfinished").mkdir()
    Path(".omni-video-output.mine.unfinished/notes").write_text("mine")
    kept = names()
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, "fox.mp4"], check=False)
    assert killed.returncode == -9
    assert len(names()) == len(kept) + 1
    with OutputFile(Path("other.png")) as output:  # of another name, and beside one that is at work
        with OutputFile(None) as beside:
            assert len(names()) == len(kept) + 2
            beside.write(text("x"), "video")
        output.write(text("y"), "image")
    assert names() == [*kept, "other.png", "output.mp4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing(error):
    def write(path):
        path.write_text("half")
        raise error

    with pytest.raises(error), OutputFile(Path("fox.mp4")) as output:
        output.write(write, "video")
    assert names() == []


def test_what_cannot_be_written_any_more_is_put_somewhere_safe():
    Path("folder").mkdir()
    output = OutputFile(Path("folder/fox.mp4")).open()
    shutil.rmtree("folder")  # as an unmounted disk does
    with pytest.raises(UnwrittenError, match=r"folder/fox\.mp4 could not be written.*The result is in ") as caught:
        output.write(text("result"), "video")
    (saved,) = Path("tmp").rglob("fox.mp4")
    assert str(saved.resolve()) in str(caught.value)
    assert saved.read_text() == "result"


def test_a_result_that_cannot_be_written_anywhere_is_the_error_itself():
    def write(path):
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        OutputFile(Path("fox.mp4")).open().write(write, "video")
    assert names() + names("tmp") == []


def test_several_results_have_numbered_names_and_one_that_is_taken_is_refused_first():
    planned = planned_outputs(Path("fox.png"), 3, overwrite=False)
    assert [output.path.name for output in planned] == ["fox.png", "fox-1.png", "fox-2.png"]
    planned[0].close()
    Path("fox-2.png").touch()
    with pytest.raises(UsageProblem, match=r"fox-2\.png` exists already"):
        planned_outputs(Path("fox.png"), 3, overwrite=False)
    assert names() == ["fox-2.png"]
