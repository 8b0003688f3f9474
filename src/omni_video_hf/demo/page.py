"""The page: four ways to use the model, the gallery of the session, the drawer with settings, and the API."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
from PIL import Image

from . import views
from .api import add_api, session_of
from .requests import MODEL, PRESETS
from .runner import Cancelled, Event, Step
from .suggestions import Examples
from .work import Finished, Workshop, sentence, thought

MAX_CALLS = 32  # of each way that wait or run at once; more wait in the queue of gradio
MEDIA_TYPES = ["image", "video"]
KINDS = {"Video": "video", "Image": "image", "The model decides": None}

Updates = dict[Any, Any]


@dataclass
class Drawer:
    """The components of the settings."""

    seed: gr.Number
    new_seed: gr.Checkbox
    preset: gr.Radio
    numbers: dict[str, gr.Textbox]
    negative: gr.Textbox

    @property
    def inputs(self) -> set[Any]:
        """Everything that a call reads."""
        return {self.seed, self.new_seed, self.preset, self.negative, *self.numbers.values()}

    def form(self, data: Updates) -> dict[str, Any]:
        """The settings by name, see [`make_request`]."""
        numbers = {name: data[component] for name, component in self.numbers.items()}
        return {"preset": data[self.preset], "negative_prompt": data[self.negative], **numbers}

    def chosen_seed(self, data: Updates) -> float | None:
        """The seed of the field, or `None` for a new one."""
        return None if data[self.new_seed] else data[self.seed]


@dataclass
class Way:
    """The components of a tab."""

    name: str
    prompt: Any
    stage: gr.HTML
    go: Any
    cancel: gr.Button
    download: gr.DownloadButton | None = None
    kind: gr.Radio | None = None
    source: gr.File | None = None
    buttons: list[gr.Button] = field(default_factory=list)


class Page:
    """
    Builds the page.

    Args:
        workshop: runs the calls.
        model: name of the model, for the heading.
        examples: prompts and sources that the page proposes.
    """

    def __init__(self, workshop: Workshop, model: str, examples: Examples) -> None:
        self.workshop, self.model, self.examples = workshop, model, examples
        width = workshop.presets["t2v"]["width"]
        self.look = ["ov-pixels"] if width <= 128 else []  # small pixels are shown as they are

    def build(self) -> gr.Blocks:
        """The whole page; `launch` serves it."""
        with gr.Blocks(
            title="Omni-Video",
            analytics_enabled=False,
            elem_classes=self.look,
            delete_cache=(3600, 86400),
        ) as blocks:
            gr.HTML(
                f'<header class="ov-head"><h1>Omni-Video</h1><p>One model generates, edits and understands images and '
                f"videos. This page runs <code>{views.text(self.model)}</code>. {views.text(self.examples.hint)}</p>"
                "</header>"
            )
            self.drawer = self._drawer()
            with gr.Tabs(elem_id="ways") as self.tabs:
                with gr.Tab("Create", id="create"):
                    create = self._create()
                with gr.Tab("Edit", id="edit"):
                    edit = self._edit()
                with gr.Tab("Ask", id="ask"):
                    ask = self._ask()
                with gr.Tab("Chat", id="chat"):
                    chat = self._chat()
                with gr.Tab("Gallery", id="gallery"):
                    self._gallery()
            for way in (create, edit, ask):
                self._connect(way)
            self._connect_chat(chat)
            self._connect_sources(create, edit, ask)
            add_api(self.workshop)
            blocks.unload(self._leave)
        return blocks.queue(default_concurrency_limit=MAX_CALLS)

    # --- components -------------------------------------------------------------------------------------------------

    def _drawer(self) -> Drawer:
        preset = self.workshop.presets["t2v"]
        labels = {
            "num_inference_steps": ("Steps", "Denoising steps"),
            "guidance_scale": ("Guidance scale", "1 turns guidance off"),
            "flow_shift": ("Flow shift", "Above 1, more steps are at high noise"),
            "width": ("Width", "Pixels"),
            "height": ("Height", "Pixels"),
            "num_frames": ("Frames", "4n+1"),
            "fps": ("Frames per second", "Of videos"),
        }
        with gr.Sidebar(label="Settings", position="right", open=False, width=300, elem_id="settings"):
            gr.Markdown("An empty field has the value of the model; grey numbers are those for videos.")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            new_seed = gr.Checkbox(
                True,
                label="New seed for every call",
                info="Off: the same call gives the same result",
                elem_id="new-seed",
            )
            chosen = gr.Radio(list(PRESETS), value=MODEL, label="Preset", elem_id="preset")
            numbers = {
                name: gr.Textbox(
                    label=label,
                    info=info,
                    placeholder=f"{preset[name]:g}",
                    max_lines=1,
                    elem_id=name.replace("_", "-"),
                )
                for name, (label, info) in labels.items()
            }
            negative = gr.Textbox(
                "", label="Negative prompt", info="Empty: the one stored in the model", elem_id="negative-prompt"
            )
        return Drawer(seed, new_seed, chosen, numbers, negative)

    def _create(self) -> Way:
        with gr.Row():
            with gr.Column(scale=5):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder=self.examples.prompts[0],
                    lines=3,
                    elem_id="create-prompt",
                    autofocus=True,
                )
                kind = gr.Radio(list(KINDS), value="Video", label="Result", elem_id="create-kind")
                go, cancel = self._go("Create", "create")
            with gr.Column(scale=6):
                stage = self._stage("create", "The result appears here.")
                with gr.Row():
                    download = gr.DownloadButton(
                        "Download", interactive=False, size="sm", min_width=90, elem_id="create-download"
                    )
                    buttons = [
                        gr.Button(title, size="sm", min_width=90, interactive=False, elem_id=f"create-to-{target}")
                        for title, target in (("Edit it", "edit"), ("Ask about it", "ask"))
                    ]
        _examples([[text, kind_label] for text, kind_label in self.examples.create], [prompt, kind])
        return Way("create", prompt, stage, go, cancel, download, kind=kind, buttons=buttons)

    def _edit(self) -> Way:
        with gr.Row():
            with gr.Column(scale=5):
                shown, source = self._source("edit")
                prompt = gr.Textbox(
                    label="Instruction", placeholder=self.examples.instructions[0], lines=2, elem_id="edit-prompt"
                )
                go, cancel = self._go("Edit", "edit")
            with gr.Column(scale=6):
                stage = self._stage(
                    "edit", "Source and result appear here, side by side, under a slider, and as difference."
                )
                with gr.Row():
                    download = gr.DownloadButton(
                        "Download", interactive=False, size="sm", min_width=90, elem_id="edit-download"
                    )
                    again = gr.Button(
                        "Edit the result", size="sm", min_width=90, interactive=False, elem_id="edit-to-edit"
                    )
                    asked = gr.Button(
                        "Ask about it", size="sm", min_width=90, interactive=False, elem_id="edit-to-ask"
                    )
        _examples([[path, text] for path, text in self.examples.edit], [source, prompt])
        source.change(self._show_source, [source], [shown], show_progress="hidden", api_visibility="private")
        return Way("edit", prompt, stage, go, cancel, download, source=source, buttons=[again, asked])

    def _ask(self) -> Way:
        with gr.Row():
            with gr.Column(scale=5):
                shown, source = self._source("ask")
                prompt = gr.Textbox(
                    label="Question", placeholder=self.examples.questions[0], lines=2, elem_id="ask-prompt"
                )
                go, cancel = self._go("Ask", "ask")
            with gr.Column(scale=6):
                stage = self._stage("ask", "The answer appears here.")
        _examples([[path, text] for path, text in self.examples.ask], [source, prompt])
        source.change(self._show_source, [source], [shown], show_progress="hidden", api_visibility="private")
        return Way("ask", prompt, stage, go, cancel, source=source)

    def _chat(self) -> Way:
        self.chatbot = gr.Chatbot(
            label="Conversation",
            height=480,
            elem_id="chat-messages",
            elem_classes=self.look,
            buttons=["copy"],
            feedback_options=None,
            placeholder="Ask for an image or a video, then for changes, or ask what it shows.",
        )
        stage = gr.HTML("", elem_id="chat-stage")
        box = gr.MultimodalTextbox(
            label="Message",
            placeholder=f"{self.examples.prompts[0]}   then:   {self.examples.instructions[0]}",
            file_types=MEDIA_TYPES,
            sources=["upload"],
            elem_id="chat-message",
        )
        with gr.Row():
            self.continues = gr.Checkbox(
                True,
                label="About the latest image or video",
                info="Off: the message starts anew",
                elem_id="chat-continues",
            )
            cancel = gr.Button(
                "Cancel", variant="stop", size="sm", min_width=90, interactive=False, elem_id="chat-cancel"
            )
            self.clear = gr.Button("New conversation", size="sm", min_width=90, elem_id="chat-clear")
        _examples([[{"text": text, "files": []}] for text in self.examples.chat], [box])
        return Way("chat", box, stage, box, cancel)

    def _gallery(self) -> None:
        self.shown_results = gr.Gallery(
            label="Results of this session",
            columns=4,
            object_fit="contain",
            height=420,
            interactive=False,
            elem_id="gallery-results",
            elem_classes=self.look,
            buttons=["download", "fullscreen"],
        )
        self.chosen_result = gr.State(-1)
        with gr.Row():
            self.gallery_buttons = [
                gr.Button(title, size="sm", elem_id=f"gallery-to-{target}")
                for title, target in (("Edit the chosen result", "edit"), ("Ask about it", "ask"))
            ]
        gr.Markdown(
            "The files are removed when this tab is closed. They record how they were made: `omni-video info FILE`."
        )

    def _go(self, title: str, name: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            go = gr.Button(title, variant="primary", scale=3, min_width=120, elem_id=f"{name}-go")
            cancel = gr.Button(
                "Cancel", variant="stop", scale=1, min_width=90, interactive=False, elem_id=f"{name}-cancel"
            )
        return go, cancel

    def _stage(self, name: str, message: str) -> gr.HTML:
        return gr.HTML(views.placeholder(message), elem_id=f"{name}-stage", elem_classes=self.look)

    def _source(self, name: str) -> tuple[gr.HTML, gr.File]:
        shown = gr.HTML(views.source(None), elem_id=f"{name}-shown", elem_classes=self.look)
        source = gr.File(
            label="Source", file_types=MEDIA_TYPES, type="filepath", height=120,
            elem_id=f"{name}-source",
        )  # fmt: skip
        return shown, source

    # --- events -----------------------------------------------------------------------------------------------------

    def _connect(self, way: Way) -> None:
        """Run a call when the button is pressed, or Enter in the text."""
        parts = [way.stage, way.go, way.cancel, self.drawer.seed, self.shown_results, way.download, *way.buttons]
        inputs = {way.prompt, *self.drawer.inputs, *(part for part in (way.kind, way.source) if part is not None)}

        def work(data: Updates, request: gr.Request) -> Iterator[Updates]:
            yield from self._work(way, data, request)

        gr.on(
            [way.go.click, way.prompt.submit],
            work,
            inputs,
            [part for part in parts if part is not None],
            show_progress="hidden",
            concurrency_limit=MAX_CALLS,
            api_visibility="private",
        )
        way.cancel.click(self._cancel, None, None, queue=False, show_progress="hidden", api_visibility="private")

    def _work(self, way: Way, data: Updates, request: gr.Request) -> Iterator[Updates]:
        session = session_of(request)
        yield {
            way.stage: views.progress(),
            way.go: gr.update(interactive=False),
            way.cancel: gr.update(interactive=True),
        }
        idle = {way.go: gr.update(interactive=True), way.cancel: gr.update(interactive=False)}
        try:
            asked = self.workshop.request(
                way.name,
                data[way.prompt],
                kind=None if way.kind is None else KINDS[data[way.kind]],
                source=None if way.source is None else data[way.source],
                seed=self.drawer.chosen_seed(data),
                form=self.drawer.form(data),
            )
            for shown in self._stages(self.workshop.run(asked, session)):
                if isinstance(shown, str):
                    yield {way.stage: shown}
                elif isinstance(shown, Cancelled):
                    yield {way.stage: views.cancelled(shown)} | idle
                else:
                    yield self._finished(way, shown, session) | idle
        except Exception as error:
            message = sentence(error)
            yield {way.stage: views.failure(message)} | idle
            raise gr.Error(escape(message), title="This call failed", print_exception=False) from None

    def _finished(self, way: Way, finished: Finished, session: str) -> Updates:
        """Show a result, offer it for download and further use, and add it to the gallery."""
        updates: Updates = {self.drawer.seed: finished.request.seed, self.shown_results: self._results(session)}
        if finished.path is None:
            return updates | {way.stage: views.answer(finished.request.prompt, finished.output, finished.seconds)}
        shown = views.result(finished.path, finished.output, finished.seconds)
        if way.name == "edit" and finished.request.source is not None:
            compared = self.workshop.files.compare(
                finished.request.source, finished.path, session, finished.request.settings
            )
            shown = views.comparison(compared, finished.output, finished.seconds, f"view-{uuid4().hex}")
        updates |= {way.stage: shown, way.download: gr.update(value=str(finished.path), interactive=True)}
        return updates | {button: gr.update(interactive=True) for button in way.buttons}

    def _stages(self, events: Iterator[Event | Finished]) -> Iterator[str | Cancelled | Finished]:
        """HTML of the progress of a call, and its last event."""
        preview: Image.Image | None = None
        for event in events:
            if isinstance(event, (Cancelled, Finished)):
                yield event
                continue
            if isinstance(event, Step):
                preview = event.preview or preview
            yield views.progress(event, preview)

    def _connect_chat(self, way: Way) -> None:
        inputs = {way.prompt, self.chatbot, self.continues, *self.drawer.inputs}

        def talk(data: Updates, request: gr.Request) -> Iterator[Updates]:
            yield from self._talk(way, data, request)

        def forget(request: gr.Request) -> list[Any]:
            self.workshop.session(session_of(request)).latest = None
            return []

        outputs = [self.chatbot, way.prompt, way.stage, way.cancel, self.drawer.seed, self.shown_results, self.clear]
        way.prompt.submit(
            talk, inputs, outputs, show_progress="hidden", concurrency_limit=MAX_CALLS, api_visibility="private"
        )
        way.cancel.click(self._cancel, None, None, queue=False, show_progress="hidden", api_visibility="private")
        self.clear.click(forget, None, [self.chatbot], show_progress="hidden", api_visibility="private")

    def _talk(self, way: Way, data: Updates, request: gr.Request) -> Iterator[Updates]:
        """One turn: the MLLM decides whether it generates, edits what the conversation is about, or answers."""
        name = session_of(request)
        session, message, history = self.workshop.session(name), data[way.prompt], list(data[self.chatbot] or [])
        files = [str(file) for file in message.get("files") or ()]
        if files:
            session.latest = files[-1]
        source = session.latest if files or data[self.continues] else None
        history += [{"role": "user", "content": {"path": path, "alt_text": "The source"}} for path in files]
        history.append({"role": "user", "content": message.get("text") or ""})
        idle = {
            way.prompt: gr.update(interactive=True), way.cancel: gr.update(interactive=False),
            self.clear: gr.update(interactive=True), way.stage: "",
        }  # fmt: skip
        yield {
            self.chatbot: history, way.prompt: gr.update(value=None, interactive=False),
            way.cancel: gr.update(interactive=True), self.clear: gr.update(interactive=False),
            way.stage: views.progress(),
        }  # fmt: skip
        try:
            asked = self.workshop.request(
                "chat",
                message.get("text"),
                source=source,
                seed=self.drawer.chosen_seed(data),
                form=self.drawer.form(data),
            )
            for shown in self._stages(self.workshop.run(asked, name)):
                if isinstance(shown, str):
                    yield {way.stage: shown}
                elif isinstance(shown, Cancelled):
                    history.append({"role": "assistant", "content": "Cancelled."})
                    yield {self.chatbot: history} | idle
                else:
                    history += _turn(shown)
                    session.latest = session.latest if shown.path is None else str(shown.path)
                    yield {
                        self.chatbot: history, self.drawer.seed: asked.seed, self.shown_results: self._results(name),
                    } | idle  # fmt: skip
        except Exception as error:
            history.append({"role": "assistant", "content": sentence(error)})
            yield {self.chatbot: history} | idle
            raise gr.Error(escape(sentence(error)), title="This call failed", print_exception=False) from None

    def _connect_sources(self, create: Way, edit: Way, ask: Way) -> None:
        """Send results to the tabs that edit them and ask about them."""
        sources: dict[str, Any] = {"edit": edit.source, "ask": ask.source}
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for button in (*create.buttons, *edit.buttons):
            target = _target(button)
            button.click(self._sender(target), None, [self.tabs, sources[target]], **hidden)
        self.shown_results.select(_chosen, None, [self.chosen_result], **hidden)
        for button in self.gallery_buttons:
            target = _target(button)
            button.click(self._sender(target), [self.chosen_result], [self.tabs, sources[target]], **hidden)

    def _sender(self, target: str) -> Callable[..., tuple[Any, str]]:
        """A function that opens a tab with a result of the session as source, by default the newest one."""

        def send(request: gr.Request, number: int = -1) -> tuple[Any, str]:
            results = self.workshop.session(session_of(request)).results
            if not results:
                raise gr.Error("There is no result yet: create one first.", title="No result", print_exception=False)
            return gr.Tabs(selected=target), str(results[number].path)

        return send

    def _results(self, session: str) -> list[tuple[str, str]]:
        return [(str(result.path), result.title) for result in self.workshop.session(session).results]

    def _show_source(self, path: str | None) -> str:
        return views.source(path)

    def _cancel(self, request: gr.Request) -> None:
        self.workshop.runner.cancel(session_of(request))

    def _leave(self, request: gr.Request) -> None:
        self.workshop.leave(session_of(request))


def _turn(finished: Finished) -> list[dict[str, Any]]:
    """Messages of the model: what it thought, and its image, video or answer."""
    thoughts = {
        "role": "assistant",
        "content": thought(finished),
        "metadata": {"title": "Thought", "duration": round(finished.seconds, 1)},
    }
    if finished.path is None:
        words = finished.output.text[0] if finished.output.text else ""
        return [thoughts, {"role": "assistant", "content": words or "The answer of the model is empty."}]
    alt = f"{finished.request.prompt} (seed {finished.request.seed})"
    shown = {"role": "assistant", "content": {"path": str(Path(finished.path)), "alt_text": alt}}
    notes = [{"role": "assistant", "content": note} for note in finished.output.notes]
    return [thoughts, shown, *notes]


def _examples(rows: list[list[Any]], inputs: list[Any]) -> None:
    """Rows that fill the fields when they are pressed; nothing without rows."""
    if rows:
        gr.Examples(rows, inputs, label="Examples", api_visibility="private")


def _target(button: gr.Button) -> str:
    """Tab that a button sends a result to: the end of its name in the page."""
    return str(button.elem_id).rpartition("-")[2]


def _chosen(event: gr.SelectData) -> int:
    """Number of the result that was chosen in the gallery."""
    return int(event.index)


__all__ = ["Page"]
