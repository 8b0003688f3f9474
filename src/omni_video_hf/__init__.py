"""
Omni-Video (arXiv 2507.06119) for transformers and diffusers.

Importing the package registers its classes with transformers' Auto classes. The `omni-video` command alone does so
later, when it loads a model: `--help`, completion and a wrong flag need neither torch nor transformers.
"""

from .command_start import is_command  # first: it takes care of Ctrl-C

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING

from .remote_code_omni_video import __version__

if TYPE_CHECKING:
    from .configuration_omni_video import OmniVideoAdapterConfig, OmniVideoConfig, OmniVideoVisionHeadConfig
    from .configuration_vila import VilaConfig
    from .lora_omni_video import collect_lora_layers
    from .losses_omni_video import OmniVideoLossConfig
    from .modeling_omni_video import OmniVideoForConditionalGeneration
    from .modeling_omni_video_connectors import OmniVideoAdapter, OmniVideoVisionHead
    from .modeling_vila import VilaForConditionalGeneration
    from .pipeline_omni_video import OmniVideoPipeline, OmniVideoPipelineOutput
    from .processing_omni_video import OmniVideoProcessor
    from .repository_omni_video import complete_repository

_HOMES = {
    "OmniVideoAdapter": "modeling_omni_video_connectors",
    "OmniVideoAdapterConfig": "configuration_omni_video",
    "OmniVideoConfig": "configuration_omni_video",
    "OmniVideoForConditionalGeneration": "modeling_omni_video",
    "OmniVideoLossConfig": "losses_omni_video",
    "OmniVideoPipeline": "pipeline_omni_video",
    "OmniVideoPipelineOutput": "pipeline_omni_video",
    "OmniVideoProcessor": "processing_omni_video",
    "OmniVideoVisionHead": "modeling_omni_video_connectors",
    "OmniVideoVisionHeadConfig": "configuration_omni_video",
    "VilaConfig": "configuration_vila",
    "VilaForConditionalGeneration": "modeling_vila",
    "collect_lora_layers": "lora_omni_video",
    "complete_repository": "repository_omni_video",
}


def __getattr__(name: str) -> object:
    """A class or function of the package, from the module that defines it; all classes are registered then."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".registration", __name__).register_auto_classes()
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not is_command():
    import_module(".registration", __name__).register_auto_classes()

__all__ = [
    "OmniVideoAdapter",
    "OmniVideoAdapterConfig",
    "OmniVideoConfig",
    "OmniVideoForConditionalGeneration",
    "OmniVideoLossConfig",
    "OmniVideoPipeline",
    "OmniVideoPipelineOutput",
    "OmniVideoProcessor",
    "OmniVideoVisionHead",
    "OmniVideoVisionHeadConfig",
    "VilaConfig",
    "VilaForConditionalGeneration",
    "__version__",
    "collect_lora_layers",
    "complete_repository",
]
