"""
Sizes of the parts of `omni-video-shapes`, every one the real class: 25 MB in half precision in all.

`python -m examples.shapes.configuration` shows what each part weighs.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BatchFeature, UMT5Config, UMT5EncoderModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from omni_video_hf.models.configuration_omni_video import OmniVideoConfig
from omni_video_hf.models.configuration_vila import VilaConfig
from omni_video_hf.models.modeling_omni_video import OmniVideoForConditionalGeneration
from omni_video_hf.pipelines.pipeline_omni_video import OmniVideoPipeline
from omni_video_hf.processing.processing_omni_video import CHAT_TEMPLATE, SYSTEM_PROMPT, OmniVideoProcessor
from omni_video_hf.shapes.scene import FPS, NUM_FRAMES, SIDE
from omni_video_hf.tasks import IMAGE_GENERATION_TOKEN, TASKS, VIDEO_GENERATION_TOKEN

from .tokenizers import BOS, EOS, PAD, TEXT_EOS, TEXT_PAD, VOCABULARY_SIZE, mllm_tokenizer, text_tokenizer

MAX_BYTES = 25_000_000
# Upstream's conversation with a shorter system prompt: its own would be half of every prompt, and cost as much time.
SHORT_SYSTEM_PROMPT = "You see and draw shapes."
MLLM_FRAMES = 4  # of a clip; each costs the MLLM 16 tokens
CONTEXT_SIZE = 128  # width of umT5, of the adapter and of what the decoder attends to
VISION_TOKEN_SIZE = 128

# Wan 2.2's residual, patchified form: 8 pixels and 4 frames a latent, 16 channels.
VAE = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 16,  # measured when it is trained
    "latents_std": [1.0] * 16,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
TEXT_ENCODER = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": CONTEXT_SIZE,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
LANGUAGE_MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    # Of the whole model. 0.02 is for widths of thousands: from 0.06 the loss was half of its after 80 steps.
    "initializer_range": 0.05,
}
VISION_TOWER = {  # 8x8 patches, merged to 16 tokens an image
    "model_type": "siglip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,  # the last is never built
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
VISION_HEAD = {
    "mllm_hidden_size": LANGUAGE_MODEL["hidden_size"],
    "hidden_size": VISION_TOKEN_SIZE,
    "intermediate_size": 384,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
}
ADAPTER = {
    "vision_hidden_size": VISION_TOKEN_SIZE,
    "hidden_size": CONTEXT_SIZE,
    "intermediate_size": 384,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_query_tokens": 16,  # 16 for an image, 64 for a video
    "latent_channels": VAE["z_dim"],
    "visual_context_size": 128,
    "visual_context_patch_size": [1, 2, 2],  # 80 tokens for a clip
    "max_context_length": 192,  # a clip to edit takes 80, visual tokens 64, markers 6, the longest prompt about 20
}
DECODER = {  # 80 tokens for a clip
    "patch_size": [1, 2, 2],
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": VAE["z_dim"],
    "out_channels": VAE["z_dim"],
    "text_dim": CONTEXT_SIZE,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 8,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
SOURCE_CONDITIONING = "both"  # once the decoder has learned edits, see `training.train_edit`
_IMAGE = {
    "height": SIDE,
    "width": SIDE,
    "num_frames": 1,
    "fps": None,
    "num_inference_steps": 20,
    "guidance_scale": 2.0,
    "flow_shift": 3.0,
}
_VIDEO = _IMAGE | {"num_frames": NUM_FRAMES, "fps": FPS}
PRESETS = {"t2i": _IMAGE, "t2v": _VIDEO, "i2i": _IMAGE, "v2v": _VIDEO, "i2v": _VIDEO}


def processor() -> OmniVideoProcessor:
    """The processor, its tokenizer trained on the data set's texts."""
    image_processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    tokens_per_image = VilaConfig(vision_config=VISION_TOWER).image_seq_length
    return OmniVideoProcessor(
        image_processor,
        mllm_tokenizer(),
        chat_template=CHAT_TEMPLATE.replace(SYSTEM_PROMPT, SHORT_SYSTEM_PROMPT),
        num_image_tokens=tokens_per_image,
        num_frames=MLLM_FRAMES,
        mllm_frames="all",  # the first frame alone shows no motion, and an edit is to keep it
    )


def empty_instruction(processor: OmniVideoProcessor) -> BatchFeature:
    """What the MLLM is shown for the null branch: the conversation of `t2v` about nothing."""
    task = TASKS["t2v"]
    messages = [
        {"role": "user", "content": task.user.format(prompt="")},
        {"role": "assistant", "content": task.answer},
    ]
    return processor(text=processor.apply_chat_template(messages), return_tensors="pt")


