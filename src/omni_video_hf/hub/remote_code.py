"""
Remote code: export the package's code into a repository, so that `trust_remote_code=True` works without the package.

The package has folders, but the code of a repository must be flat, because of how the two libraries copy it
(transformers 5.23, `dynamic_module_utils`; diffusers 0.42.1, `dynamic_modules_utils`):

- Both search for `from .name import` with a regular expression and copy the file `name.py` beside the importing file.
  `from ..name import` and `from . import name` do not work.
- transformers follows these imports recursively. diffusers follows only those of the entry file, stores the code of
  all local repositories in one folder, and runs the entry file again for every component.

Therefore the modules of each folder are joined into one file, whose name ends in the hash of all code. The entry file
imports every file and defines nothing. The code is at the root of the repository, once:

    omni_video_hf_entry_<hash>.py              the file that Auto classes and diffusers open
    omni_video_hf_models_<hash>.py             the modules of `omni_video_hf/models/`, and so on for other folders
    adapter/omni_video_hf_component_<hash>.py  where diffusers searches the class of a component: imports from the root

The export is the closure of `EXPORTS`: the modules of the exported classes, and all modules that these import with a
relative import. Modules for pushing, model cards and memory profiles are imported absolutely and not exported.

Code that was itself loaded from a repository exports itself, so that a fine-tuned model keeps the code of its base.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..utils.files import write_text

__version__ = "0.1.0"

PACKAGE = "omni_video_hf"
ENTRY, COMPONENT_ENTRY = f"{PACKAGE}_entry", f"{PACKAGE}_component"
# Classes that the entry file provides, and the modules that define them.
EXPORTS = {
    "OmniVideoConfig": "models.configuration_omni_video",
    "OmniVideoForConditionalGeneration": "models.modeling_omni_video",
    "OmniVideoAdapter": "models.connectors",
    "OmniVideoProcessor": "processing.processing_omni_video",
    "OmniVideoPipeline": "pipelines.pipeline_omni_video",
    "OmniVideo2Adapter": "models.connectors_2",
    "OmniVideo2Processor": "processing.processing_omni_video_2",
    "OmniVideo2Pipeline": "pipelines.omni_video_2.pipeline_omni_video_2",
}
# Components of the pipeline that are classes of this project.
COMPONENT_CLASSES = {
    "processor": "OmniVideoProcessor",
    "mllm": "OmniVideoForConditionalGeneration",
    "adapter": "OmniVideoAdapter",
}
PIPELINE_CLASS = "OmniVideoPipeline"
# The same by class of pipeline. The MLLM of Omni-Video 2 is a stock model of transformers.
PIPELINE_COMPONENTS: dict[str, dict[str, str]] = {
    PIPELINE_CLASS: COMPONENT_CLASSES,
    "OmniVideo2Pipeline": {
        "processor": "OmniVideo2Processor",
        "adapter": "OmniVideo2Adapter",
        "adapter_2": "OmniVideo2Adapter",
    },
}
# Classes for the Auto classes of transformers, in `config.json` at the root. `AutoModel` needs its own entry.
AUTO_MAP = {
    "AutoConfig": "OmniVideoConfig",
    "AutoModel": "OmniVideoForConditionalGeneration",
    "AutoModelForImageTextToText": "OmniVideoForConditionalGeneration",
    "AutoModelForMultimodalLM": "OmniVideoForConditionalGeneration",
    "AutoProcessor": "OmniVideoProcessor",
}

SUFFIX = r"_[0-9a-f]{8}"
# Files that version 0.1.0 wrote: one per module, in the folder of every component.
_MODULES_0_1_0 = (
    r"(?:attention|flow_matching|guidance|lora|losses|media|media_reading|memory|model_card|pipeline_loading|publishing"
    r"|remote_code|repository|saving|settings|source|configuration|modeling|pipeline|processing)_omni_video"
    r"|configuration_vila|modeling_vila|modeling_omni_video_connectors|omni_video|omni_video_pipeline"
)
CODE_FILE = re.compile(rf"(?:{PACKAGE}_\w+|{_MODULES_0_1_0}){SUFFIX}\.py")


def code_files() -> dict[str, str]:
    """
    Name and text of every code file at the root of a repository; the entry file is the last one.

    Raises:
        ValueError: if an exported module imports a name from a package instead of a module, or if two modules of one
            folder define the same name.
        FileNotFoundError: if this code was loaded from a repository in which a file is missing.
    """
    here = Path(__file__)
    if own := re.fullmatch(rf"{PACKAGE}_\w+({SUFFIX})\.py", here.name):  # this code was loaded from a repository
        entry = here.with_name(f"{ENTRY}{own[1]}.py").read_text(encoding="utf-8")
        names = re.findall(r"^from \.(\w+) import __name__", entry, flags=re.MULTILINE)
        files = {f"{name}.py": here.with_name(f"{name}.py").read_text(encoding="utf-8") for name in names}
        return files | {f"{ENTRY}{own[1]}.py": entry}
    return dict(_exported(tuple(_closure(here.parents[1], EXPORTS.values()))))


@lru_cache(maxsize=1)  # a process saves often, and its code seldom changes
def _exported(modules: tuple["_Module", ...]) -> dict[str, str]:
    """The files of these modules and the entry file."""
    sources = {module.name: module.source for module in modules}
    digest = hashlib.sha256(json.dumps([__version__, EXPORTS, sources], sort_keys=True).encode()).hexdigest()
    suffix = f"_{digest[:8]}"
    files = {}
    for bundle in sorted({module.bundle for module in modules}):
        together = [module for module in modules if module.bundle == bundle]
        files[f"{_file_name(bundle, suffix)}.py"] = _bundle_text(together, suffix)
    names = [name.removesuffix(".py") for name in files]
    return files | {f"{ENTRY}{suffix}.py": _entry_text(names, suffix)}


def write_remote_code(directory: Path) -> None:
    """
    Write the code into a repository, and references to it into its index and configurations.

    Writes the code files at the root, one file into each component folder that needs it, the classes in
    `model_index.json`, and `auto_map`. Code files of an earlier save with another version are removed. A second call
    changes nothing.

    Args:
        directory: repository with all its components.
    """
    files = code_files()
    suffix = re.sub(rf"{ENTRY}({SUFFIX})\.py", r"\1", list(files)[-1])
    component = {f"{COMPONENT_ENTRY}{suffix}.py": _component_text(suffix)}
    classes = PIPELINE_COMPONENTS[pipeline_class(directory)]
    folders = [directory / name for name in classes if (directory / name).is_dir()]
    outdated: list[Path] = []
    for folder, wanted in ((directory, files), *((folder, component) for folder in folders)):
        outdated += [path for path in folder.glob("*.py") if path.name not in wanted and is_written_code(path)]
        for name, text in wanted.items():
            write_text(folder / name, text)
    _write_model_index(directory, suffix)
    models = {name: f"{ENTRY}{suffix}.{cls}" for name, cls in AUTO_MAP.items() if name != "AutoProcessor"}
    for folder in (directory, *([directory / "mllm"] if "mllm" in classes else [])):
        _update_json(folder / "config.json", auto_map=models)
    for folder in (directory, directory / "processor"):
        processor = {"AutoProcessor": f"{ENTRY}{suffix}.{classes['processor']}"}
        _update_json(folder / "processor_config.json", auto_map=processor)
    for path in outdated:  # last, because other files refer to them before
        path.unlink(missing_ok=True)


def pipeline_class(directory: Path) -> str:
    """Class of the pipeline of a repository; that of version 1 where `model_index.json` names none of this project."""
    path = directory / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    name = index.get("_class_name") if isinstance(index, dict) else None
    name = name[-1] if isinstance(name, list) and name else name
    return name if isinstance(name, str) and name in PIPELINE_COMPONENTS else PIPELINE_CLASS


def is_written_code(path: Path) -> bool:
    """Whether a file is code that saving wrote, from its name and its first line."""
    if CODE_FILE.fullmatch(path.name) is None or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(200).startswith(f"# {PACKAGE} ".encode())


def import_from_package(module: str) -> ModuleType:
    """
    Import a module that repositories do not contain, such as `"hub.push"`, from the installed package.

    Raises:
        ImportError: if this code was loaded from a repository and the package is not installed.
    """
    try:
        return import_module(f"{PACKAGE}.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != PACKAGE:
            raise
        raise ImportError(
            f"This needs `{PACKAGE}.{module}`, which the code in a repository does not contain: run `pip install "
            "omni-video-hf`."
        ) from error


# --- texts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """A module to export."""

    name: str  # dotted, under the package
    source: str
    imports: tuple[
        tuple[ast.ImportFrom, str], ...
    ]  # statements that import from the package, and the imported modules

    @property
    def bundle(self) -> str:
        """The folder of the module; all modules of a folder are exported in one file."""
        return self.name.partition(".")[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)


def _file_name(bundle: str, suffix: str) -> str:
    """Name, without `.py`, of the file into which the modules of a folder are exported."""
    return f"{PACKAGE}_{bundle}{suffix}"


def _entry_text(files: list[str], suffix: str) -> str:
    lines = [
        f"# {PACKAGE} {__version__}, written when saving; edits get lost.",
        '"""What Auto classes and diffusers open. Defines nothing: diffusers runs it again for every component."""',
        "",
        *(f"from .{name} import __name__ as _  # noqa: F401" for name in files),
        *(
            f"from .{_file_name(module.partition('.')[0], suffix)} import {name}  # noqa: F401"
            for name, module in EXPORTS.items()
        ),
        "",
    ]
    return "\n".join(lines)


def _component_text(suffix: str) -> str:
    names = sorted({name for classes in PIPELINE_COMPONENTS.values() for name in classes.values()})
    files = {name: _file_name(EXPORTS[name].partition(".")[0], suffix) for name in names}
    lines = [
        f"# {PACKAGE} {__version__}, written when saving; edits get lost.",
        '"""Where diffusers looks for the class of a component. The code lies at the root, which is loaded before."""',
        "",
        "from importlib import import_module  # diffusers would look for the file of a `from .x import y` in here",
        "",
        *(f'{name} = import_module(".{file}", __package__).{name}' for name, file in files.items()),
        "",
    ]
    return "\n".join(lines)


def _bundle_text(modules: list[_Module], suffix: str) -> str:
    """Join the modules of a folder into one file, in the order in which they import each other."""
    _check_names(modules)
    digest = hashlib.sha256("".join(module.source for module in modules).encode()).hexdigest()[:16]
    names = ", ".join(module.name for module in modules)
    text = f"# {PACKAGE} {__version__}, sha256 {digest}. Written when saving; edits get lost.\n# Modules: {names}\n"
    for module in _in_order(modules):
        text += f"\n# ---- {module.name.replace('.', '/')}.py\n\n{_flattened(module, suffix)}"
    return text


def _flattened(module: _Module, suffix: str) -> str:
    """Rewrite the imports of a module for its exported file, which contains all modules of the folder."""
    lines = module.source.splitlines(keepends=True)
    for node, target in module.imports:
        indent, bundle = lines[node.lineno - 1][: node.col_offset], target.partition(".")[0]
        if bundle != module.bundle:
            imported = lines[node.lineno - 1].split(" import", 1)[1]
            lines[node.lineno - 1] = f"{indent}from .{_file_name(bundle, suffix)} import{imported}"
            continue
        renamed = [f"{indent}{alias.asname} = {alias.name}\n" for alias in node.names if alias.asname]
        lines[node.lineno - 1] = "".join(renamed) or f"{indent}pass  # defined above: {target}\n"
        for number in range(node.lineno, node.end_lineno or node.lineno):
            lines[number] = ""
    for statement in module.tree.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == "__all__":
            for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                lines[number] = ""
    return "".join(lines).rstrip() + "\n\n"


# --- the closure ----------------------------------------------------------------------------------------------------


def _closure(package: Path, roots: Iterable[str]) -> list[_Module]:
    """The modules `roots` (dotted names under the package) and all that they import relatively, sorted by name."""
    found: dict[str, _Module] = {}
    wanted = list(roots)
    while wanted:
        name = wanted.pop()
        if name not in found:
            source = _path(package, name).read_text(encoding="utf-8")
            found[name] = _Module(name, source, tuple(_relative_imports(package, name, source)))
            wanted += [target for _, target in found[name].imports]
    return [found[name] for name in sorted(found)]


def _relative_imports(package: Path, name: str, source: str) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Statements that import from this package, also inside functions, and the imported modules."""
    for node in _import_statements(source):
        module = ".".join([*name.split(".")[: -node.level], *([node.module] if node.module else [])])
        if node.module is None or not _path(package, module).is_file():
            raise ValueError(
                f"{name}, line {node.lineno}: exported code must import names from modules, not from packages."
            )
        yield node, module


