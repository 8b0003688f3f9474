"""Recipes: a training run as one YAML file, with every key known and every value said."""

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
    What a run is made of, beside the settings of its training.

    Args:
        model: folder or Hub repository to start from.
        data: feature cache, or several (see docs/data.md), of `omni-video precompute` or `import-features`.
        questions: table with questions and answers (see docs/data.md), read as they are, beside `data` or alone;
            those in a cache count as well.
        eval_data: feature cache, or several, for evaluation.
        task_weights: share of the batches by task, e.g. `{t2v: 2, understand: 1}`; by default every sample once.
        stopping_strategy: with weights, what ends an epoch: `first_exhausted` or `all_exhausted`.
        check_data: read every tensor before training; may be off for data that were checked before.
        on_bad_data: `stop` with a list of all samples that cannot be used, or `skip` to leave them out and count them.
        revision: of the Hub repository.
        resume: go on from the last complete checkpoint of `output_dir`, if there is one.
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
            raise ValueError("`model` is missing: name it in the recipe, or pass `--model ...`.")
        if not self.data and not self.questions:
            raise ValueError(
                "`data` is missing: name a feature cache in the recipe or with `--data ...`, or a table of questions "
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
        config: a YAML file, or the name of a recipe of the package.
        overrides: command line words, `--key value`, `--key=value` or `--key` for true; `--losses.alignment cosine`
            reaches into a mapping.

    Raises:
        ValueError: for a file that is not there or not a mapping, for keys that nothing knows, and for values of
            another type than their setting's.
    """
    path = Path(config) if str(config).endswith((".yaml", ".yml")) else RECIPES / f"{config}.yaml"
    if not path.is_file():
        raise ValueError(f"{config}: no such file, and no recipe of the package ({', '.join(shipped_recipes())}).")
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of settings, got {type(values).__name__}.")
    run_types = {field.name: field.type for field in fields(RunArguments)}
    types = {field.name: field.type for field in fields(OmniVideoTrainingArguments) if field.init} | run_types
    check_known(path.name, values, types)
    values = overridden(values, overrides)
    check_known("command line", values, types)
    values = {name: _meant(value, types[name]) for name, value in values.items()}
    for name, value in values.items():
        check_setting(name, value, types[name])
    run = RunArguments(**{name: value for name, value in values.items() if name in run_types})
    training = {name: value for name, value in values.items() if name not in run_types}
    if "output_dir" not in training:
        raise ValueError("`output_dir` is missing: name it in the recipe, or pass `--output_dir ...`.")
    # By default transformers ties the progress bar to the verbosity of its log.
    return run, OmniVideoTrainingArguments(**({"disable_tqdm": False} | training))


def overridden(values: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Settings with those of command line words in their place, as in [`read_recipe`]."""
    values = dict(values)
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r}: settings are given as `--key value`.")
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
            value = dict(values.get(outer) or {}) | {inner: _meant(value, "float | bool")}
        values[outer] = value
    return values


class _WithoutAliases(yaml.SafeLoader):
    """YAML in which every value is written where it is: a few lines of aliases can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As in PyYAML; an alias (`*name`) is an error."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias `*{event.anchor}` is not read: write its value out", event.start_mark
            )
        return super().compose_node(parent, index)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _WithoutAliases)  # noqa: S506 - a SafeLoader


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _meant(value: Any, kind: Any) -> Any:
    """YAML reads 1e-5 as text, for want of a dot, and `no` as false where `save_strategy: no` means the word."""
    if isinstance(value, bool) and "bool" not in str(kind) and "str" in str(kind):
        return "yes" if value else "no"
    if isinstance(value, str) and "float" in str(kind):
        try:
            return float(value)
        except ValueError:
            return value
    return value
