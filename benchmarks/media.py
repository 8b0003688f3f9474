"""
Reading and writing of videos: processor time against plain PyAV, and peak memory.

The long file repeats one group of pictures, so that it is made in seconds; its packets are those of a long recording.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from rich.progress import Progress

from omni_video_hf.media import load_video, save_video

from .measure import in_own_process, interleaved, peak_resident, resident

REPETITIONS = 5
WRITTEN = (832, 480, 49)  # width, height, frames
LONG = (1920, 1080, 18_000)  # ten minutes at 30 frames per second
SELECTED = 17
TITLE = "Media files"
COLUMNS = {
    "what": lambda row: row["what"],
    "plain PyAV, s of the processor": lambda row: f"{row['plain']:.2f}",
    "here, s of the processor": lambda row: f"{row['here']:.2f}",
    "here / plain": lambda row: f"{row['here'] / row['plain']:.2f}",
    "peak of memory, MB": lambda row: f"{row['peak'] / 1e6:.0f}" if row["peak"] else "",
}


def measure(progress: Progress) -> list[dict[str, Any]]:
    """Writing of PIL images, and reading of frames at equal distances from a long file."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [_writing(folder, progress)]
        for distance in (30, 240):  # frames between key frames: of a phone, and of x264 by default
            progress.console.print(f"media: a file with a key frame every {distance} frames ...")
            rows.append(_reading(write_long_file(folder / f"{distance}.mp4", distance), distance))
    return rows


def pictures(width: int, height: int, count: int) -> list[Image.Image]:
    """A texture without noise that moves to the left."""
    cells = np.random.default_rng(0).integers(0, 255, (height // 20 + 1, (width + 6 * count) // 20 + 1, 3))
    texture = cells.astype(np.uint8).repeat(20, 0).repeat(20, 1)
    return [Image.fromarray(texture[:height, 6 * number : 6 * number + width].copy()) for number in range(count)]


def write_long_file(path: Path, distance: int) -> Path:
    """Write an H.264 file of `LONG`, with a key frame every `distance` frames, by repeating the first group."""
    width, height, total = LONG
    with av.open(str(path), "w") as file:
        options = {"g": str(distance), "keyint_min": str(distance), "sc_threshold": "0", "preset": "veryfast"}
        stream = file.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        for picture in [*pictures(width, height, distance), None]:
            frame = None if picture is None else av.VideoFrame.from_image(picture)
            packets += [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in stream.encode(frame)]
        tick = stream.codec_context.time_base
        for repetition in range(total // distance):
            offset = round(repetition * distance / 30 / tick)
            for content, pts, dts, is_key in packets:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = stream, tick, is_key
                packet.pts, packet.dts = pts + offset, dts + offset
                file.mux(packet)
    return path


def _writing(folder: Path, progress: Progress) -> dict[str, Any]:
    frames = pictures(*WRITTEN)

    def plain() -> None:
        with av.open(str(folder / "plain.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=16, options={"crf": "18"})
            stream.width, stream.height, stream.pix_fmt = WRITTEN[0], WRITTEN[1], "yuv420p"
            for picture in frames:
                file.mux(stream.encode(av.VideoFrame.from_image(picture)))
            file.mux(stream.encode())

    paths = {"plain": plain, "here": lambda: save_video(frames, folder / "here.mp4", fps=16)}
    timings = interleaved(paths, REPETITIONS, progress)
    what = f"write {WRITTEN[2]} PIL images of {WRITTEN[0]}x{WRITTEN[1]}"
    return {"what": what, "peak": None} | {name: timing.processor for name, timing in timings.items()}


def _reading(path: Path, distance: int) -> dict[str, Any]:
    what = f"read {SELECTED} of {LONG[2]} frames of {LONG[0]}x{LONG[1]}, a key frame every {distance}"
    return {"what": what} | in_own_process(_read, path)


def _read(path: Path) -> dict[str, float]:
    """Processor seconds of seeking to every frame with PyAV alone, and of the package; peak of the latter."""
    load_video(np.zeros((1, 8, 8, 3), np.uint8))  # imports
    before, start = resident(), time.process_time()
    load_video(path, num_frames=SELECTED)
    here, peak = time.process_time() - start, peak_resident() - before
    start = time.process_time()
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        for wanted in np.linspace(0, LONG[2] - distance_of_end(stream), SELECTED).astype(int).tolist():
            stamp = round(wanted / 30 / stream.time_base)
            file.seek(stamp, stream=stream)
            next(frame for frame in file.decode(stream) if frame.pts is not None and frame.pts >= stamp).to_ndarray(
                format="rgb24"
            )
    return {"here": here, "plain": time.process_time() - start, "peak": peak}


def distance_of_end(stream: Any) -> int:
    """Frames by which the file is shorter than `LONG`, because it has whole groups only, and one for the last."""
    return max(1, LONG[2] - stream.frames + 1)