@lru_cache
def _import_statements(source: str) -> tuple[ast.ImportFrom, ...]:
    """Relative import statements, also inside functions."""
    return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level)


def _path(package: Path, name: str) -> Path:
    return package.joinpath(*name.split(".")).with_suffix(".py")


def _in_order(modules: list[_Module]) -> list[_Module]:
    """Sort the modules of a folder so that each one follows those that it imports at its top level."""
    needs = {module.name: [target for node, target in module.imports if node.col_offset == 0] for module in modules}
    known = {module.name: module for module in modules}
    return [known[name] for name in TopologicalSorter(needs).static_order() if name in known]


def _check_names(modules: list[_Module]) -> None:
    """Refuse a name that two modules of one exported file define differently at their top level."""
    meanings: dict[str, tuple[str, str]] = {}
    for module in modules:
        for name, meaning in _top_level_names(module):
            other, known = meanings.setdefault(name, (module.name, meaning))
            if known != meaning:
                raise ValueError(f"{module.name} and {other} are exported in one file and both define {name!r}.")


def _top_level_names(module: _Module) -> Iterator[tuple[str, str]]:
    """Names that a module defines or imports from other packages, each with a text that identifies its meaning."""
    targets = {(node.lineno, node.col_offset): target for node, target in module.imports}
    todo: list[ast.AST] = list(module.tree.body)
    for node in todo:
        if isinstance(node, (ast.If, ast.Try)):
            todo += ast.iter_child_nodes(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            if getattr(node, "module", None) == "__future__":
                raise ValueError(f"{module.name}: `from __future__` must begin a file, so it cannot be exported.")
            if targets.get((node.lineno, node.col_offset), "").partition(".")[0] == module.bundle:
                continue  # another module of this file defines the name
            origin = targets.get((node.lineno, node.col_offset), getattr(node, "module", None) or "")
            separator = ":" if (node.lineno, node.col_offset) in targets else "."
            yield from ((alias.asname or alias.name, f"{origin}{separator}{alias.name}") for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, f"{module.name}:{node.name}"
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                yield from (
                    (part.id, ast.dump(value))
                    for part, value in pairs
                    if isinstance(part, ast.Name) and part.id != "__all__"
                )
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, "" if node.value is None else ast.dump(node.value)


# --- references to the code -----------------------------------------------------------------------------------------


def _write_model_index(directory: Path, suffix: str) -> None:
    """Replace classes of this project in `model_index.json` by pairs of file and class, as diffusers needs."""
    path = directory / "model_index.json"
    if not path.is_file():
        return
    index, own = json.loads(path.read_text(encoding="utf-8")), pipeline_class(directory)
    for name, expected in (PIPELINE_COMPONENTS[own] | {"_class_name": own}).items():
        found = index.get(name)
        found = found[1] if isinstance(found, list) else found
        if found is None and name != "_class_name":
            continue
        if found != expected:
            raise ValueError(
                f"`{name}` is a {found}, but the code of a repository supports only {expected}: save this component "
                "separately, or convert it first."
            )
        index[name] = [f"{ENTRY if name == '_class_name' else COMPONENT_ENTRY}{suffix}", expected]
    index.pop("_name_or_path", None)
    write_text(path, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _update_json(path: Path, **entries: Any) -> None:
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8")) | entries
        write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


__all__ = [
    "CODE_FILE",
    "COMPONENT_CLASSES",
    "PIPELINE_CLASS",
    "PIPELINE_COMPONENTS",
    "__version__",
    "code_files",
    "import_from_package",
    "is_written_code",
    "pipeline_class",
    "write_remote_code",
]
