"""Models with random LoRA layers in every part, and what a pipeline gives with them."""

import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model

from omni_video_hf import OmniVideoPipeline

TARGETS = {
    "mllm": r"mllm\..*q_proj",
    "vision_head": r"vision_head\..*(q_proj|fc1)",
    "adapter": r"adapter\..*(v_proj|fc2)",
    "decoder": r"decoder\..*(to_k|to_v)",
}


def tuned_model(parts=tuple(TARGETS), **settings):
    """A model with random LoRA layers in the named parts."""
    model = tiny.model()
    pattern = "|".join(f"({TARGETS[part]})" for part in parts)
    options = {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_k": 2}} | settings
    inject_adapter_in_model(LoraConfig(target_modules=pattern, **options), model)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def outputs(pipe):
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    frames = pipe("rot", task="t2v", num_frames=5, generator=generator, **size).frames
    states = pipe.processor.apply_task_template("understand", "rot", return_tensors="pt")
    return frames, pipe.mllm(**states).logits


def with_parts(model):
    pipe = tiny.pipeline()
    return OmniVideoPipeline(**(pipe.components | model.pipeline_components()), presets=pipe.config.presets)
