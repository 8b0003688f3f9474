"""MLLMs of other families than VILA, at tiny sizes, and what they read."""

import tiny
import torch

VISION = tiny.VISION | {"num_hidden_layers": 2, "image_size": 28}
QWEN = {
    "model_type": "qwen2_5_vl",
    "text_config": tiny.TEXT
    | {"model_type": "qwen2_5_vl_text", "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 3]}},
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    },
    "image_token_id": 150,
    "video_token_id": 151,
    "vision_start_token_id": 152,
    "vision_end_token_id": 153,
}
LLAVA = {
    "model_type": "llava",
    "text_config": tiny.TEXT,
    "vision_config": VISION,
    "image_token_index": 150,
    "vision_feature_select_strategy": "full",
}


def other_inputs(family: str) -> dict[str, torch.Tensor]:
    """A prompt of one image of four tokens, and one of none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 90, (2, 12), generator=generator)
    ids[:, 2:6] = 150
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "llava":
        return inputs | {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}
    ids[:, 1], ids[:, 6] = 152, 153
    grid = torch.tensor([[1, 4, 4]] * 2)
    pixels = torch.randn(32, 3 * 2 * 14 * 14, generator=generator)
    return inputs | {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 150).int()}
