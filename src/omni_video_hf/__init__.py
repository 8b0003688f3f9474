"""Omni-Video (arXiv 2507.06119) for transformers and diffusers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_omni_video import OmniVideoAdapterConfig, OmniVideoConfig, OmniVideoVisionHeadConfig
from .configuration_vila import VilaConfig
from .lora_omni_video import collect_lora_layers
from .losses_omni_video import OmniVideoLossConfig
from .modeling_omni_video import OmniVideoForConditionalGeneration
from .modeling_omni_video_connectors import OmniVideoAdapter, OmniVideoVisionHead
from .modeling_vila import VilaForConditionalGeneration, VilaModel
from .pipeline_omni_video import OmniVideoPipeline, OmniVideoPipelineOutput
from .processing_omni_video import OmniVideoProcessor
from .remote_code_omni_video import __version__
from .repository_omni_video import complete_repository

# With the package installed no `trust_remote_code` is needed, and the package's classes are used.
for _config, _model in (
    (OmniVideoConfig, OmniVideoForConditionalGeneration),
    (VilaConfig, VilaForConditionalGeneration),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageTextToText.register(_config, _model)
    AutoModelForMultimodalLM.register(_config, _model)
AutoModel.register(OmniVideoConfig, OmniVideoForConditionalGeneration)
AutoModel.register(VilaConfig, VilaModel)
AutoProcessor.register(OmniVideoConfig, OmniVideoProcessor)

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
