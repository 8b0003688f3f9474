"""
Reading and writing of videos and images; only this folder uses PyAV.

Users write `from omni_video_hf.media import load_video`; modules of the package import from the modules here.
"""

from importlib import import_module

_HOMES = {
    "MediaFile": "download",
    "Sound": "video_writer",
    "VideoClip": "clip",
    "VideoWriter": "video_writer",
    "contact_sheet": "images",
    "load_image": "images",
    "load_video": "video_loading",
    "open_media": "video_loading",
    "probe_video": "video_reader",
    "read_media_record": "record",
    "save_image": "images",
    "save_video": "video_writer",
}


def __getattr__(name: str) -> object:
    """Import a name from its module when it is used, because `read_media_record` needs neither torch nor PyAV."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = [
    "MediaFile",
    "Sound",
    "VideoClip",
    "VideoWriter",
    "contact_sheet",
    "load_image",
    "load_video",
    "open_media",
    "probe_video",
    "read_media_record",
    "save_image",
    "save_video",
]
