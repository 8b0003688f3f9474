# omni_video_hf 0.1.0, written when saving; edits get lost.
"""The code of this repository as diffusers opens it."""

from typing import TYPE_CHECKING

from .configuration_vila_b0934582 import __name__ as _  # noqa: F401
from .remote_code_omni_video_b0934582 import __name__ as _  # noqa: F401
from .media_reading_omni_video_b0934582 import __name__ as _  # noqa: F401
from .settings_omni_video_b0934582 import __name__ as _  # noqa: F401
from .flow_matching_omni_video_b0934582 import __name__ as _  # noqa: F401
from .losses_omni_video_b0934582 import __name__ as _  # noqa: F401
from .attention_omni_video_b0934582 import __name__ as _  # noqa: F401
from .guidance_omni_video_b0934582 import __name__ as _  # noqa: F401
from .memory_omni_video_b0934582 import __name__ as _  # noqa: F401
from .configuration_omni_video_b0934582 import __name__ as _  # noqa: F401
from .repository_omni_video_b0934582 import __name__ as _  # noqa: F401
from .modeling_vila_b0934582 import __name__ as _  # noqa: F401
from .media_omni_video_b0934582 import __name__ as _  # noqa: F401
from .source_omni_video_b0934582 import __name__ as _  # noqa: F401
from .processing_omni_video_b0934582 import __name__ as _  # noqa: F401
from .modeling_omni_video_connectors_b0934582 import __name__ as _  # noqa: F401
from .lora_omni_video_b0934582 import __name__ as _  # noqa: F401
from .model_card_omni_video_b0934582 import __name__ as _  # noqa: F401
from .publishing_omni_video_b0934582 import __name__ as _  # noqa: F401
from .saving_omni_video_b0934582 import __name__ as _  # noqa: F401
from .modeling_omni_video_b0934582 import __name__ as _  # noqa: F401
from .pipeline_loading_omni_video_b0934582 import __name__ as _  # noqa: F401
from .pipeline_omni_video_b0934582 import __name__ as _  # noqa: F401
from .omni_video_b0934582 import __name__ as _  # noqa: F401
from .omni_video_b0934582 import OmniVideoPipeline

if TYPE_CHECKING:  # never run: diffusers reads these lines and downloads the files that they name
    from .mllm.configuration_vila_b0934582 import __name__ as _
    from .mllm.remote_code_omni_video_b0934582 import __name__ as _
    from .mllm.media_reading_omni_video_b0934582 import __name__ as _
    from .mllm.settings_omni_video_b0934582 import __name__ as _
    from .mllm.flow_matching_omni_video_b0934582 import __name__ as _
    from .mllm.losses_omni_video_b0934582 import __name__ as _
    from .mllm.attention_omni_video_b0934582 import __name__ as _
    from .mllm.guidance_omni_video_b0934582 import __name__ as _
    from .mllm.memory_omni_video_b0934582 import __name__ as _
    from .mllm.configuration_omni_video_b0934582 import __name__ as _
    from .mllm.repository_omni_video_b0934582 import __name__ as _
    from .mllm.modeling_vila_b0934582 import __name__ as _
    from .mllm.media_omni_video_b0934582 import __name__ as _
    from .mllm.source_omni_video_b0934582 import __name__ as _
    from .mllm.processing_omni_video_b0934582 import __name__ as _
    from .mllm.modeling_omni_video_connectors_b0934582 import __name__ as _
    from .mllm.lora_omni_video_b0934582 import __name__ as _
    from .mllm.model_card_omni_video_b0934582 import __name__ as _
    from .mllm.publishing_omni_video_b0934582 import __name__ as _
    from .mllm.saving_omni_video_b0934582 import __name__ as _
    from .mllm.modeling_omni_video_b0934582 import __name__ as _
    from .mllm.pipeline_loading_omni_video_b0934582 import __name__ as _
    from .mllm.pipeline_omni_video_b0934582 import __name__ as _
    from .mllm.omni_video_b0934582 import __name__ as _
    from .adapter.configuration_vila_b0934582 import __name__ as _
    from .adapter.remote_code_omni_video_b0934582 import __name__ as _
    from .adapter.media_reading_omni_video_b0934582 import __name__ as _
    from .adapter.settings_omni_video_b0934582 import __name__ as _
    from .adapter.flow_matching_omni_video_b0934582 import __name__ as _
    from .adapter.losses_omni_video_b0934582 import __name__ as _
    from .adapter.attention_omni_video_b0934582 import __name__ as _
    from .adapter.guidance_omni_video_b0934582 import __name__ as _
    from .adapter.memory_omni_video_b0934582 import __name__ as _
    from .adapter.configuration_omni_video_b0934582 import __name__ as _
    from .adapter.repository_omni_video_b0934582 import __name__ as _
    from .adapter.modeling_vila_b0934582 import __name__ as _
    from .adapter.media_omni_video_b0934582 import __name__ as _
    from .adapter.source_omni_video_b0934582 import __name__ as _
    from .adapter.processing_omni_video_b0934582 import __name__ as _
    from .adapter.modeling_omni_video_connectors_b0934582 import __name__ as _
    from .adapter.lora_omni_video_b0934582 import __name__ as _
    from .adapter.model_card_omni_video_b0934582 import __name__ as _
    from .adapter.publishing_omni_video_b0934582 import __name__ as _
    from .adapter.saving_omni_video_b0934582 import __name__ as _
    from .adapter.modeling_omni_video_b0934582 import __name__ as _
    from .adapter.pipeline_loading_omni_video_b0934582 import __name__ as _
    from .adapter.pipeline_omni_video_b0934582 import __name__ as _
    from .adapter.omni_video_b0934582 import __name__ as _

__all__ = ["OmniVideoPipeline"]
