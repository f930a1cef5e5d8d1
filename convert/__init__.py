"""Checkpoints of PyTorch's in, and out again."""
