"""Sparse attention for cell images, as scikit-learn estimators."""

from .classifier import SparseAttnClassifier
from .display import AttentionDisplay, MeanAttentionDisplay, TrainingDisplay
from .export import export_onnx
from .persistence import load_model, save_model
from .pixel_set import PixelSetTransformer
from .report import write_report
from .training import DynamicK
from .versions import show_versions

__all__ = [
    "AttentionDisplay",
    "DynamicK",
    "MeanAttentionDisplay",
    "PixelSetTransformer",
    "SparseAttnClassifier",
    "TrainingDisplay",
    "export_onnx",
    "load_model",
    "save_model",
    "show_versions",
    "write_report",
]
