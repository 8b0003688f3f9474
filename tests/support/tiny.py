"""The only place where tiny models are made: real classes, small sizes, seeded random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from golden import CORE, VILA
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from omni_video_hf import OmniVideoConfig, OmniVideoForConditionalGeneration, OmniVideoPipeline, OmniVideoProcessor

TEXT = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 96,
    "eos_token_id": 97,
    "pad_token_id": 159,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
}
VISION_HEAD = {
    "mllm_hidden_size": 48,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "null_length": 9,
}
ADAPTER = {
    "vision_hidden_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_query_tokens": 6,
    "visual_context_size": 16,
    "null_prompt_length": 3,
    "max_context_length": 96,
}
DECODER = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def config(**overrides: object) -> OmniVideoConfig:
    """Configuration of a whole tiny model."""
    values = {
        "mllm_config": {
            "model_type": "vila",
            "text_config": dict(TEXT),
            "vision_config": dict(VISION),
            "image_token_id": 160,
        },
        "vision_head_config": dict(VISION_HEAD),
        "adapter_config": dict(ADAPTER),
        "decoder_config": dict(DECODER),
        "image_generation_token_id": 98,
        "video_generation_token_id": 99,
    }
    return OmniVideoConfig(**(values | overrides))


def model(seed: int = 0, **overrides: object) -> OmniVideoForConditionalGeneration:
    """A whole model whose every tensor, null states and markers too, is random."""
    built = OmniVideoForConditionalGeneration(config(**overrides)).eval()
    randomize(built, seed)
    return built


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """
    Weights at the scale of trained ones.

    The usual initialisation is so small at these widths that a part could be left out without a test noticing.
    """
    generator = torch.Generator().manual_seed(seed)
    persistent = [
        (name, buffer)
        for name, buffer in module.named_buffers()
        if name.endswith(("embeds.weight", "null_hidden_states.weight"))
    ]
    for name, tensor in [*module.named_parameters(), *persistent]:
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1 and name.endswith("weight") and "embed_tokens" not in name:
            tensor.copy_(noise * tensor[0].numel() ** -0.5)
        elif name.endswith("weight") and tensor.ndim == 1:
            tensor.copy_(1 + 0.1 * noise)
        else:
            tensor.copy_(noise * (0.1 if tensor.ndim == 1 else 1.0))


def mllm_inputs(batch: int = 2, images: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids and pixels of prompts with `images` images each."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 90, (batch, 9), generator=generator)
    ids = torch.cat([torch.full((batch, 4 * images), 160), text], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs["pixel_values"] = torch.randn(batch * images, 3, 42, 42, generator=generator)
    return inputs


def processor(**overrides: object) -> OmniVideoProcessor:
    """Processor on the golden checkpoint's tokenizer: one id a character, special tokens in Llama-3's order."""
    tokenizer = AutoTokenizer.from_pretrained(VILA / "checkpoint" / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    image_processor = SiglipImageProcessorPil(size={"height": 42, "width": 42})
    return OmniVideoProcessor(image_processor, tokenizer, **({"num_image_tokens": 4} | overrides))


def vae() -> AutoencoderKLWan:
    """Wan 2.1's VAE, four channels wide."""
    torch.manual_seed(1)
    return AutoencoderKLWan(base_dim=4, num_res_blocks=1).eval()


def text_encoder() -> UMT5EncoderModel:
    """umT5 of one layer."""
    torch.manual_seed(2)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).eval()


def scheduler() -> UniPCMultistepScheduler:
    """Upstream's solver."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


PRESET = {"height": 32, "width": 64, "num_frames": 5, "fps": 8, "num_inference_steps": 2, "guidance_scale": 3.0}
PRESET = PRESET | {"flow_shift": 5.0}
PRESETS = {
    task: PRESET | ({"num_frames": 1, "fps": None} if task.endswith("i") else {})
    for task in ("t2i", "t2v", "i2i", "v2v", "i2v")
}


def pipeline(seed: int = 0, vision_width: int = 24, **adapter: object) -> OmniVideoPipeline:
    """A pipeline over the parts of [`model`]."""
    head = VISION_HEAD | {"hidden_size": vision_width}
    adapter = ADAPTER | {"vision_hidden_size": vision_width} | adapter
    whole = model(seed, vision_head_config=head, adapter_config=adapter)
    without = config(vision_head_config=head, adapter_config=None, decoder_config=None)
    half = OmniVideoForConditionalGeneration(without).eval()
    half.mllm, half.vision_head = whole.mllm, whole.vision_head
    tokenizer = AutoTokenizer.from_pretrained(CORE / "omni_ckpts" / "wan" / "wanxiang1_3b" / "google" / "umt5-xxl")
    return OmniVideoPipeline(
        processor=processor(),
        mllm=half,
        adapter=whole.adapter,
        transformer=whole.decoder,
        text_encoder=text_encoder(),
        tokenizer=tokenizer,
        vae=vae(),
        scheduler=scheduler(),
        presets=PRESETS,
    )


def decoder() -> WanTransformer3DModel:
    """The decoder alone."""
    built = WanTransformer3DModel(**DECODER).eval()
    randomize(built, 3)
    return built


def folder(path: Path, component: torch.nn.Module) -> Path:
    """Save a component and return where."""
    component.save_pretrained(path)
    return path
