"""Classes of the libraries whose methods ask the Hub, with tokens kept out of their errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.modules import Host
from ..utils.tokens import hub_call
from .repository import check_finished, check_hub_indices, check_indices


class HubCallsMixin(Host):
    """Loading and pushing as in transformers or diffusers, with tokens cleaned and masked, see [`hub_call`]."""

    @classmethod
    @hub_call
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """
        As in the class's library; `token` is cleaned.

        Example:
            >>> from omni_video_hf import OmniVideoConfig
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> OmniVideoConfig.from_pretrained(CHECKPOINT).model_type
            'omni_video'
        """
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Methods whose signatures the libraries read keep them: `save_pretrained` and `push_to_hub`."""
        super().__init_subclass__(**kwargs)
        for name in ("save_pretrained", "push_to_hub"):
            method = getattr(cls, name, None)  # a mixin by itself has none
            if method is not None and not getattr(method, "is_hub_call", False):
                setattr(cls, name, hub_call(method))


class WeightsFromHubMixin(HubCallsMixin):
    """Likewise of a class with weights, whose index may name files of its own repository only."""

    @classmethod
    @hub_call
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """
        As in the class's library; a `ValueError` for an index that names files outside of its repository.

        Example:
            >>> from omni_video_hf import OmniVideoAdapter
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> OmniVideoAdapter.from_pretrained(CHECKPOINT, subfolder="adapter").config.hidden_size
            128
        """
        check_place(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def check_place(place: str | Path | None, options: Mapping[str, Any]) -> None:
    """
    Refuse to load weights from a folder into which a save did not finish, or by an index that names files elsewhere.

    Args:
        place: folder or Hub repository.
        options: keyword arguments of `from_pretrained`.

    Raises:
        ValueError: says what is wrong.
    """
    if place is None:
        return
    if Path(place).is_dir():
        folder = Path(place) / (options.get("subfolder") or "")
        for directory in dict.fromkeys((Path(place), folder)):
            check_finished(directory)
            check_indices(directory)
        return
    names = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "variant")
    check_hub_indices(str(place), **{name: options[name] for name in names if options.get(name) is not None})


__all__ = ["HubCallsMixin", "WeightsFromHubMixin", "check_place"]
