import os
import time

import pyarrow.parquet as pq
import pytest
from raw_data import make_clip, make_image

from omni_video_hf.media.video_reader import MediaError
from omni_video_hf.training.data.media_table import Media, probe
from omni_video_hf.training.features import known_files
from omni_video_hf.training.features.known_files import FILES, KnownFiles


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A video and an image that did not change lately."""
    monkeypatch.setattr(known_files, "SETTLED", -1)
    return [Media(path.name, path) for path in (make_clip(tmp_path / "a.mp4"), make_image(tmp_path / "b.png"))]


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that are read, for their properties and for their hash."""
    names = []
    own = {"probe": probe, "sha256": Media.sha256}
    monkeypatch.setattr(known_files, "probe", lambda media: names.append(media.name) or own["probe"](media))
    monkeypatch.setattr(Media, "sha256", lambda media: names.append(media.name) or own["sha256"](media))
    return names


def look(folder, files):
    known = KnownFiles(folder)
    found = [(known.info(media), known.sha256(media)) for media in files]
    known.save(known.found())
    return found


def test_files_that_did_not_change_are_not_opened_again(tmp_path, files, opened):
    first = look(tmp_path, files)
    assert first == [(probe(media), media.sha256()) for media in files]
    opened.clear()
    stats = []
    own = known_files._stamp
    known_files._stamp, again = lambda path: stats.append(path) or own(path), None
    try:
        again = look(tmp_path, files)
    finally:
        known_files._stamp = own
    assert again == first  # with the rate as a fraction, and no video of an image
    assert not opened
    assert stats == [media.path for media in files]  # once each
    assert str(tmp_path) not in (tmp_path / FILES).read_bytes().decode(errors="replace")


def test_files_that_changed_are_opened_again(tmp_path, files, opened):
    first = look(tmp_path, files)
    video, image = files
    before = image.path.stat()
    image.path.write_bytes(video.path.read_bytes())
    os.utime(image.path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy with its times
    opened.clear()
    second = look(tmp_path, files)
    assert opened == ["b.png", "b.png"]
    assert second == [first[0], first[0]]
    image.path.unlink()
    with pytest.raises(MediaError, match="no such file"):
        look(tmp_path, files)


def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path, files):
    known = KnownFiles(tmp_path)
    known.info(files[0])
    known.check_unchanged(files[0])
    known.check_unchanged(None)
    known.check_unchanged(Media("bytes", data=b"x"))
    with files[0].path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"a\.mp4: changed while its features were computed"):
        known.check_unchanged(files[0])


def test_what_changed_just_now_is_not_remembered(tmp_path):
    """Within one tick of the clock a file could change again with the same size and times."""
    make_image(tmp_path / "new.png")
    assert time.time_ns() - (tmp_path / "new.png").stat().st_mtime_ns < known_files.SETTLED
    look(tmp_path, [Media("new.png", tmp_path / "new.png")])
    assert not (tmp_path / FILES).exists()


@pytest.mark.parametrize("content", [b"", b"PAR1"])
def test_a_damaged_table_is_not_used(tmp_path, files, opened, content):
    wanted = look(tmp_path, files)
    table = pq.read_table(tmp_path / FILES)
    for spoilt in (lambda: (tmp_path / FILES).write_bytes(content), lambda: pq.write_table(
        table.replace_schema_metadata({}), tmp_path / FILES
    )):  # fmt: skip
        spoilt()
        opened.clear()
        assert look(tmp_path, files) == wanted
        assert len(opened) == 4
    assert KnownFiles(None).info(files[0]) == wanted[0][0]
    content = Media("bytes", data=files[1].path.read_bytes())
    assert KnownFiles(tmp_path).sha256(content) == wanted[1][1]