def config(**overrides: Any) -> OmniVideoConfig:
    """Configuration of the whole model; `adapter_config=None, decoder_config=None` leaves the MLLM's half."""
    tokenizer = mllm_tokenizer()
    token_ids = tokenizer.convert_tokens_to_ids
    text_config = LANGUAGE_MODEL | {
        "bos_token_id": token_ids(BOS),
        "eos_token_id": token_ids(EOS),
        "pad_token_id": token_ids(PAD),
    }
    values = {
        "mllm_config": {
            "model_type": "vila",
            "text_config": text_config,
            "vision_config": dict(VISION_TOWER),
            "image_token_id": VOCABULARY_SIZE,
        },
        "vision_head_config": VISION_HEAD | {"null_length": empty_instruction(processor())["input_ids"].shape[1]},
        "adapter_config": dict(ADAPTER),
        "decoder_config": dict(DECODER),
        "image_generation_token_id": token_ids(IMAGE_GENERATION_TOKEN),
        "video_generation_token_id": token_ids(VIDEO_GENERATION_TOKEN),
    }
    return OmniVideoConfig(**(values | overrides))


def model(**overrides: Any) -> OmniVideoForConditionalGeneration:
    """The untrained model; arguments as in [`config`]."""
    return OmniVideoForConditionalGeneration(config(**overrides))


def vae() -> AutoencoderKLWan:
    """The untrained VAE."""
    return AutoencoderKLWan(**VAE)


def text_encoder() -> UMT5EncoderModel:
    """The untrained text encoder."""
    tokenizer = text_tokenizer()
    pad, eos = tokenizer.convert_tokens_to_ids([TEXT_PAD, TEXT_EOS])
    return UMT5EncoderModel(UMT5Config(**TEXT_ENCODER, pad_token_id=pad, eos_token_id=eos))


def scheduler() -> UniPCMultistepScheduler:
    """As upstream samples."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def pipeline() -> OmniVideoPipeline:
    """The whole pipeline, untrained: what training starts from, and the shape of what it ships."""
    whole = model()
    half = model(adapter_config=None, decoder_config=None)
    half.mllm, half.vision_head = whole.mllm, whole.vision_head
    return OmniVideoPipeline(
        processor=processor(),
        mllm=half.eval(),  # without dropout, as `from_pretrained` has it
        adapter=whole.adapter.eval(),
        transformer=whole.decoder.eval(),
        text_encoder=text_encoder().eval(),
        tokenizer=text_tokenizer(),
        vae=vae().eval(),
        scheduler=scheduler(),
        presets=PRESETS,
    )


def num_parameters(pipe: OmniVideoPipeline) -> dict[str, int]:
    """How many numbers each part stores: parameters and persistent buffers."""
    parts = {
        "SigLIP and projector": [pipe.mllm.mllm.model.vision_tower, pipe.mllm.mllm.model.multi_modal_projector],
        "Llama": [pipe.mllm.mllm.model.language_model, pipe.mllm.mllm.lm_head],
        "vision head": [pipe.mllm.vision_head],
        "adapter": [pipe.adapter],
        "decoder": [pipe.transformer],
        "text encoder": [pipe.text_encoder],
        "VAE": [pipe.vae],
    }
    return {name: sum(map(_stored_numbers, modules)) for name, modules in parts.items()}


def _stored_numbers(module: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in module.state_dict().values()}  # tied ones once
    return sum(tensors.values())


def size_table(pipe: OmniVideoPipeline) -> Table:
    """Parameters and megabytes of every part, in half and in full precision."""
    table = Table(title=f"omni-video-shapes, at most {MAX_BYTES / 1e6:.0f} MB")
    for header in ("part", "parameters", "MB, bf16 or fp16", "MB, fp32"):
        table.add_column(header, justify="left" if header == "part" else "right")
    numbers = num_parameters(pipe)
    for name, number in [*numbers.items(), ("all", sum(numbers.values()))]:
        megabytes = [f"{number * dtype.itemsize / 1e6:.2f}" for dtype in (torch.float16, torch.float32)]
        table.add_row(name, f"{number:,}", *megabytes, end_section=name == "VAE")
    return table


__all__ = [
    "MAX_BYTES",
    "PRESETS",
    "config",
    "empty_instruction",
    "model",
    "num_parameters",
    "pipeline",
    "processor",
    "scheduler",
    "size_table",
    "text_encoder",
    "vae",
]


if __name__ == "__main__":
    Console().print(size_table(pipeline()))
