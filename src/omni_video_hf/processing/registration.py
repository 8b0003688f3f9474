"""Registration of the package's classes with the Auto classes of transformers; this module imports all of them."""

from functools import cache

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from ..models.configuration_omni_video import OmniVideoConfig
from ..models.configuration_vila import VilaConfig
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..models.modeling_vila import VilaForConditionalGeneration, VilaModel
from .processing_omni_video import OmniVideoProcessor


@cache
def register_auto_classes() -> None:
    """
    Register configurations, models and processor, once per process.

    The Auto classes then use the classes of the package, without `trust_remote_code`.
    """
    for config, model in (
        (OmniVideoConfig, OmniVideoForConditionalGeneration),
        (VilaConfig, VilaForConditionalGeneration),
    ):
        AutoConfig.register(config.model_type, config)
        AutoModelForImageTextToText.register(config, model)
        AutoModelForMultimodalLM.register(config, model)
    AutoModel.register(OmniVideoConfig, OmniVideoForConditionalGeneration)
    AutoModel.register(VilaConfig, VilaModel)
    AutoProcessor.register(OmniVideoConfig, OmniVideoProcessor)


__all__ = ["register_auto_classes"]
