"""
Models of the released one's shape at a fraction of its size: widths and tokens both divided, half the layers.

Attention grows with tokens squared times width, everything else with tokens times width squared; dividing both by the
same number divides all operations by its cube and leaves every proportion as it is. Heads keep their width and become
fewer, since the softmax costs the same however narrow they are.
"""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

from omni_video_hf import (
    OmniVideoAdapter,
    OmniVideoConfig,
    OmniVideoForConditionalGeneration,
    OmniVideoPipeline,
)
from omni_video_hf.models.configuration_omni_video import (
    WAN_2_1_T2V_1_3B,
    OmniVideoAdapterConfig,
    OmniVideoVisionHeadConfig,
)

# An MLLM of almost nothing: its states are handed to the pipeline, as it runs once per call in every path.
MLLM = {
    "model_type": "vila",
    "text_config": {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
    "image_token_id": 63,
}  # fmt: skip


def configuration(divisor: int = 4) -> OmniVideoConfig:
    """The released configuration divided, with half the layers; whole for a divisor of 1. The MLLM is a stand-in."""
    head, adapter = OmniVideoVisionHeadConfig(), OmniVideoAdapterConfig()
    mllm_width = head.mllm_hidden_size // divisor
    mllm = MLLM | {"text_config": MLLM["text_config"] | {"hidden_size": mllm_width}}
    decoder = dict(WAN_2_1_T2V_1_3B)
    for name in ("num_attention_heads", "text_dim", "freq_dim", "ffn_dim"):
        decoder[name] //= divisor
    halves = 1 if divisor == 1 else 2
    decoder["num_layers"] //= halves
    layers = {
        "num_encoder_layers": head.num_encoder_layers // halves,
        "num_decoder_layers": head.num_decoder_layers // halves,
        "num_attention_heads": head.num_attention_heads // divisor,
    }
    return OmniVideoConfig(
        mllm_config=mllm,
        vision_head_config=layers
        | {
            "mllm_hidden_size": mllm_width,
            "hidden_size": head.hidden_size // divisor,
            "intermediate_size": head.intermediate_size // divisor,
            "null_length": 164 // divisor,
        },
        adapter_config=layers
        | {
            "vision_hidden_size": adapter.vision_hidden_size // divisor,
            "hidden_size": adapter.hidden_size // divisor,
            "intermediate_size": adapter.intermediate_size // divisor,
            "num_query_tokens": adapter.num_query_tokens // divisor,
            "visual_context_size": adapter.visual_context_size // divisor,
            "max_context_length": adapter.max_context_length // divisor,
        },
        decoder_config=decoder,
    )


def whole_model(divisor: int = 4, seed: int = 0) -> OmniVideoForConditionalGeneration:
    """MLLM, bridges and decoder with random weights."""
    torch.manual_seed(seed)
    return OmniVideoForConditionalGeneration(configuration(divisor)).eval()


def pipeline(divisor: int = 4, seed: int = 0) -> OmniVideoPipeline:
    """A pipeline over the parts of [`whole_model`], without processor and text encoder."""
    whole = whole_model(divisor, seed)
    config = whole.config.to_dict() | {"adapter_config": None, "decoder_config": None}
    half = OmniVideoForConditionalGeneration(OmniVideoConfig(**config)).eval()
    half.mllm, half.vision_head = whole.mllm, whole.vision_head
    pipe = OmniVideoPipeline(
        processor=None,
        mllm=half,
        adapter=whole.adapter,
        transformer=whole.decoder,
        text_encoder=None,
        tokenizer=None,
        vae=AutoencoderKLWan(base_dim=96 // divisor).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class PlainPath:
    """
    Upstream's loop: vision head, adapter and visual context adapter in each of a step's two passes, a padded context.

    Args:
        head, adapter, decoder: the same modules as the pipeline's.
    """

    def __init__(self, head: torch.nn.Module, adapter: OmniVideoAdapter, decoder: WanTransformer3DModel) -> None:
        self.head, self.adapter, self.decoder = head, adapter, decoder

    @torch.no_grad()
    def sample(
        self,
        latents: torch.Tensor,
        scheduler: UniPCMultistepScheduler,
        mllm_hidden_states: torch.Tensor,
        prompt_embeds: torch.Tensor,
        source_latents: torch.Tensor | None,
        output_kind: str,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Latents, from the arguments of the pipeline's call."""
        scheduler.set_begin_index(0)
        for timestep in scheduler.timesteps:
            velocities = []
            for states, prompt in ((mllm_hidden_states, prompt_embeds), (None, None)):
                context = self.adapter(self.head(states), prompt, source_latents, output_kind=output_kind)
                context = self.adapter.pad_context(context).to(self.decoder.dtype)
                noisy = latents.to(self.decoder.dtype)
                velocities.append(self.decoder(noisy, timestep.expand(len(latents)), context).sample.float())
            velocity = velocities[1] + guidance_scale * (velocities[0] - velocities[1])
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents
