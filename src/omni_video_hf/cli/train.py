"""The command `train`: its flags, the long help, training and `--export`."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .checks import check_repository, place_of
from .console import as_usage

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}

Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        help="Recipe: a YAML file, or one of align, connect_text, connect, joint, decoder, understand, lora.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the last complete checkpoint, if there is one.")]


EXPORT = "--export"


class TrainCommand(TyperCommand):
    """A command whose help also lists every setting of recipes and command line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the options, then the settings, which are parsed from source files without importing torch."""
        super().format_help(ctx, formatter)
        typer.echo(
            f"\nWith {EXPORT} RUN/checkpoint-N DIR, nothing is trained: a checkpoint is exported as a pipeline."
        )
        for title, settings in import_module(".train_help", __package__).settings_of_runs().items():
            typer.echo(f"\n{title}, as `--name value` or in a recipe:\n")
            for setting in settings:
                typer.echo(f"  --{setting.name}  {setting.type} = {setting.default}")
                if setting.help:
                    typer.echo(fill(setting.help, 116, initial_indent="      ", subsequent_indent="      "))


def train(config: str | None, overrides: Sequence[str]) -> Path | None:
    """
    Train with a recipe, see `training.recipe.read_recipe` and `training.train.train`.

    With `--export CHECKPOINT DIR` among the overrides nothing is trained, and a pipeline is written; see
    `training.checkpointing.export.export_checkpoint`.

    Args:
        config: name or file of the recipe.
        overrides: settings as words of the command line, such as `--learning_rate`, `1e-5`.

    Returns:
        The folder with the result on the main process, `None` on the others.
    """
    if EXPORT in overrides:
        return _export(config, list(overrides))
    with as_usage():
        if config is None:
            raise ValueError(
                "`--config` is missing: pass a recipe, such as `--config lora`; see `omni-video train --help`."
            )
        run, arguments = import_module("..training.recipe", __package__).read_recipe(config, overrides)
        check_repository(run.model)
    run.model = place_of(run.model)
    folder = import_module("..training.train", __package__).train(run, arguments)
    return folder if arguments.process_index == 0 else None


def _export(config: str | None, words: list[str]) -> Path:
    """Write the pipeline of a checkpoint. `words` contain `--export CHECKPOINT DIR` and optional settings."""
    place = words.index(EXPORT)
    given = words[place + 1 : place + 3]
    with as_usage():
        settings = import_module("..training.recipe", __package__).overridden({}, words[:place] + words[place + 3 :])
        unknown = sorted(set(settings) - {"model", "revision", "result_dtype"} | ({"config"} if config else set()))
        if len(given) < 2 or any(word.startswith("--") for word in given) or unknown:
            problem = f" It does not accept {', '.join(f'--{name}' for name in unknown)}." if unknown else ""
            raise ValueError(
                "Use `--export` as in `omni-video train --export RUN/checkpoint-N DIR`; `--model`, `--revision` and "
                f"`--result_dtype` are optional.{problem}"
            )
        base = settings.get("model")
        if base is not None:
            check_repository(base)
            base = place_of(base)
    export = import_module("..training.checkpointing.export", __package__).export_checkpoint
    return export(*given, base=base, revision=settings.get("revision"), dtype=settings.get("result_dtype", "float32"))
