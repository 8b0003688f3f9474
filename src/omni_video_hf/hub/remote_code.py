"""
The code that travels with a repository, so that transformers and diffusers load it without this package.

Every shipped module is copied flat, under its name and the hash of all of them: diffusers keeps the code of all local
repositories in one folder, where equal names of unequal code would meet. The same files lie at the root, for
transformers and for the pipeline, and in the component folders, where diffusers looks.

    omni_video_<hash>.py            what the doors open: imports every module below, so that each library copies them
    omni_video_pipeline_<hash>.py   the pipeline's door; also names the files in the component folders, because
                                    diffusers downloads what it names and no other code beside weights
    modeling_omni_video_<hash>.py   and so on: the modules of this package

Code that was itself loaded from a repository writes copies of itself: a fine-tune keeps the code it was made with.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..utils.files import write_text

__version__ = "0.1.0"

MODULES = (
    "configuration_vila",
    "writing_omni_video",
    "remote_code_omni_video",
    "staging_omni_video",
    "read_budget_omni_video",
    "chat_template_omni_video",
    "lora_metadata_omni_video",
    "media_reading_omni_video",
    "request_checks_omni_video",
    "settings_omni_video",
    "turns_omni_video",
    "flow_matching_omni_video",
    "losses_omni_video",
    "attention_omni_video",
    "guidance_omni_video",
    "scheduling_omni_video",
    "denoising_omni_video",
    "memory_omni_video",
    "configuration_omni_video",
    "repository_omni_video",
    "modeling_vila",
    "media_omni_video",
    "source_omni_video",
    "text_omni_video",
    "processing_omni_video",
    "modeling_omni_video_connectors",
    "lora_files_omni_video",
    "lora_omni_video",
    "model_card_omni_video",
    "publishing_omni_video",
    "generation_omni_video",
    "saving_omni_video",
    "modeling_omni_video",
    "pipeline_loading_omni_video",
    "pipeline_omni_video",
)
ENTRY, PIPELINE_ENTRY = "omni_video", "omni_video_pipeline"
# Components of the pipeline that are classes of this project, and the folders where diffusers wants their code.
COMPONENT_CLASSES = {
    "processor": "OmniVideoProcessor",
    "mllm": "OmniVideoForConditionalGeneration",
    "adapter": "OmniVideoAdapter",
}
PIPELINE_CLASS = "OmniVideoPipeline"
# What transformers' Auto classes find at the root. `AutoModel` needs a line of its own.
AUTO_MAP = {
    "AutoConfig": "OmniVideoConfig",
    "AutoModel": "OmniVideoForConditionalGeneration",
    "AutoModelForImageTextToText": "OmniVideoForConditionalGeneration",
    "AutoModelForMultimodalLM": "OmniVideoForConditionalGeneration",
    "AutoProcessor": "OmniVideoProcessor",
}

SUFFIX = r"_[0-9a-f]{8}"
_RELATIVE_IMPORT = re.compile(r"^(\s*from \.)(\w+)( import)", flags=re.MULTILINE)
CODE_FILE = re.compile(rf"({'|'.join((*MODULES, ENTRY, PIPELINE_ENTRY))}){SUFFIX}\.py")


def code_files() -> dict[str, str]:
    """
    Name and text of every file of code that a repository gets, the same in each folder.

    Raises:
        FileNotFoundError: when this code lies in a repository from which a file is missing.
    """
    folder = Path(__file__).parent
    own_suffix = __name__.rpartition(".")[2].removeprefix("remote_code_omni_video")
    if own_suffix:
        names = [f"{module}{own_suffix}.py" for module in (*MODULES, ENTRY)]
        return {name: (folder / name).read_text(encoding="utf-8") for name in names}
    sources = {module: (folder / f"{module}.py").read_text(encoding="utf-8") for module in (*MODULES, ENTRY)}
    digest = hashlib.sha256(json.dumps([__version__, sources], sort_keys=True).encode()).hexdigest()
    suffix = f"_{digest[:8]}"
    return {f"{module}{suffix}.py": _stamped(module, source, suffix) for module, source in sources.items()}


def _stamped(module: str, source: str, suffix: str) -> str:
    """The source of a module as it is shipped: siblings by their new names, its origin in the first line."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    origin = f"# omni_video_hf {__version__}, {module}.py, sha256 {digest}. Written when saving; edits get lost.\n"
    return origin + _RELATIVE_IMPORT.sub(rf"\g<1>\g<2>{suffix}\g<3>", source)


