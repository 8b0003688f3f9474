"""Command-line options that several groups of commands share: dtype, revision, token, verbose."""

from enum import StrEnum
from typing import Annotated

import typer

from .checks import checked_token


class Dtype(StrEnum):
    """Dtype of the weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Token = Annotated[
    str | None, typer.Option(envvar="HF_TOKEN", show_envvar=False, callback=checked_token, help="Hub token.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show messages of the libraries, and the traceback of an error.")
]

__all__ = ["Dtype", "Revision", "Token", "Verbose"]
