"""Tables of raw training data, read with `datasets`: formats, columns, media files, and checks of rows."""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Image, Value, Video, load_dataset

from ...media.images import load_image
from ...media.video_reader import MediaError, VideoInfo, check_file, picture_format, probe_video
from ...processing.processing_omni_video import OmniVideoProcessor
from ...tasks import TASKS, get_task
from ...utils.names import check_known
from .bad_data import Offender
from .table_files import check_one_split, has_captions, no_such_data, read_captions, read_csv
from .table_names import Places, media_names, repeated

COLUMNS = {
    "id": "name of the sample, unique; by default its task and media",
    "task": "t2i, t2v, i2i, v2v, i2v or understand",
    "prompt": "prompt or edit instruction; not for understand",
    "media": "target image or video; for understand, the image or video of the question, if any",
    "source": "image or video to edit or animate (i2i, v2v, i2v)",
    "question": "for understand",
    "answer": "for understand",
}
FORMATS = ("videofolder", "imagefolder", "captions", "json", "csv", "parquet", "webdataset")
SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".tar": "webdataset"}
# Names that `datasets` gives to the column of files in a folder, and to usual file types in a tar.
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "gif")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MEDIA_COLUMNS = ("video", "image", *VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
PROMPT_COLUMNS = ("txt",)
NAMED_AT_ONCE = 8192  # rows whose names are computed together


@dataclass(frozen=True)
class Media:
    """
    A media file of a row: a path, or bytes from a parquet file or tar.

    Args:
        name: name of the file for messages.
        path: path of the file; `None` for bytes.
        data: content of the file; `None` for a path.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None

    @contextmanager
    def open(self) -> Iterator[Path]:
        """Yield a path to read from, a temporary file for bytes. Errors name the file as in the row."""
        if self.data is None and self.path is not None:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "media"
            path.write_bytes(self.data or b"")
            try:
                yield path
            except MediaError as error:
                raise MediaError(str(error).replace(str(path), self.name)) from error

    def sha256(self) -> str:
        """SHA-256 hash of the content."""
        if self.data is not None or self.path is None:
            return hashlib.sha256(self.data or b"").hexdigest()
        check_file(self.path)
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class MediaInfo:
    """Properties of an image or video file: kind, size, frames and rate."""

    kind: Literal["image", "video"]
    width: int  # pixels
    height: int  # pixels
    video: VideoInfo | None = None


def probe(media: Media) -> MediaInfo:
    """
    Read the properties of a media file: all of an image, or all packets and one frame of a video.

    Raises:
        MediaError: for a file that is missing, empty, cut short, damaged, or neither image nor video.
    """
    with media.open() as path:
        check_file(path)
        found = picture_format(path)
        if found is not None and found[1] == 1:
            width, height = load_image(path).size
            return MediaInfo("image", width, height)
        info = probe_video(path)
        return MediaInfo("video", info.width, info.height, info)


@dataclass(frozen=True)
class Row:
    """
    One sample of a table; its values are not checked yet, see [`check_row`].

    Args:
        id: name of the sample.
        task: name of the task.
        text: prompt or question.
        answer: answer for `understand`.
        media: target image or video, or that of the question.
        source: image or video to edit or animate.
    """

    id: str
    task: Any
    text: Any
    answer: Any = None
    media: Media | None = None
    source: Media | None = None
    misplaced: tuple[str, ...] = ()  # columns that have a value but are not used by the task


class MediaTable:
    """
    A table of raw data, whose rows are read by number.

    Args:
        rows: a dataset with columns of `COLUMNS`; columns without values may be missing. Media are paths, or
            `Image(decode=False)` and `Video(decode=False)`, because `datasets` decodes videos only with torchcodec and
            this package uses PyAV.
        folder: folder to which relative paths refer.
        task: task of all rows, for data without the column `task`.
        columns: names of columns in the user's data, e.g. `{"prompt": "caption"}`.

    `ids` has the name of every row.

    Raises:
        ValueError: for names of columns that do not exist, and for an `id` that occurs twice.
    """

    def __init__(
        self,
        rows: Dataset,
        folder: str | Path = ".",
        task: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        check_known("columns", columns or {}, COLUMNS)
        self.folder, self.task = Path(folder), task
        self._places, self._root = Places(), f"{self.folder.resolve().as_posix().rstrip('/')}/"
        # In a tar, the other columns are the fields of the .json files.
        if "json" in rows.column_names and isinstance(rows.features["json"], dict):
            rows = rows.flatten().rename_columns({f"json.{name}": name for name in rows.features["json"]})
        check_known("columns", (columns or {}).values(), rows.column_names)
        for name, feature in rows.features.items():
            if isinstance(feature, (Image, Video)):
                rows = rows.cast_column(name, type(feature)(decode=False))
        self.rows = rows
        self.columns = {name: (columns or {}).get(name) or self._find(name) for name in COLUMNS}
        if self.columns["task"] is None and task is None:
            raise ValueError(f"The data have no column `task` (columns: {', '.join(rows.column_names)}): pass `task`.")
        self._check_types()
        self.ids = self._name_rows()

    def _check_types(self) -> None:
        """Refuse columns of lists and structures, which no task reads."""
        for name, column in self.columns.items():
            kind = None if column is None else self.rows.features[column]
            is_file = isinstance(kind, dict) and bool({"path", "bytes"} & kind.keys())
            is_media = isinstance(kind, (Image, Video)) or is_file
            if kind is None or isinstance(kind, Value) or (is_media and name in ("media", "source")):
                continue
            wanted = "paths, images or videos" if name in ("media", "source") else "texts"
            found = " ".join(str(kind).split())
            raise ValueError(
                f"The column `{column}` ({name}) must hold {wanted}, one a row, but holds {found[:120]}: give each "
                "row one value, or name another column with `columns`."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        values = self.rows[number]
        row = {name: values[column] if column else None for name, column in self.columns.items()}
        task = row["task"] if row["task"] is not None else self.task
        asks = task in TASKS and TASKS[task].answers_in_text
        reads = {"question", "answer", "media"} if asks else {"prompt", "media"}
        if task not in TASKS or TASKS[task].source is not None:
            reads.add("source")
        misplaced = tuple(name for name in COLUMNS if name not in {"id", "task"} | reads and row[name] is not None)
        return Row(
            id=self.ids[number],
            task=task,
            text=row["question" if asks else "prompt"],
            answer=row["answer"],
            media=self._media(row["media"]),
            source=self._media(row["source"]),
            misplaced=misplaced,
        )

    def _find(self, name: str) -> str | None:
        """The column for `name`: the one of this name, or the one that `datasets` creates for folders and tars."""
        usual = {"media": MEDIA_COLUMNS, "prompt": PROMPT_COLUMNS, "id": ("__key__",)}
        return next((column for column in (name, *usual.get(name, ())) if column in self.rows.column_names), None)

    def _media(self, value: Any) -> Media | None:
        if value is None or (isinstance(value, Mapping) and not (value.get("path") or value.get("bytes"))):
            return None
        if isinstance(value, Mapping) and value.get("bytes") is not None:
            return Media(str(value.get("path") or "bytes"), data=value["bytes"])
        path = value["path"] if isinstance(value, Mapping) else value
        return Media(str(path), path=self.folder / str(path))

    def _name_rows(self) -> list[str]:
        """A name for every row that does not depend on other rows, so that a cache finds its entry again."""
        column = self.columns["id"]
        if column:
            names = [str(value) for table in self._tables(column) for value in table[column].to_pylist()]
            twice = sorted({names[row] for row in repeated(names)})[:8]
            if twice:
                raise ValueError(f"`{column}` must be unique, but these occur twice: {', '.join(twice)}.")
            return names
        chosen = [column for column in (self.columns["task"], self.columns["media"]) if column]
        names = [f"{self.task}:-"] * len(self.rows) if not chosen else []
        for table in self._tables(*chosen):
            tasks = table[self.columns["task"]].to_pylist() if self.columns["task"] else [None] * len(table)
            media = media_names(table[self.columns["media"]]) if self.columns["media"] else [None] * len(table)
            names += [
                f"{task or self.task}:{'-' if name is None else self._relative(name)}"
                for task, name in zip(tasks, media, strict=True)
            ]
        counts: Counter[str] = Counter()
        for row in repeated(names):
            name = names[row]
            counts[name] += 1
            if counts[name] > 1:
                names[row] = f"{name}#{counts[name]}"
        return names

    def _tables(self, *columns: str) -> Iterator[Any]:
        """Some columns as Arrow tables of a few thousand rows each; none without a column."""
        if columns:
            yield from self.rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=NAMED_AT_ONCE)

    def _relative(self, name: str) -> str:
        """The name of a file in the folder of the table from there; another name as it is."""
        if not os.path.isabs(name):  # noqa: PTH117 - a Path takes ten times as long
            return name
        path = self._places.real_path(name)
        return path.removeprefix(self._root) if path.startswith(self._root) else name


def load_media_table(
    source: str | Path,
    *,
    data_format: str | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> MediaTable:
    """
    Load a table of raw data with one row per sample; media files are not opened.

    Args:
        source: a JSONL, CSV or parquet file; a folder of videos or images with `metadata.jsonl` (`videofolder`,
            `imagefolder`) or with a caption file for each, `1.txt` for `1.mp4` (`captions`); a folder of parquet
            files; a `.tar` file or a folder of them (`webdataset`).
        data_format: one of `FORMATS`. Default: found by the files of `source`.
        task: task of all rows, for data without the column `task`.
        columns: names of columns in the user's data, e.g. `{"prompt": "caption"}`.

    Raises:
        ValueError: if there are no data, or they cannot be read.
    """
    if not Path(source).exists():
        raise no_such_data(str(source))
    source = Path(source)
    data_format = data_format or _guess_format(source)
    check_known("data_format", [data_format], FORMATS)
    folder = source if source.is_dir() else source.parent
    if data_format == "csv":
        files = sorted(source.glob("*.csv")) if source.is_dir() else [source]
        if len(files) != 1:
            raise ValueError(f"{source}: contains {len(files)} .csv files: pass one of them.")
        return MediaTable(read_csv(files[0]), folder, task, columns)
    if data_format == "captions":
        return MediaTable(read_captions(folder, _media_files(folder)), folder, task, columns)
    if data_format in ("videofolder", "imagefolder"):
        arguments: dict[str, Any] = {"data_dir": str(source)}
    elif source.is_dir():
        pattern = {"webdataset": "*.tar", "json": "*.json*"}.get(data_format, "**/*.parquet")
        names = sorted(map(str, source.glob(pattern)))
        check_one_split(source, names)
        arguments = {"data_files": names}
    else:
        arguments = {"data_files": str(source)}
    try:
        rows = load_dataset(data_format, split="train", **arguments)
    except Exception as error:  # errors of pyarrow, pandas or datasets
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{source}: cannot be read as {data_format} ({reason}).") from error
    return MediaTable(rows, folder, task, columns)


def _guess_format(source: Path) -> str:
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise ValueError(f"{source}: the suffix must be one of {', '.join(SUFFIXES)}; else pass `data_format`.")
        return SUFFIXES[source.suffix]
    found = {path.suffix.lower().lstrip(".") for path in source.rglob("*") if path.is_file()}
    if "tar" in found:
        return "webdataset"
    if not any(source.rglob("metadata.*")) and has_captions(_media_files(source)):
        return "captions"
    videos, images = found & set(VIDEO_SUFFIXES), found & set(IMAGE_SUFFIXES)
    if not videos and not images and "parquet" in found:
        return "parquet"
    if videos and images:
        raise ValueError(
            f"{source}: contains both videos and images, but `datasets` reads one kind only: list them in a JSONL "
            "file with the columns `task` and `media`."
        )
    if not videos and not images:
        raise ValueError(f"{source}: contains no videos, images or .tar or .parquet files: pass another folder.")
    return "videofolder" if videos else "imagefolder"


def _media_files(folder: Path) -> list[Path]:
    """Images and videos in a folder and its subfolders."""
    suffixes = {f".{suffix}" for suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


def check_row(
    row: Row, processor: OmniVideoProcessor | None = None, look: Callable[[Media], MediaInfo] = probe
) -> Iterator[Offender]:
    """
    Yield all problems of a row: unknown task, empty text, and missing, damaged or unsuitable media.

    Args:
        row: the row.
        processor: processor whose control tokens texts must not contain; `None` skips this check.
        look: returns the properties of a file, or raises as [`probe`].
    """
    if row.task not in TASKS:
        yield Offender(row.id, f"unknown task {row.task!r}; known: {', '.join(TASKS)}")
        return
    spec = get_task(row.task)
    asks = spec.answers_in_text
    for name in row.misplaced:
        yield Offender(row.id, f"`{name}` has a value, but the task {row.task!r} does not use it; leave it empty")
    texts = {"question" if asks else "prompt": row.text} | ({"answer": row.answer} if asks else {})
    for name, text in texts.items():
        yield from (Offender(row.id, f"`{name}` {problem}") for problem in _text_problems(text, processor))
    if row.source is None and spec.source is not None:
        yield Offender(row.id, f"`source` is empty; the task {row.task!r} needs a {spec.source}")
    elif row.source is not None and spec.source is not None:
        yield from _media_problems(row, "source", row.source, spec.source, look)
    if row.media is not None:
        yield from _media_problems(row, "media", row.media, None if asks else spec.output, look)
    elif not asks:
        yield Offender(row.id, f"`media` is empty; the task {row.task!r} needs the target {spec.output}")


def _text_problems(text: Any, processor: OmniVideoProcessor | None) -> Iterator[str]:
    if not isinstance(text, str) or not text.strip():
        yield f"is empty ({text!r})"
    elif processor is not None:
        for token in processor.tokenizer.added_tokens_decoder.values():
            if token.special and token.content in text:
                yield f"contains {token.content!r}, which is a control token"


def _media_problems(
    row: Row, column: str, media: Media, wanted: str | None, look: Callable[[Media], MediaInfo]
) -> Iterator[Offender]:
    if media.data is None and "://" in media.name:
        yield Offender(row.id, f"`{column}` {media.name}: is a URL; download the file and write its path there")
        return
    try:
        kind = look(media).kind
    except MediaError as error:
        yield Offender(row.id, f"`{column}` {error}")
        return
    if wanted is not None and kind != wanted:
        yield Offender(row.id, f"`{column}` {media.name}: is {_a(kind)}; the task {row.task!r} needs {_a(wanted)}")


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "image" else f"a {kind}"


__all__ = ["COLUMNS", "FORMATS", "Media", "MediaInfo", "MediaTable", "Row", "check_row", "load_media_table", "probe"]
