"""Cells projected along the optical axis onto pixels: thickness maps on a patch around each cell.

Only the patch is computed, since most of an image is background; `paste` puts it in its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .population import RADIUS_LIMITS, Cells

FIELD_OF_VIEW = 20.0  # micrometres along the shorter side of the image
FLATNESS = 0.75  # height of a cell over its width
N_ANGLES = 512
TEXTURE_SIZE = 512
PATCH_RADIUS = 1.3 * RADIUS_LIMITS[1]  # the largest cell with its roughness


@dataclass(frozen=True)
class Frame:
    """Where the cells of one chunk lie on the camera.

    Attributes
    ----------
    shape : tuple of int
        Height and width in pixels.
    pixel : float
        Side of a pixel in micrometres.
    centre : ndarray of shape (n, 2)
        Row and column of each cell's centre, in pixels, fractional.
    texture : ndarray of shape (TEXTURE_SIZE, TEXTURE_SIZE), float32
        Random field of mean 0 and variance 1 from which folds and chromatin are cut.
    offset : ndarray of shape (n, 2), int
        Where each cell's cut begins.
    """

    shape: tuple[int, int]
    pixel: float
    centre: np.ndarray
    texture: np.ndarray
    offset: np.ndarray

    @property
    def half(self) -> int:
        """Half the side of a patch in pixels; a patch has 2 * half + 1 of them."""
        return int(np.ceil(PATCH_RADIUS / self.pixel))


@dataclass(frozen=True)
class Maps:
    """Projections of the cells on their patches, (n, P, P) float32, in micrometres.

    `body`, `nucleus` and `granules` are path lengths through each; `rough` and `chromatin` are
    relative modulations around 1.
    """

    body: np.ndarray
    nucleus: np.ndarray
    granules: np.ndarray
    rough: np.ndarray
    chromatin: np.ndarray


def pixel_size(shape: tuple[int, int]) -> float:
    """Side of a pixel in micrometres for an image of `shape` (H, W)."""
    return FIELD_OF_VIEW / min(shape)


def draw_texture(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw a periodic random field with detail of about 0.4 micrometres, mean 0 and variance 1."""
    freq = np.fft.fftfreq(TEXTURE_SIZE, d=pixel_size(shape))
    radial = np.hypot(freq[:, None], freq[None, : TEXTURE_SIZE // 2 + 1])
    noise = np.fft.rfft2(rng.standard_normal((TEXTURE_SIZE, TEXTURE_SIZE)))
    band = np.exp(-((radial / 0.9) ** 2)) * (1 - np.exp(-((radial / 0.25) ** 2)))
    field = np.fft.irfft2(noise * band, s=(TEXTURE_SIZE, TEXTURE_SIZE))
    return (field / (field.std() + 1e-12)).astype(np.float32)


def draw_frame(cells: Cells, shape: tuple[int, int], texture: np.ndarray, rng: np.random.Generator) -> Frame:
    """Put each cell at a random place, wholly inside the image where it fits."""
    n, pixel = len(cells.radius), pixel_size(shape)
    side = np.array(shape, dtype=float)
    free = np.maximum(0.0, side / 2 - 1.1 * cells.radius[:, None] / pixel)
    centre = (side - 1) / 2 + 0.5 * free * rng.uniform(-1, 1, size=(n, 2))
    offset = rng.integers(0, TEXTURE_SIZE, size=(n, 2))
    return Frame(shape=shape, pixel=pixel, centre=centre, texture=texture, offset=offset)


def project(cells: Cells, frame: Frame) -> Maps:
    """Project cells to path lengths through body, nucleus and granules."""
    y, x = _coordinates(frame)
    level = _body_level(cells, frame, y, x)
    body = np.sqrt(level)
    body *= (2 * FLATNESS * cells.radius).astype(np.float32)[:, None, None]
    nucleus = _nucleus(cells, y, x)
    np.minimum(nucleus, body, out=nucleus)
    granules = _granules(cells, frame, y, x)
    granules *= level > 0
    folds = _cut(frame, frame.offset)
    rough = 1 + (2.5 * cells.roughness).astype(np.float32)[:, None, None] * folds
    clumps = _cut(frame, frame.offset[:, ::-1] + TEXTURE_SIZE // 2)
    chromatin = 1 + cells.chromatin.astype(np.float32)[:, None, None] * clumps
    return Maps(body=body, nucleus=nucleus, granules=granules, rough=rough, chromatin=chromatin)


def masks_of(maps: Maps) -> np.ndarray:
    """Ground truth on the patches: 0 background, 128 cytoplasm, 255 nucleus, uint8."""
    mask = np.where(maps.body > 0, np.uint8(128), np.uint8(0))
    mask[maps.nucleus > 0] = 255
    return mask


def paste(patches: np.ndarray, frame: Frame, shift: np.ndarray | None = None) -> np.ndarray:
    """Put patches (n, P, P) into images (n, H, W) of zeros, `shift` (n,) columns to the right."""
    height, width = frame.shape
    canvas = np.zeros((len(patches), height, width), dtype=patches.dtype)
    corner = np.rint(frame.centre).astype(int) - frame.half
    if shift is not None:
        corner[:, 1] += shift
    side = patches.shape[1]
    for image, patch, (top, left) in zip(canvas, patches, corner, strict=True):
        rows = slice(max(0, top), max(0, min(height, top + side)))
        cols = slice(max(0, left), max(0, min(width, left + side)))
        image[rows, cols] = patch[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
    return canvas


def _coordinates(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Distances of a patch's rows (n, P, 1) and columns (n, 1, P) from the cell's centre."""
    ticks = np.arange(-frame.half, frame.half + 1)
    rest = frame.centre - np.rint(frame.centre)
    y = (ticks - rest[:, :1]) * frame.pixel
    x = (ticks - rest[:, 1:]) * frame.pixel
    return y[:, :, None].astype(np.float32), x[:, None, :].astype(np.float32)


def _body_level(cells: Cells, frame: Frame, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return 1 - (r / R)^2 inside the outline R of each cell and 0 outside."""
    spectrum = np.zeros((len(cells.radius), N_ANGLES // 2 + 1), dtype=complex)
    spectrum[:, : cells.outline.shape[1]] = cells.outline * N_ANGLES / 2
    outline = cells.radius[:, None] * np.clip(1 + np.fft.irfft(spectrum, n=N_ANGLES, axis=1), 0.7, 1.25)
    # Angles are taken from the middle of the patch, so that one table serves all cells: the
    # fraction of a pixel by which a cell is off turns its outline by next to nothing.
    ticks = np.arange(-frame.half, frame.half + 1)
    angle = np.arctan2(ticks[:, None], ticks[None, :])
    index = np.rint(angle * (N_ANGLES / (2 * np.pi))).astype(int) % N_ANGLES
    level = np.take((-1 / outline**2).astype(np.float32), index, axis=1)
    level *= y**2 + x**2
    level += 1
    return np.maximum(level, 0, out=level)


def _nucleus(cells: Cells, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Path length through the union of the lobes; spheres, so 2 sqrt(r^2 - d^2)."""
    lobes, size = cells.lobes.astype(np.float32), cells.lobe_radius.astype(np.float32)
    best = np.zeros((len(size), y.shape[1], x.shape[2]), dtype=np.float32)
    for lobe in range(size.shape[1]):
        if not size[:, lobe].any():
            continue
        column = (x - lobes[:, lobe, 0, None, None]) ** 2
        row = size[:, lobe, None, None] ** 2 - (y - lobes[:, lobe, 1, None, None]) ** 2
        np.maximum(best, row - column, out=best)
    np.sqrt(best, out=best)
    best *= 2
    return best


def _granules(cells: Cells, frame: Frame, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Path length through the granules, Gaussian blobs: separable, so one matrix product."""
    size = cells.granule_size[:, None]
    # A granule smaller than a pixel keeps its volume.
    blur = np.sqrt(size**2 + (0.4 * frame.pixel) ** 2)
    peak = (2.5 * size**3 / blur**2 * cells.granule_weight).astype(np.float32)
    scale = (1 / (np.sqrt(2) * blur)).astype(np.float32)[:, :, None]
    place = cells.granules.astype(np.float32)
    across = np.exp(-(((x - place[:, :, :1]) * scale) ** 2))
    down = np.exp(-(((y.transpose(0, 2, 1) - place[:, :, 1:2]) * scale) ** 2))
    down *= peak[:, :, None]
    return down.transpose(0, 2, 1) @ across


def _cut(frame: Frame, offset: np.ndarray) -> np.ndarray:
    """Cut a patch of the periodic texture for each cell, beginning at `offset` (n, 2)."""
    ticks = np.arange(2 * frame.half + 1)
    rows = (offset[:, :1] + ticks) % TEXTURE_SIZE
    cols = (offset[:, 1:] + ticks) % TEXTURE_SIZE
    return frame.texture[rows[:, :, None], cols[:, None, :]]
