"""`import growmoe.hf` teaches transformers the architecture `growmoe`; see `models/hf.py`."""

from growmoe.models.hf import GrowmoeConfig, GrowmoeForCausalLM

__all__ = ["GrowmoeConfig", "GrowmoeForCausalLM"]
