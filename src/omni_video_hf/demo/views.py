"""HTML of the demo page: progress, results, and an edit beside its source."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ..pipelines.output import OmniVideoPipelineOutput
from .files import GAIN, Comparison, kind_of
from .runner import Cancelled, Event, Started, Step, Waiting

# gradio compiles the text as a template of JavaScript and of Handlebars; these characters would be code there.
_TEMPLATE_CHARACTERS = {
    ord("{"): "&#123;",
    ord("}"): "&#125;",
    ord("$"): "&#36;",
    ord("`"): "&#96;",
    ord("\\"): "&#92;",
}


def text(value: Any) -> str:
    """Escape a text for HTML, for attributes, and for gradio's templates."""
    return escape(str(value), quote=True).translate(_TEMPLATE_CHARACTERS)


def placeholder(message: str) -> str:
    """What a stage shows before its first result."""
    return f'<div class="ov-stage ov-empty"><p>{text(message)}</p></div>'


def progress(event: Event | None = None, last_preview: Image.Image | None = None) -> str:
    """What a stage shows while a call waits or runs."""
    if isinstance(event, Waiting):
        calls = "1 other call" if event.ahead == 1 else f"{event.ahead} other calls"
        return _progress(f"Waiting for {calls}", None, None)
    if isinstance(event, Step):
        left = "" if event.seconds_left is None else f", about {duration(event.seconds_left)} left"
        if event.number == event.total:
            left = ", decoding"
        label = f"Step {event.number} of {event.total}{left}"
        return _progress(label, event.number / event.total, event.preview or last_preview)
    return _progress("Reading the prompt and the source" if isinstance(event, Started) else "Starting", None, None)


def _progress(label: str, share: float | None, preview: Image.Image | None) -> str:
    value = "" if share is None else f' value="{share:.3f}"'
    picture = '<div class="ov-noise" aria-hidden="true"></div>'
    if preview is not None:
        file = io.BytesIO()
        preview.save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        picture = f'<img class="ov-media ov-preview" alt="Preview" src="data:image/png;base64,{data}">'
    return (
        f'<div class="ov-stage ov-busy">{picture}<p role="status">{text(label)}</p>'
        f'<progress aria-label="Progress" max="1"{value}></progress></div>'
    )


def duration(seconds: float) -> str:
    """Seconds as people say them: `3 s`, `2 min`."""
    if seconds < 1:
        return "1 s"
    return f"{round(seconds)} s" if seconds < 100 else f"{round(seconds / 60)} min"


def cancelled(event: Cancelled) -> str:
    """What a stage shows after a cancelled call."""
    done = "before it began" if event.steps == 0 else f"after step {event.steps}"
    return placeholder(f"Cancelled {done}.")


def failure(message: str) -> str:
    """What a stage shows after an error."""
    return f'<div class="ov-stage ov-error" role="alert"><p>{text(message)}</p></div>'


def media(path: str | Path, label: str) -> str:
    """An image or a clip that plays in a loop."""
    address = f"gradio_api/file={quote(str(path))}"
    if kind_of(path) == "image":
        return f'<img class="ov-media" src="{address}" alt="{text(label)}">'
    return (
        f'<video class="ov-media" src="{address}" aria-label="{text(label)}" controls loop autoplay muted playsinline>'
        "</video>"
    )


def result(path: str | Path, output: OmniVideoPipelineOutput, seconds: float) -> str:
    """A result, and how it was made."""
    label = output.settings.get("prompt") or "Result"
    return f'<div class="ov-stage">{media(path, str(label))}{caption(output, seconds)}</div>'


def source(path: str | Path | None) -> str:
    """The source that an edit or a question is about."""
    if path is None:
        return placeholder("Upload an image or a video below, or send a result here.")
    return f'<div class="ov-stage ov-source">{media(path, "The source")}</div>'


