"""`import_features`: import feature pickles of the authors' code into a cache, without running code in them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...tasks import TASKS, get_task
from ...utils.names import check_known
from ...utils.safe_load import load_checkpoint
from ..data.bad_data import BadDataError, Offender
from .cache_builder import BuildReport, build_cache
from .cache_files import check_output

IMPORT_VERSION = 1  # raised when an import gives other tensors than before
SUFFIXES = (".pkl", ".pickle", ".pt", ".pth")
# Upstream's names, the newer first (UPSTREAM.md section 5).
PROMPT_KEYS = ("t5_emb", "text_emb")
STATES_KEY, TARGET_KEY = "vlm_last_hidden_states", "siglip2_img_pooled_output_tgt"
TEMPORAL_FACTOR = 4  # of Wan's VAEs: `frame_num` frames are this many times fewer latents


class FeatureFile:
    """
    A feature file of the authors' code as a sample of a cache.

    Args:
        path: the file.
        key: its name in the cache.
        task: in place of the one that its latents tell: with `latent_feature_tgt` and `latent_feature`, an edit, else
            a generation; of an image where there is one latent frame, else of a video. i2v cannot be told.
    """

    def __init__(self, path: Path, key: str, task: str | None = None) -> None:
        self.path, self.key, self.task = path, key, task

    def provenance(self) -> dict[str, Any]:
        """The file's hash stands for everything upstream computed it from."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        content = self._load()
        return {
            "task": self.task or self._task_of(content),
            "text": content["prompt"],
            "media_sha256": digest,
            "num_frames": _frame_count(content),
            "instruction": "states",
            "code_version": IMPORT_VERSION,
        }

    def load(self) -> None:
        """Nothing: a file is read when its features are taken over."""

    def compute(self, loaded: None = None) -> dict[str, torch.Tensor]:  # noqa: ARG002 - of the protocol
        """
        The file's tensors under our names, in the formats they have.

        Raises:
            ValueError: for missing or misshapen contents, all of them named.
        """
        content = self._load()
        task = self.task or self._task_of(content)
        target, source = _latents(content)
        reference = get_task(task).latents or "source_latents"
        tensors = {
            "latents": target,
            reference: source,
            "prompt_embeds": _single(_first(content, PROMPT_KEYS)),
            "mllm_hidden_states": _unbatched(content[STATES_KEY], 3),
            "target_features": _unbatched(content.get(TARGET_KEY), 2),
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _load(self) -> dict[str, Any]:
        content = load_checkpoint(self.path)
        problems = _problems(content, self.task)
        if problems:
            raise BadDataError([Offender(self.key, problem) for problem in problems], 1)
        return content

    @staticmethod
    def _task_of(content: Mapping[str, Any]) -> str:
        target, source = _latents(content)
        kind = "i" if target.shape[1] == 1 else "v"
        return f"{'t' if source is None else kind}2{kind}"


def _problems(content: Any, task: str | None) -> list[str]:
    """Everything that is wrong with a file's contents."""
    if not isinstance(content, dict):
        return [f"contains a {type(content).__name__}, not a dict of features"]
    problems = []
    prompt = content.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        found = (
            f"is empty ({prompt[:20]!r})"
            if isinstance(prompt, str)
            else f"must be a text, got {type(prompt).__name__}"
        )
        problems.append(f"`prompt` {found}")
    wanted = {
        "latent_feature_tgt": (_latents(content)[0], 4),
        "latent_feature": (_latents(content)[1], 4),
        "t5_emb": (_single(_first(content, PROMPT_KEYS)), 2),
        STATES_KEY: (content.get(STATES_KEY), 3),
        TARGET_KEY: (content.get(TARGET_KEY), 2),
    }
    optional = {"latent_feature", TARGET_KEY}
    for name, (tensor, dimensions) in wanted.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, torch.Tensor):
            problems.append(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        elif tensor.ndim != dimensions:
            problems.append(f"`{name}` must have {dimensions} dimensions, got {list(tensor.shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"`{name}` must contain floats, got {tensor.dtype}")
        elif dimensions < 4 and name != "t5_emb" and tensor.shape[0] != 1:
            problems.append(f"`{name}` must be of one sample, got {list(tensor.shape)}")
    if problems:
        return problems
    target, source = _latents(content)
    frames = content.get("frame_num")
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int)):
        problems.append(f"`frame_num` must be a whole number, got {type(frames).__name__}")
    elif frames is not None and (frames - 1) // TEMPORAL_FACTOR + 1 != target.shape[1]:
        problems.append(f"`frame_num` is {frames}, but the latents have {target.shape[1]} frames")
    if task is not None and (TASKS[task].source is None) != (source is None):
        problems.append(f"has {'no' if source is None else 'a'} source, which does not fit the task {task!r}")
    return problems


def _latents(content: Mapping[str, Any]) -> tuple[Any, Any]:
    """Target and source: where only one is there, it is the target."""
    if content.get("latent_feature_tgt") is None:
        return content.get("latent_feature"), None
    return content["latent_feature_tgt"], content.get("latent_feature")


def _first(content: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((content[name] for name in names if content.get(name) is not None), None)


def _single(value: Any) -> Any:
    """The one tensor of a list of one."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _unbatched(tensor: torch.Tensor | None, dimensions: int) -> torch.Tensor | None:
    return tensor[0] if tensor is not None and tensor.ndim == dimensions else tensor


def _frame_count(content: Mapping[str, Any]) -> int:
    frames = content.get("frame_num")
    return frames if frames is not None else (_latents(content)[0].shape[1] - 1) * TEMPORAL_FACTOR + 1


def find_feature_files(sources: Sequence[str | Path]) -> dict[str, Path]:
    """
    Feature files by name in the cache: files as they are, folders with everything in them.

    Raises:
        ValueError: for what is not there, folders without feature files, and two files of one name.
    """
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(f"{source}: no such file or folder.")
        files = [source]
        if source.is_dir():
            files = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{source}: contains no feature files ({', '.join(SUFFIXES)}).")
        for path in files:
            key = path.relative_to(source).as_posix() if source.is_dir() else path.name
            if key in found and found[key].resolve() != path.resolve():
                raise ValueError(f"{path} and {found[key]} have the same name: import them into two caches.")
            found[key] = path
    return found


def import_features(
    sources: Sequence[str | Path], folder: str | Path, *, task: str | None = None, on_bad_data: str = "stop"
) -> BuildReport:
    """
    Import feature files of the authors' code into a cache.

    Args:
        sources: files, or folders of them.
        folder: the cache.
        task: task of all files, if their latents do not determine it, such as `i2v`.
        on_bad_data: `"stop"` or `"skip"`.

    Raises:
        BadDataError: with every file that cannot be used.
        ValueError: if `folder` contains anything but a cache.
    """
    check_output(folder)
    if task is not None:
        check_known("task", [task], [name for name in TASKS if not get_task(name).answers_in_text])
    samples = [FeatureFile(path, key, task) for key, path in find_feature_files(sources).items()]
    return build_cache(folder, samples, on_bad_data=on_bad_data, about={"made_by": "import-features"},
                       description="Importing features")  # fmt: skip


__all__ = ["FeatureFile", "find_feature_files", "import_features"]
