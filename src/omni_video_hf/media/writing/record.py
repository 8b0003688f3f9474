"""What FFmpeg does not write into GIF and WebP files: the record of the generation, the last duration."""

from pathlib import Path

from PIL import ExifTags, Image


def add_gif_comment(path: Path, text: str) -> None:
    """Insert a comment block after the header of a GIF; FFmpeg counts one at the end as a frame."""
    content = text.encode("ascii")
    blocks = b"".join(
        bytes([len(part)]) + part for part in (content[start : start + 255] for start in range(0, len(content), 255))
    )
    whole = path.read_bytes()
    colours = 3 * 2 ** ((whole[10] & 7) + 1) if whole[10] & 0x80 else 0
    start = 13 + colours
    path.write_bytes(whole[:start] + b"\x21\xfe" + blocks + b"\x00" + whole[start:])


def add_webp_exif(path: Path, text: str) -> None:
    """Append EXIF with an image description to an animated WebP."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    content = exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = b"EXIF" + len(content).to_bytes(4, "little") + content + b"\x00" * (len(content) % 2)
    with path.open("rb+") as file:
        head = file.read(21)
        if head[12:16] != b"VP8X":
            raise ValueError(f"{path}: is no extended WebP, so it cannot store the record.")
        size = int.from_bytes(head[4:8], "little") + len(chunk)
        file.seek(4)
        file.write(size.to_bytes(4, "little"))
        file.seek(20)
        file.write(bytes([head[20] | 8]))
        file.seek(0, 2)
        file.write(chunk)


def set_last_duration(path: Path, seconds: float) -> None:
    """Set how long the last frame of an animated WebP is shown; the encoder takes the mean of the others."""
    with path.open("rb+") as file:
        end = 8 + int.from_bytes(file.read(12)[4:8], "little")
        last = None
        while (position := file.tell()) + 8 <= end:
            head = file.read(8)
            length = int.from_bytes(head[4:8], "little")
            last = position if head[:4] == b"ANMF" else last
            file.seek(position + 8 + length + length % 2)
        if last is not None:
            file.seek(last + 8 + 12)
            file.write(max(1, round(seconds * 1000)).to_bytes(3, "little"))


__all__ = ["add_gif_comment", "add_webp_exif", "set_last_duration"]
