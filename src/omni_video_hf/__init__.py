"""
Omni-Video (arXiv 2507.06119) for transformers and diffusers.

Importing the package registers its classes with the Auto classes of transformers. The `omni-video` command registers
them later, when it loads a model: `--help`, completion and a wrong flag need neither torch nor transformers.
"""

from .utils.command_start import is_command  # must be first: it handles Ctrl-C during the imports

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING

from .hub.remote_code import __version__

if TYPE_CHECKING:
    from .diffusion.losses import OmniVideoLossConfig
    from .hub.repository import complete_repository
    from .media.video_loading import load_video
    from .media.video_writer import save_video
    from .models.configuration_omni_video import OmniVideoAdapterConfig, OmniVideoConfig, OmniVideoVisionHeadConfig
    from .models.configuration_vila import VilaConfig
    from .models.connectors import OmniVideoAdapter, OmniVideoVisionHead
    from .models.modeling_omni_video import OmniVideoForConditionalGeneration
    from .models.modeling_vila import VilaForConditionalGeneration
    from .pipelines.lora.loader import collect_lora_layers
    from .pipelines.output import OmniVideoPipelineOutput
    from .pipelines.pipeline_omni_video import OmniVideoPipeline
    from .processing.processing_omni_video import OmniVideoProcessor
    from .utils.read_budget import read_budget

_HOMES = {
    "OmniVideoAdapter": "models.connectors",
    "OmniVideoAdapterConfig": "models.configuration_omni_video",
    "OmniVideoConfig": "models.configuration_omni_video",
    "OmniVideoForConditionalGeneration": "models.modeling_omni_video",
    "OmniVideoLossConfig": "diffusion.losses",
    "OmniVideoPipeline": "pipelines.pipeline_omni_video",
    "OmniVideoPipelineOutput": "pipelines.output",
    "OmniVideoProcessor": "processing.processing_omni_video",
    "OmniVideoVisionHead": "models.connectors",
    "OmniVideoVisionHeadConfig": "models.configuration_omni_video",
    "VilaConfig": "models.configuration_vila",
    "VilaForConditionalGeneration": "models.modeling_vila",
    "collect_lora_layers": "pipelines.lora.loader",
    "complete_repository": "hub.repository",
    "load_video": "media.video_loading",
    "read_budget": "utils.read_budget",
    "save_video": "media.video_writer",
}


def __getattr__(name: str) -> object:
    """Import a public class or function from its module, after registering all classes."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".processing.registration", __name__).register_auto_classes()
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not is_command():
    import_module(".processing.registration", __name__).register_auto_classes()

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
    "load_video",
    "read_budget",
    "save_video",
]
