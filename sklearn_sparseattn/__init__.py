"""Sparse attention for cell images, as scikit-learn estimators."""

from .classifier import SparseAttnClassifier
from .display import AttentionDisplay
from .pixel_set import PixelSetTransformer
from .training import DynamicK

__all__ = ["AttentionDisplay", "DynamicK", "PixelSetTransformer", "SparseAttnClassifier"]
