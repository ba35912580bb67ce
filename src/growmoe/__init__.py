"""growmoe: grow a dense language model into a mixture of experts, with proof at every seam."""

__version__ = "0.1.0"
