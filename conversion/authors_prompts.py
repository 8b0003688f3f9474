"""The prompts of Omni-Video 2's authors, read out of the user's copy of their configuration; it is never executed."""

import ast
from pathlib import Path

# Attribute in upstream's `omnivideo/configs/shared_config.py` -> key of the pipeline's `prompts`.
ATTRIBUTES = {
    "source_caption_system_prompt": "source_caption",
    "target_caption_system_prompt": "target_caption",
    "feature_extraction_system_prompt": "features",
    "sample_neg_prompt_en": "negative",
}
MAX_BYTES = 10**6


def read_prompts(path: Path) -> dict[str, str]:
    """
    The three system prompts and the negative prompt in a Python file, as `prompts` of the pipeline.

    The file is parsed, not run: it must assign each of them once, to an attribute or a name, as a string.

    Args:
        path: the file, or a folder of upstream's code that contains it as `omnivideo/configs/shared_config.py`.

    Raises:
        ValueError: for a file that is missing, no Python, or lacks one of the prompts.
    """
    if path.is_dir():
        path = path / "omnivideo" / "configs" / "shared_config.py"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: is larger than {MAX_BYTES} bytes, so it is not upstream's configuration.")
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except (SyntaxError, UnicodeDecodeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: is no Python file ({error}).") from error
    found: dict[str, str] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            name = getattr(target, "attr", getattr(target, "id", None))
            if name not in ATTRIBUTES:
                continue
            try:
                text = ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                text = None
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}, line {node.lineno}: {name} must be a string, and not an empty one.")
            if ATTRIBUTES[name] in found:
                raise ValueError(f"{path}, line {node.lineno}: {name} is assigned a second time.")
            found[ATTRIBUTES[name]] = text
    missing = [name for name, key in ATTRIBUTES.items() if key not in found]
    if missing:
        raise ValueError(
            f"{path}: has no {', '.join(missing)}. Give upstream's `omnivideo/configs/shared_config.py`, or the "
            "folder of its code."
        )
    return found
