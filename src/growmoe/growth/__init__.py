"""Checkpoint to checkpoint: pure tensor functions read lazily, one output tensor at a time.

Every operation is a `Source` wrapped around another one, so operations compose, need memory for a
few tensors only, and are verified before anything is published.
"""
