"""Build the page for a pipeline, and serve it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..shapes import CHECKPOINT_NAME
from .files import SessionFiles
from .page import Page
from .runner import Runner
from .style import CSS, SCRIPT, theme
from .suggestions import plain_examples, shapes_examples
from .work import Workshop


@dataclass(frozen=True)
class Demo:
    """A page that can be served. Args: blocks: gradio's page; workshop: what runs the calls behind it."""

    blocks: gr.Blocks
    workshop: Workshop

    def launch(self, **options: Any) -> tuple[Any, str, str]:
        """
        Serve the page. Nothing is sent to or loaded from other servers, unless `share=True`.

        Args:
            options: of gradio's `launch`, such as `share`, `server_name` and `server_port`.

        Returns:
            gradio's server, the local address, and the public address of `share=True`.
        """
        own: dict[str, Any] = {
            "theme": theme(),
            "css": CSS,
            "head": SCRIPT,
            "allowed_paths": [str(self.workshop.files.folder)],
            "footer_links": ["api"],
            "run_history": False,
            "ssr_mode": False,
            "max_threads": 200,  # a call that waits for its turn holds a thread
            "quiet": True,
        }
        return self.blocks.launch(**own | options)


def make_demo(
    pipe: OmniVideoPipeline, model: str = CHECKPOINT_NAME, on_gpu: Callable[[Callable], Callable] | None = None
) -> Demo:
    """
    Build the page for a pipeline.

    Args:
        pipe: a pipeline with all its components, on its device.
        model: name of the model, for the heading and the records of the files.
        on_gpu: decorator of the one function that needs the GPU, such as `spaces.GPU(duration=120)`.

    Raises:
        ValueError: for a pipeline that cannot generate.
    """
    if pipe.transformer is None or pipe.vae is None:
        raise ValueError("`pipe` cannot generate: load it with `transformer` and `vae`.")
    pipe.set_progress_bar_config(disable=True)
    files = SessionFiles(model)
    workshop = Workshop(Runner(pipe), files, on_gpu)
    examples = shapes_examples(files.folder) if model == CHECKPOINT_NAME else plain_examples()
    return Demo(Page(workshop, model, examples).build(), workshop)


__all__ = ["Demo", "make_demo"]
