"""The API of the page, for `gradio_client`: `/create`, `/edit`, `/ask` and `/cancel`."""

from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import gradio as gr
from gradio.utils import get_upload_folder

from .requests import NUMBERS
from .work import Finished, Workshop, sentence

SETTINGS = ("preset", "negative_prompt", *NUMBERS)


def session_of(request: gr.Request) -> str:
    """The session of a visitor; a call without one has a session of its own."""
    return request.session_hash or uuid4().hex


def add_api(workshop: Workshop) -> None:
    """Add the endpoints to the page that is being built."""

    def create(
        request: gr.Request,
        prompt: str,
        kind: Literal["video", "image"] = "video",
        seed: int | None = None,
        settings: dict | None = None,
    ) -> tuple[dict, dict]:
        """
        Generate a video or an image. Returns its file, and a record of how it was made.

        `settings` may have num_inference_steps, guidance_scale, flow_shift, height, width, num_frames, fps,
        negative_prompt and preset.
        """
        arguments = {"kind": kind, "seed": seed, "form": _checked(settings)}
        return _file_and_record(_run(workshop, request, "create", prompt, arguments))

    def edit(
        request: gr.Request,
        source: dict,
        instruction: str,
        seed: int | None = None,
        settings: dict | None = None,
    ) -> tuple[dict, dict]:
        """Edit an image or a video, passed with `handle_file`. Returns its file, and a record of how it was made."""
        arguments = {"source": source, "seed": seed, "form": _checked(settings)}
        return _file_and_record(_run(workshop, request, "edit", instruction, arguments))

    def ask(request: gr.Request, source: dict, question: str, seed: int | None = None) -> str:
        """Answer a question about an image or a video, passed with `handle_file`."""
        finished = _run(workshop, request, "ask", question, {"source": source, "seed": seed})
        return finished.output.text[0] if finished.output.text else ""

    def cancel(request: gr.Request) -> int:
        """Cancel the calls of the same client that wait or run. Returns their number."""
        return workshop.runner.cancel(session_of(request))

    for function in (create, edit, ask):
        gr.api(function, api_name=function.__name__, concurrency_limit=16)
    gr.api(cancel, api_name="cancel", queue=False)


def _run(workshop: Workshop, request: gr.Request, way: str, text: str, arguments: dict[str, Any]) -> Finished:
    try:
        if "source" in arguments:
            arguments["source"] = _uploaded(arguments["source"], workshop.files.folder)
        return workshop.finish(workshop.request(way, text, **arguments), session_of(request))
    except Exception as error:
        raise gr.Error(sentence(error), title="This call failed", print_exception=False) from None


def _checked(settings: dict | None) -> dict[str, Any]:
    unknown = set(settings or ()) - set(SETTINGS)
    if unknown:
        raise gr.Error(
            f"`settings` may have {', '.join(SETTINGS)}, got {', '.join(sorted(unknown))}.", print_exception=False
        )
    return settings or {}


def _uploaded(source: Any, own: Path) -> str:
    """
    Path of an uploaded file, or of an earlier result.

    Raises:
        ValueError: for any other path, which would let a client read files of the server.
    """
    path = source.get("path") if isinstance(source, dict) else source
    folders = [Path(get_upload_folder()).resolve(), own.resolve()]
    if not isinstance(path, str) or not any(Path(path).resolve().is_relative_to(folder) for folder in folders):
        raise ValueError("`source` must be a file that the client sends: pass `handle_file(path)` of gradio_client.")
    return path


def _file_and_record(finished: Finished) -> tuple[dict, dict]:
    path = finished.path
    if path is None:
        raise gr.Error("The model answered in text.", print_exception=False)
    file = {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}
    return file, finished.output.record() | {"notes": finished.output.notes}


__all__ = ["add_api", "session_of"]
