"""Training with the Trainer of transformers: the stages of the paper, the authors' released recipe, and LoRA."""

from importlib import import_module

_HOMES = {
    "STAGES": "stages",
    "Stage": "stages",
    "OmniVideoTrainer": "trainer",
    "OmniVideoTrainingArguments": "arguments",
}


def __getattr__(name: str) -> object:
    """Import the trainer when it is used, so that the command line starts quickly."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = ["STAGES", "OmniVideoTrainer", "OmniVideoTrainingArguments", "Stage"]
