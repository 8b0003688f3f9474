"""The processor: prompts, token ids, images and frames for the MLLM."""
