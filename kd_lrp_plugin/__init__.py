"""Explanation-guided knowledge distillation for torchdistill and plain PyTorch loops."""

__version__ = "0.1.0"
