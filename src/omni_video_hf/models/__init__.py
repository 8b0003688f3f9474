"""Configurations and models: the MLLM (VILA), vision head and adapter, the whole model, attention of the decoder."""
