"""The ground plan that CONTRIBUTING.md describes: who may import whom, and where to look."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "omni_video_hf"
# From the top to the bottom: a folder may import those of its own line and of the lines below.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("shapes",),
    ("training",),
    ("pipelines",),
    ("processing",),
    ("models",),
    ("diffusion", "hub"),
    ("media",),
    ("tasks", "utils"),
)
MAX_LINES, MAX_ENTRIES = 600, 13


def modules():
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(name, path, only_at_import=False):
    """Modules of the package that a module imports; those in functions too, unless `only_at_import`."""
    found, todo = set(), list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if is_type_checking(node) or (only_at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            if not node.level and (node.module or "").partition(".")[0] != "omni_video_hf":
                continue
            parts = (node.module or "").split(".") if node.module else []
            target = [*base, *(parts if node.level else parts[1:])]
            names = [".".join([*target, alias.name]) for alias in node.names]
            known = modules()
            found |= {entry for entry in names if entry in known} or {".".join(target)} & known.keys()
    return found


def test_imports_go_one_way():
    level = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in imported(name, path)
        if level[target.partition(".")[0]] < level[name.partition(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_has_its_layer():
    folders = {name.partition(".")[0] for name in modules()}
    assert folders == {folder for layer in LAYERS for folder in layer}


def test_there_is_no_import_circle():
    graph = {name: imported(name, path, only_at_import=True) for name, path in modules().items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for target in sorted(graph[name]):
                visit(target)
            done.add(path.pop())

    for name in graph:
        visit(name)


def test_modules_and_folders_stay_small():
    long = {name: count for name, path in modules().items() if (count := path.read_text().count("\n")) > MAX_LINES}
    assert not long
    for folder in {path.parent for path in modules().values()}:
        entries = sorted(
            {path.name for path in folder.iterdir()} - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
        )
        assert len(entries) <= MAX_ENTRIES, f"{folder}: {entries}"


def test_no_generated_code_is_tracked():
    assert not [path for path in PACKAGE.rglob("*.py") if re.search(r"_[0-9a-f]{8}\.py$", path.name)]


def test_the_package_imports_nothing_from_outside_itself():
    outside = ("examples", "conversion", "benchmarks", "tests")
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").partition(".")[0] not in outside, name


QUESTIONS = re.findall(
    r"^\| (Where [^|]*\?) \| `([^`]+)` \| `([^`]+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE
)


def test_the_map_answers_ten_questions():
    assert len(QUESTIONS) >= 10


@pytest.mark.parametrize(("question", "file", "name"), QUESTIONS)
def test_the_map_names_files_that_define_the_answer(question, file, name):
    tree = ast.parse((ROOT / file).read_text())
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert name in defined, question


def test_the_map_names_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"^\| `([\w/.]+?)/?(?:\.py)?` \|", text, flags=re.MULTILINE))
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= named
