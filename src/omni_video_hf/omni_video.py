"""
Everything that a repository's code offers, and the file that Auto classes and diffusers open.

It names every shipped module: transformers copies what a file imports, directly or not, diffusers only what it imports
directly. It defines nothing itself, because diffusers runs this file anew for every component, and classes that are
defined twice are not the same class.
"""

from .attention_omni_video import constant_context
from .configuration_omni_video import OmniVideoAdapterConfig, OmniVideoConfig, OmniVideoVisionHeadConfig
from .configuration_vila import VilaConfig
from .denoising_omni_video import OmniVideoDenoisingMixin
from .flow_matching_omni_video import sampling_sigmas
from .guidance_omni_video import Guidance
from .lora_files_omni_video import read_lora_file
from .lora_omni_video import OmniVideoLoraLoaderMixin
from .losses_omni_video import OmniVideoLossConfig
from .media_omni_video import VideoClip, load_image, load_video, save_image, save_video
from .media_reading_omni_video import probe_video
from .memory_omni_video import MemoryProfile
from .model_card_omni_video import TrainingSummary
from .modeling_omni_video import OmniVideoForConditionalGeneration
from .modeling_omni_video_connectors import OmniVideoAdapter, OmniVideoVisionHead
from .modeling_vila import VilaForConditionalGeneration, VilaModel
from .pipeline_loading_omni_video import OmniVideoRepositoryMixin
from .pipeline_omni_video import OmniVideoPipeline, OmniVideoPipelineOutput
from .processing_omni_video import OmniVideoProcessor
from .publishing_omni_video import push_repository
from .remote_code_omni_video import __version__
from .repository_omni_video import finalize_repository
from .request_checks_omni_video import NotFiniteError
from .saving_omni_video import OmniVideoSavingMixin
from .scheduling_omni_video import prepare_scheduler
from .settings_omni_video import PRESETS, SizeError
from .source_omni_video import Source
from .staging_omni_video import finish_saving
from .turns_omni_video import turn
from .writing_omni_video import complete_or_absent

__all__ = [
    "PRESETS",
    "Guidance",
    "MemoryProfile",
    "NotFiniteError",
    "OmniVideoAdapter",
    "OmniVideoAdapterConfig",
    "OmniVideoConfig",
    "OmniVideoDenoisingMixin",
    "OmniVideoForConditionalGeneration",
    "OmniVideoLoraLoaderMixin",
    "OmniVideoLossConfig",
    "OmniVideoPipeline",
    "OmniVideoPipelineOutput",
    "OmniVideoProcessor",
    "OmniVideoRepositoryMixin",
    "OmniVideoSavingMixin",
    "OmniVideoVisionHead",
    "OmniVideoVisionHeadConfig",
    "SizeError",
    "Source",
    "TrainingSummary",
    "VideoClip",
    "VilaConfig",
    "VilaForConditionalGeneration",
    "VilaModel",
    "__version__",
    "complete_or_absent",
    "constant_context",
    "finalize_repository",
    "finish_saving",
    "load_image",
    "load_video",
    "prepare_scheduler",
    "probe_video",
    "push_repository",
    "read_lora_file",
    "sampling_sigmas",
    "save_image",
    "save_video",
    "turn",
]
