"""The PyTorch model; knows nothing of scikit-learn or skorch."""

from .coarse import CoarseAttention, strides_for
from .fine import FineAttention, PixelEmbedding
from .fusion import FusionClassifier
from .selection import openness, pixel_tokens, select_pixels
from .sparse_attn_net import SparseAttnNet, SparseAttnOutput
from .tiles import TileTokens

__all__ = [
    "CoarseAttention",
    "FineAttention",
    "FusionClassifier",
    "PixelEmbedding",
    "SparseAttnNet",
    "SparseAttnOutput",
    "TileTokens",
    "openness",
    "pixel_tokens",
    "select_pixels",
    "strides_for",
]
