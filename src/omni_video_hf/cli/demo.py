"""The commands `demo` and `push-space`: their flags. The code behind them is imported when they run."""

import socket
import threading
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

from ..shapes import CHECKPOINT_NAME
from ..utils.names import is_repository_name
from .checks import SHAPES, Loading, check_repository, place_of
from .console import UsageProblem, one_line_errors, result, start_libraries
from .options import Dtype, Revision, Token, Verbose

FIRST_PORT = 7860  # of gradio; without `--port`, the first free one from here

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Folder of a model, or its Hub repository.",
        envvar="OMNI_VIDEO_MODEL",
        show_default=CHECKPOINT_NAME,
    ),
]


def demo_command(
    model: Model = SHAPES,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public address, through a server of gradio.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help=f"Port. Default: the first free one from {FIRST_PORT}."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights. Default: as stored.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, mps, cpu ... Default: cuda, else mps, else cpu.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="24GB, 16GB, 12GB or 8GB: dtype and offloading for such an accelerator.")
    ] = None,
    lora: Annotated[
        str | None, typer.Option(help="LoRA file or repository, or JSON arguments of load_lora_weights.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Open a page in the browser to create, edit, ask and chat. It needs `pip install 'omni-video-hf[demo]'`.

    The page works without internet. Ctrl-C stops it.
    """
    with one_line_errors(verbose, light=True):
        check_memory(memory)
        loading = Loading(model, dtype, device, None, memory, None, lora, revision, token)
        check_gradio()
        check_port(host, port)
        start_libraries(verbose)
        generation = import_module(".generation", __package__)
        pipe = generation.load(loading, generation.Printing(quiet=True))
        name = CHECKPOINT_NAME if loading.place == SHAPES else loading.model
        page = import_module("..demo.launch", __package__).make_demo(pipe, name)
        _, local, public = page.launch(
            share=share, server_name=host, server_port=port, inbrowser=open_browser, prevent_thread_lock=True
        )
        result(f"The page is at {public or local}")
        try:
            threading.Event().wait()  # until Ctrl-C
        finally:
            with suppress(Exception):
                page.blocks.close(verbose=False)


def check_memory(memory: str | None) -> None:
    """Refuse a name that is no memory profile."""
    names = ("24GB", "16GB", "12GB", "8GB")
    if memory is not None and memory not in names:
        raise UsageProblem(f"`--memory {memory}` must be one of {', '.join(names)}.")


def check_gradio() -> None:
    """Refuse to load a model for a page that cannot be served."""
    if find_spec("gradio") is None:
        raise ImportError(
            "The package gradio, which serves the page, is missing: run `pip install 'omni-video-hf[demo]'`."
        )


def check_port(host: str, port: int | None) -> None:
    """Refuse a port that is in use, before a model is loaded."""
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageProblem(
                f"`--port {port}` cannot be used on {host} ({error.strerror}): choose another port, or leave it out."
            ) from error


def push_space_command(
    target: Annotated[str, typer.Argument(help="Space on the Hub, `owner/name`; created if it does not exist.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Hub repository that the page loads.", show_default=CHECKPOINT_NAME)
    ] = CHECKPOINT_NAME,
    private: Annotated[bool | None, typer.Option(help="Whether a new Space is private.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Title of the commit or pull request.")] = None,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """
    Push the page of `omni-video demo` to a Space of the Hub, in one commit.

    The Space contains the code of this package, so that it runs what this command was run with. Files of the Space
    that this command did not write stay.
    """
    with one_line_errors(verbose, light=True):
        if not is_repository_name(target):
            raise UsageProblem(f"`TARGET` must be a Space on the Hub, `owner/name`, got {target}.")
        if model != CHECKPOINT_NAME:
            check_repository(model)
            if not is_repository_name(model):
                raise UsageProblem(
                    f"`--model {place_of(model)}` is a folder of this machine, which a Space cannot read: push it "
                    "with `omni-video push`, and pass its name on the Hub."
                )
        start_libraries(verbose)
        spaces = import_module("..demo.space", __package__)
        commit = spaces.push_space(
            target, model, private=private, create_pr=create_pr, commit_message=message, token=token
        )
        result(commit.pr_url or commit.commit_url)


__all__ = ["check_gradio", "check_port", "demo_command", "push_space_command"]
