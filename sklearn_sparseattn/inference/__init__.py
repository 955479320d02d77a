"""The fitted model, run on images."""

from .device import resolve_device
from .evaluate import evaluate
from .results import attention_maps, fused_features, probabilities

__all__ = ["attention_maps", "evaluate", "fused_features", "probabilities", "resolve_device"]
