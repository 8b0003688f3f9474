"""
The settings of `omni-video train --help`, with types, defaults and explanations.

They are parsed from the source files of the dataclasses, because importing transformers takes seconds.
"""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parents[1] / "training"


class Setting(NamedTuple):
    """One setting: name, type and default as in the source file, and its explanation."""

    name: str
    type: str
    default: str
    help: str


def settings_of_runs() -> dict[str, list[Setting]]:
    """All settings of a training run, grouped by the class that defines them, those of this package first."""
    transformers = find_spec("transformers")
    if transformers is None or not transformers.submodule_search_locations:
        raise ImportError("The package transformers is not installed: run `pip install 'omni-video-hf[train]'`.")
    theirs = Path(transformers.submodule_search_locations[0]) / "training_args.py"
    ours = read_settings(HERE / "arguments.py", "OmniVideoTrainingArguments")
    names = {setting.name for setting in ours}
    return {
        "Run": read_settings(HERE / "recipe.py", "RunArguments"),
        "Training": ours,
        "transformers' TrainingArguments": [
            setting for setting in read_settings(theirs, "TrainingArguments") if setting.name not in names
        ],
    }


def read_settings(path: Path, name: str) -> list[Setting]:
    """
    Parse the fields of a dataclass from its source file.

    Args:
        path: file that defines the class.
        name: name of the class.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    explained = _explanations(ast.get_docstring(found) or "")
    settings = []
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id[0] == "_":
            continue
        default, text, is_setting = _default(node.value)
        if default.isidentifier() and default not in ("True", "False", "None", "required", "list", "dict"):
            default = "chosen by installed versions"  # a name that gets its value when the class is created
        if is_setting and not ast.unparse(node.annotation).startswith("ClassVar"):
            name = node.target.id
            settings.append(Setting(name, ast.unparse(node.annotation), default, explained.get(name) or text))
    return settings


def _default(value: ast.expr | None) -> tuple[str, str, bool]:
    """Default and help of a field as in the source file, and whether users can set it."""
    if value is None:
        return "required", "", True
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return ast.unparse(value), "", True
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    text, metadata, init = "", given.get("metadata"), given.get("init")
    if isinstance(metadata, ast.Dict):
        for key, entry in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help":
                text = _text(entry)
    is_setting = not (isinstance(init, ast.Constant) and init.value is False)
    default = given.get("default", given.get("default_factory"))
    return ("required" if default is None else ast.unparse(default)), text, is_setting


def _text(node: ast.expr) -> str:
    """Text of a string literal, also one in several pieces; empty for any other expression."""
    try:
        return str(ast.literal_eval(node))
    except ValueError:
        return ""


def _explanations(docstring: str) -> dict[str, str]:
    """The explanation of each name in the `Args:` of a docstring, or in the parameter list of transformers."""
    texts: dict[str, list[str]] = {}
    name, level = None, 0
    for line in docstring.splitlines():
        if line.strip() in ("Args:", "Raises:", "Returns:"):
            name = None
            continue
        start = re.match(r"( *)(\w+)(?: \(.*\))?:(?: (.*))?$", line)
        indent = len(line) - len(line.lstrip())
        if start and (name is None or indent <= level):
            name, level = start[2], indent
            texts[name] = [start[3] or ""]
        elif name is not None and line.strip() and indent > level:
            texts[name].append(line.strip())
        elif line.strip():
            name = None
    return {name: " ".join(" ".join(lines).split()) for name, lines in texts.items()}


__all__ = ["Setting", "read_settings", "settings_of_runs"]
