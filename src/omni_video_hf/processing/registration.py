"""Makes the package's classes known to transformers' Auto classes; importing this module imports all of them."""

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

    With the package installed no `trust_remote_code` is needed then, and the package's classes are used.
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
