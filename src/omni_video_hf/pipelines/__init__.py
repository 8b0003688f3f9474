"""The diffusers pipeline: its call in steps, checks of requests, presets, guidance, schedulers, LoRA, memory."""
