"""Readers for raw data that `datasets` would misread: CSV files, and captions in text files with their media."""

import csv
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, Value

CSV_ROWS = 50_000  # that are kept as texts of Python
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?=[-_.])")


def read_csv(path: Path) -> Dataset:
    """
    Read the rows of a CSV file as texts: a prompt "007" or "NA" is not converted, and an empty cell is `None`.

    Args:
        path: UTF-8 file whose first line has the column names.

    Raises:
        ValueError: for an invalid line, which the message names.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            twice = [name for name, number in Counter(names).items() if number > 1 or not name.strip()]
            if not names or twice:
                what = f"the column name {twice[0]!r} is empty or occurs twice" if twice else "the file is empty"
                raise ValueError(f"{path}: the first line must contain every column name once; {what}.")
            rows: list[list[str | None]] = []
            tables: list[pa.Table] = []
            for cells in reader:
                if not cells:
                    continue
                if len(rows) == CSV_ROWS:  # as texts of Python, all rows would take five times the file
                    tables.append(_text_table(names, rows))
                    rows = []
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells instead of {len(names)}: put texts "
                        "with commas in double quotes."
                    )
                rows.append([cell if cell.strip() else None for cell in cells])
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as CSV in UTF-8 ({error}).") from error
    if not rows:
        raise ValueError(f"{path}: contains no rows below its column names.")
    return Dataset(pa.concat_tables([*tables, _text_table(names, rows)]))


def _text_table(names: list[str], rows: list[list[str | None]]) -> pa.Table:
    columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    return pa.table(columns, names=names)


def has_captions(media: list[Path]) -> bool:
    """Whether any media file has a caption file, such as `1.txt` for `1.mp4`."""
    return any(path.with_suffix(".txt").is_file() for path in media)


def read_captions(folder: Path, media: list[Path]) -> Dataset:
    """
    Read media with caption files as rows with `media` and `prompt`.

    A media file without a caption becomes a row without a prompt, which is refused or skipped like every bad sample.

    Args:
        folder: folder to which paths are relative.
        media: images and videos in the folder.

    Raises:
        ValueError: for captions without media, two media files with one caption, and texts that are not UTF-8.
    """
    captions = {path for path in folder.rglob("*.txt") if path.is_file() and not path.name.startswith(".")}
    wanted = Counter(path.with_suffix(".txt") for path in media)
    lonely = sorted(path.relative_to(folder).as_posix() for path in captions - set(wanted))
    if lonely:
        raise ValueError(
            f"{folder}: {len(lonely)} captions have no image or video of the same name "
            f"({', '.join(lonely[:8])}): add these files, or remove the captions."
        )
    shared = sorted(path.name for path, number in wanted.items() if number > 1 and path in captions)
    if shared:
        raise ValueError(
            f"{folder}: these captions have several images or videos of the same name: {', '.join(shared[:8])}. "
            "Rename or remove some."
        )
    rows = []
    for path in media:
        caption = path.with_suffix(".txt")
        try:
            text = caption.read_text(encoding="utf-8-sig").strip() if caption in captions else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{caption}: is not a UTF-8 text ({error}). Save it as UTF-8.") from error
        rows.append({"media": path.relative_to(folder).as_posix(), "prompt": text or None})
    return Dataset.from_list(rows, features=Features({"media": Value("string"), "prompt": Value("string")}))


def check_one_split(folder: Path, files: list[str]) -> None:
    """Refuse files of several splits, as in data sets of the Hub, because test data would be used for training."""
    splits = {match[1] for file in files if (match := _SPLIT.match(Path(file).name))}
    if len(splits) > 1:
        raise ValueError(
            f"{folder}: contains files of several splits ({', '.join(sorted(splits))}): pass one file, or a folder "
            "with the files of one split."
        )


def no_such_data(source: str) -> ValueError:
    """The error for data that do not exist on the disk, which may be on the Hub or on the web."""
    name = re.sub(r"^(hf:/+)?(datasets/)?", "", source)
    if "://" in source and not source.startswith("hf:"):
        return ValueError(f"{source}: is a URL: download it, and pass the file or folder.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ValueError(
            f"{source}: no such file or folder. Download a data set of the Hub first: `hf download {name} "
            "--repo-type dataset --local-dir DIR`, then pass DIR."
        )
    return ValueError(f"{source}: no such file or folder.")


__all__ = ["check_one_split", "has_captions", "no_such_data", "read_captions", "read_csv"]
