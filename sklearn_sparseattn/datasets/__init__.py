"""Data to try things on: generated cells of four modalities, and folders of image files."""

from .cells import make_cells
from .folders import load_image_folder

__all__ = ["load_image_folder", "make_cells"]