def _pipeline_entry(files: dict[str, str], suffix: str, folders: list[str]) -> str:
    """The text of the pipeline's door."""
    modules = [name.removesuffix(".py") for name in files]
    lines = [
        f"# omni_video_hf {__version__}, written when saving; edits get lost.",
        '"""The code of this repository as diffusers opens it."""',
        "",
        "from typing import TYPE_CHECKING",
        "",
        *(f"from .{name} import __name__ as _  # noqa: F401" for name in modules),
        f"from .{ENTRY}{suffix} import {PIPELINE_CLASS}",
        "",
        "if TYPE_CHECKING:  # never run: diffusers reads these lines and downloads the files that they name",
        *(f"    from .{folder}.{name} import __name__ as _" for folder in folders for name in modules),
        "",
        f'__all__ = ["{PIPELINE_CLASS}"]',
        "",
    ]
    return "\n".join(lines)


def write_remote_code(directory: Path) -> None:
    """
    Put the code into a repository and have its index and configurations refer to it.

    Writes the code files at the root and into the component folders there are, the pairs of `model_index.json`, and
    `auto_map`. Code of another version that an earlier save left is removed. Written twice, nothing changes.

    Args:
        directory: a repository whose components are in place.
    """
    files = code_files()
    suffix = re.fullmatch(rf"{ENTRY}({SUFFIX})\.py", list(files)[-1]).group(1)
    folders = [name for name in COMPONENT_CLASSES if (directory / name).is_dir()]
    outdated: list[Path] = []
    for folder in (directory, *(directory / name for name in folders)):
        wanted = dict(files)
        if folder == directory and (directory / "model_index.json").is_file():
            with_weights = [name for name in folders if any((directory / name).glob("*.safetensors"))]
            wanted[f"{PIPELINE_ENTRY}{suffix}.py"] = _pipeline_entry(files, suffix, with_weights)
        outdated += [path for path in folder.glob("*.py") if path.name not in wanted and is_written_code(path)]
        for name, text in wanted.items():
            write_text(folder / name, text)
    _write_model_index(directory, suffix)
    processors = [directory / name / "processor_config.json" for name in ("", "processor")]
    for path in (directory / "config.json", directory / "mllm" / "config.json"):
        auto_map = {name: entry for name, entry in AUTO_MAP.items() if name != "AutoProcessor"}
        _update_json(path, auto_map={name: f"{ENTRY}{suffix}.{entry}" for name, entry in auto_map.items()})
    for path in processors:
        _update_json(path, auto_map={"AutoProcessor": f"{ENTRY}{suffix}.{AUTO_MAP['AutoProcessor']}"})
    for path in outdated:  # last: until then something refers to them
        path.unlink(missing_ok=True)


def is_written_code(path: Path) -> bool:
    """Whether a file is code that a save wrote, by its name and its first line."""
    if CODE_FILE.fullmatch(path.name) is None or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(200).startswith(b"# omni_video_hf ")


def _write_model_index(directory: Path, suffix: str) -> None:
    """Classes of this project as the pairs of file and class that diffusers' remote code wants."""
    path = directory / "model_index.json"
    if not path.is_file():
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    for name, expected in (COMPONENT_CLASSES | {"_class_name": PIPELINE_CLASS}).items():
        found = index.get(name)
        found = found[1] if isinstance(found, list) else found
        if found is None and name != "_class_name":
            continue
        if found != expected:
            raise ValueError(
                f"`{name}` is a {found}, which no repository's code knows: only {expected} can be written. Save the "
                "component by itself, or convert it first."
            )
        index[name] = [f"{PIPELINE_ENTRY if name == '_class_name' else ENTRY}{suffix}", expected]
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
    "__version__",
    "code_files",
    "is_written_code",
    "write_remote_code",
]
