"""The fitted model, run on images."""

from .device import resolve_device
from .engine import Engine, is_plain
from .evaluate import evaluate, run
from .evidence import evidence_maps
from .occlusion import occlusion_maps
from .results import attention_maps, fused_features, probabilities

__all__ = [
    "Engine",
    "attention_maps",
    "evaluate",
    "evidence_maps",
    "fused_features",
    "is_plain",
    "occlusion_maps",
    "probabilities",
    "resolve_device",
    "run",
]
