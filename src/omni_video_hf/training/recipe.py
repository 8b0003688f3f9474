"""Recipes: the settings of a training run as one YAML file, with overrides from the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..tasks import TASKS
from ..utils.names import check_known
from .arguments import OmniVideoTrainingArguments
from .data.bad_data import ON_BAD_DATA
from .data.batch_sampler import STOPPING_STRATEGIES
from .setting_types import check_setting

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class RunArguments:
    """
    Model and data of a training run; the settings of the training are in [`OmniVideoTrainingArguments`].

    Args:
        model: folder or Hub repository of the model before the training.
        data: feature cache, or several (see docs/data.md), of `omni-video precompute` or `import-features`.
        questions: table with questions and answers (see docs/data.md) without precomputed features, in addition to
            `data` or alone.
        eval_data: feature cache, or several, for evaluation.
        task_weights: share of the batches by task, e.g. `{t2v: 2, understand: 1}`. Default: every sample once.
        stopping_strategy: with `task_weights`, the end of an epoch: `first_exhausted` or `all_exhausted`.
        check_data: read every tensor before training; can be off for data that were checked before.
        on_bad_data: `stop` with a list of all samples that cannot be used, or `skip` to leave them out and count them.
        revision: branch, tag or commit of the Hub repository.
        resume: resume from the last complete checkpoint of `output_dir`, if there is one.
    """

    model: str | None = None
    data: str | list[str] | None = None
    questions: str | None = None
    eval_data: str | list[str] | None = None
    task_weights: dict[str, float] | None = None
    stopping_strategy: str = "first_exhausted"
    check_data: bool = True
    on_bad_data: str = "stop"
    revision: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("`model` is missing: set it in the recipe, or pass `--model ...`.")
        if not self.data and not self.questions:
            raise ValueError(
                "`data` is missing: set a feature cache in the recipe or with `--data ...`, or a table of questions "
                "with `--questions ...`."
            )
        check_known("on_bad_data", [self.on_bad_data], ON_BAD_DATA)
        check_known("stopping_strategy", [self.stopping_strategy], STOPPING_STRATEGIES)
        if self.task_weights is not None:
            check_known("task_weights", self.task_weights, TASKS)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(config: str | Path, overrides: Sequence[str] = ()) -> tuple[RunArguments, OmniVideoTrainingArguments]:
    """
    Read a recipe.

    Args:
        config: a YAML file, or the name of a recipe in the package.
        overrides: words of the command line: `--key value`, `--key=value`, or `--key` for true; `--losses.alignment
            cosine` sets an entry of a mapping.

    Raises:
        ValueError: for a file that does not exist or is not a mapping, unknown keys, and values of a wrong type.
    """
    path = Path(config) if str(config).endswith((".yaml", ".yml")) else RECIPES / f"{config}.yaml"
    if not path.is_file():
        raise ValueError(
            f"{config}: no such file, and no recipe of the package. Pass a YAML file, or one of "
            f"{', '.join(shipped_recipes())}."
        )
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe must be a mapping of settings, got {type(values).__name__}.")
    run_types = {field.name: field.type for field in fields(RunArguments)}
    types = {field.name: field.type for field in fields(OmniVideoTrainingArguments) if field.init} | run_types
    check_known(path.name, values, types)
    values = overridden(values, overrides)
    check_known("command line", values, types)
    values = {name: _corrected(value, types[name]) for name, value in values.items()}
    for name, value in values.items():
        check_setting(name, value, types[name])
    run = RunArguments(**{name: value for name, value in values.items() if name in run_types})
    training = {name: value for name, value in values.items() if name not in run_types}
    if "output_dir" not in training:
        raise ValueError("`output_dir` is missing: set it in the recipe, or pass `--output_dir ...`.")
    # By default the log level of transformers decides whether it shows a progress bar.
    return run, OmniVideoTrainingArguments(**({"disable_tqdm": False} | training))


def overridden(values: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Replace settings by overrides from the command line, see [`read_recipe`]."""
    values = dict(values)
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r}: settings must be passed as `--key value`.")
        key, given, text = word[2:].partition("=")
        if not given:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        outer, _, inner = key.replace("-", "_").partition(".")
        try:
            value = _load_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problem = getattr(error, "problem", None) or _reason(error)
            raise ValueError(
                f"`--{key} {text}`: not YAML ({problem}): put texts with `:`, `?`, `,` or brackets in quotes."
            ) from error
        if inner:
            if not isinstance(values.get(outer) or {}, dict):
                raise ValueError(f"`--{key}`: `{outer}` is not a mapping in the recipe.")
            value = dict(values.get(outer) or {}) | {inner: _corrected(value, "float | bool")}
        values[outer] = value
    return values


class _WithoutAliases(yaml.SafeLoader):
    """YAML in which every value is written where it is: a few lines of aliases can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As in PyYAML; an alias (`*name`) is an error."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias `*{event.anchor}` is not allowed: write its value", event.start_mark
            )
        return super().compose_node(parent, index)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _WithoutAliases)  # noqa: S506 - a SafeLoader


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _corrected(value: Any, kind: Any) -> Any:
    """Correct values that YAML reads differently: `1e-5`, which it reads as text, and the word `no`, as false."""
    if isinstance(value, bool) and "bool" not in str(kind) and "str" in str(kind):
        return "yes" if value else "no"
    if isinstance(value, str) and "float" in str(kind):
        try:
            return float(value)
        except ValueError:
            return value
    return value
