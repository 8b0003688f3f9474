"""What `omni-video train` takes and does."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from ..cli_checks import check_repository, place_of
from ..cli_console import as_usage

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}

Config = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        help="Recipe: a YAML file, or a shipped one: align, connect_text, connect, joint, decoder, lora.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint, if there is one.")]


def train(config: str, overrides: Sequence[str]) -> Path | None:
    """
    Run a recipe (see `recipe.read_recipe` and `run.train`), importing the trainer only now.

    Returns:
        The folder with the outcome on the main process, `None` on the others.
    """
    with as_usage():
        run, arguments = import_module(".recipe", __package__).read_recipe(config, overrides)
        check_repository(run.model)
    run.model = place_of(run.model)
    folder = import_module(".run", __package__).train(run, arguments)
    return folder if arguments.process_index == 0 else None
