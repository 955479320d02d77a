"""The fitted model, run on images."""

from .device import resolve_device
from .engine import Engine
from .evaluate import evaluate, run
from .results import attention_maps, fused_features, probabilities

__all__ = [
    "Engine",
    "attention_maps",
    "evaluate",
    "fused_features",
    "probabilities",
    "resolve_device",
    "run",
]
