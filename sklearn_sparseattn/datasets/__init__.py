"""Data to try things on: generated cells and fields of cells, folders of image files."""

from .cells import make_cells
from .fields import make_fields
from .folders import load_image_folder

__all__ = ["load_image_folder", "make_cells", "make_fields"]
