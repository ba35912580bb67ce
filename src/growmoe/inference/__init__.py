"""Text from a model, with a KV cache."""
