"""Configurations and models: the MLLM, the connectors, and the whole model."""
