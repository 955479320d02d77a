"""What turns the model into a fitted one."""

from .dynamic_k import DynamicK
from .losses import consistency_loss, contrastive_loss, distillation_loss, focal_loss

__all__ = ["DynamicK", "consistency_loss", "contrastive_loss", "distillation_loss", "focal_loss"]
