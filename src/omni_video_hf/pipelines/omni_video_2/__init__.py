"""The pipeline of Omni-Video 2: two decoders (experts) behind a stock Qwen3-VL."""
