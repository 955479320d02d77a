"""The PyTorch model; knows nothing of scikit-learn or skorch."""

from .coarse import CoarseAttention, strides_for
from .fine import FineAttention, PixelEmbedding
from .fusion import FusionClassifier
from .selection import pixel_tokens, select_pixel_set, select_pixels
from .sparse_attn_net import SparseAttnNet, SparseAttnOutput

__all__ = [
    "CoarseAttention",
    "FineAttention",
    "FusionClassifier",
    "PixelEmbedding",
    "SparseAttnNet",
    "SparseAttnOutput",
    "pixel_tokens",
    "select_pixel_set",
    "select_pixels",
    "strides_for",
]
