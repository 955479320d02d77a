"""What a fitted classifier looked at and how its training went, as figures. Needs the extra `plot`."""

from .attention import AttentionDisplay
from .mean_attention import MeanAttentionDisplay
from .training import TrainingDisplay

__all__ = ["AttentionDisplay", "MeanAttentionDisplay", "TrainingDisplay"]