def answer(question: str, output: OmniVideoPipelineOutput, seconds: float) -> str:
    """An answer and its question."""
    words = output.text[0] if output.text else ""
    shown = text(words) if words else "<em>The answer of the model is empty.</em>"
    return (
        f'<div class="ov-stage ov-answer"><p class="ov-question">{text(question)}</p>'
        f'<p class="ov-words" role="status">{shown}</p>{caption(output, seconds)}</div>'
    )


def caption(output: OmniVideoPipelineOutput, seconds: float) -> str:
    """Size, length, steps, seed and notes in one paragraph."""
    settings = output.settings
    facts = []
    if "width" in settings:
        size = f"{settings['width']}&#215;{settings['height']}"
        frames = f", {settings['num_frames']} frames at {settings['fps']:g} per second" if output.fps else ""
        facts.append(f"{size}{frames}")
        facts.append(f"{settings['num_inference_steps']} steps")
    facts.append(f"seed {settings.get('seed')}")
    facts.append(f"{seconds:.1f} s")
    notes = "".join(f'<p class="ov-note">{text(note)}</p>' for note in output.notes)
    return f'<p class="ov-caption">{" &#183; ".join(facts)}</p>{notes}'


def comparison(compared: Comparison, output: OmniVideoPipelineOutput, seconds: float, uid: str) -> str:
    """
    An edit beside its source, under a slider, and as difference; the views are switched in the page, without a call.

    Args:
        uid: text that no other comparison of the page has, for the names of its switches.
    """
    label = text(output.settings.get("prompt") or "Edit")
    source, edited, difference = (
        _plain(path, name, compared.kind)
        for path, name in (
            (compared.source, "Source"),
            (compared.result, f"Result: {label}"),
            (compared.difference, "Difference"),
        )
    )
    views = {
        "beside": ("Side by side", f"{_figure(source, 'Source')}{_figure(edited, 'Result')}"),
        "slider": (
            "Slider",
            f'<div class="ov-wipe" style="--cut:50%">{edited}<div class="ov-cut">{source}</div>'
            '<input type="range" min="0" max="100" value="50" aria-label="Share of the source that is shown"'
            " oninput=\"this.parentElement.style.setProperty('--cut', this.value + '%')\"></div>"
            '<p class="ov-caption">Left of the line: source. Right: result.</p>',
        ),
        "difference": (
            "Difference",
            f"{_figure(difference, f'What changed, {GAIN} times as bright. Black: nothing.')}",
        ),
    }
    switches, panes = "", ""
    for number, (name, (title, content)) in enumerate(views.items()):
        checked = " checked" if number == 0 else ""
        switches += (
            f'<input type="radio" class="ov-view-{name}" name="{uid}" id="{uid}-{name}"{checked}>'
            f'<label for="{uid}-{name}">{title}</label>'
        )
        panes += f'<div class="ov-pane ov-{name}">{content}</div>'
    return (
        f'<div class="ov-stage ov-compare" role="group" aria-label="Comparison of source and result">{switches}{panes}'
        f"{caption(output, seconds)}</div>"
    )


def _plain(path: Path, label: str, kind: str) -> str:
    """Media without controls: all clips of a comparison play in step, see `SCRIPT` in `style`."""
    address = f"gradio_api/file={quote(str(path))}"
    if kind == "image":
        return f'<img class="ov-media" src="{address}" alt="{label}">'
    return (
        f'<video class="ov-media" src="{address}" aria-label="{label}" loop autoplay muted playsinline'
        ' ontimeupdate="window.omniVideoInStep && omniVideoInStep(this)"></video>'
    )


def _figure(content: str, title: str) -> str:
    return f"<figure>{content}<figcaption>{title}</figcaption></figure>"


__all__ = [
    "answer",
    "cancelled",
    "caption",
    "comparison",
    "duration",
    "failure",
    "media",
    "placeholder",
    "progress",
    "result",
    "source",
    "text",
]
