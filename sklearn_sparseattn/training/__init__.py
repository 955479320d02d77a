"""What turns the model into a fitted one."""

from .dynamic_k import DynamicK
from .losses import contrastive_loss, distillation_loss, focal_loss

__all__ = ["DynamicK", "contrastive_loss", "distillation_loss", "focal_loss"]
