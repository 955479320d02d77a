"""`make_fields`: fields of many cells, of which the one with a certain body inside decides the class.

The cells are those of `population` without a nucleus, stained as in a brightfield smear. Bodies and granules
are made of equally many, equally dark dots: only the arrangement of the dots differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
from sklearn.utils import Bunch, check_scalar

from .cells import CHUNK_IMAGES, CHUNK_PIXELS, check_image_size, class_counts, draw_seed
from .modalities import stained, to_camera
from .population import Cells, draw_outline
from .projection import TEXTURE_SIZE, Frame, draw_texture, pixel_size, project

_SCALE = (40, 40)  # an image of `make_cells` of this shape has pixels as large
PIXEL = pixel_size(_SCALE)  # 0.5 micrometres
RADIUS_LIMITS = (5.0, 6.5)  # micrometres: cells 20 to 26 pixels across
N_DOTS = 12  # of a body, and of the granules of a cell
DOT_SIZE = 0.5  # micrometres: strokes about 3 pixels wide
STAIN_CELL, STAIN_DOT = 0.35, 0.16  # optical density
LAMP = (215.0, 240.0)  # grey levels of the background
NOISE = 2.0  # relative to the shot noise of `modalities`
_MIN_SIDE = 40  # holds the largest cell with its outline
_MAX_CELLS = 45  # more do not find room on _UNIT_AREA
_UNIT_AREA = 256**2
_TRIES = 48

# Places of dots around 0, as complex numbers, in micrometres, so spaced that the dots of all bodies overlap
# about as much: then the histogram of the image does not tell the class.
_DOT = np.arange(N_DOTS)
BODIES = {
    "ring": 1.65 * np.exp(2j * np.pi * _DOT / N_DOTS),
    "pair": 0.8 * (_DOT % 6 - 2.5) + np.where(_DOT < 6, -1.4j, 1.4j),
    "crescent": 3.0 * np.exp(1j * (_DOT - 5.5) * 0.83 / 3.0) - 2.0,
    "cross": 0.79 * (1 + _DOT // 4) * 1j ** (_DOT % 4),
}
_SUNFLOWER = np.sqrt((_DOT + 0.5) / N_DOTS) * np.exp(2.4j * _DOT)  # evenly over the disc of radius 1


def make_fields(
    n_samples: int | Sequence[int] = 1000,
    *,
    image_size: int | tuple[int, int] = 256,
    n_classes: int = 3,
    n_cells: tuple[int, int] = (15, 40),
    random_state: int | np.random.RandomState | np.random.Generator | None = None,
) -> Bunch:
    """Generate fields of many cells of one kind, of which one decides the class.

    As in a blood smear with a single parasite, the cells look alike from outside, and one of them
    contains a body whose shape is the class. A fifth to three fifths of the others contain granules of the
    same total darkness. The number, size, place and stain of the cells and the light vary from field to
    field, independently of the class. At any `image_size` a cell is 20 to 26 pixels across, and the
    strokes of a body are about 3 pixels wide: a larger image shows a larger field.

    Parameters
    ----------
    n_samples : int or sequence of int, default=1000
        Number of fields, or the number of each class.
    image_size : int or (int, int), default=256
        Side of the images, or (H, W), in pixels; at least 40.
    n_classes : int, default=3
        Number of classes, 2 to 4, in the order ring, pair, crescent, cross.
    n_cells : (int, int), default=(15, 40)
        Fewest and most cells on 256 × 256 pixels, from 1 to 45. The number grows in proportion to the
        area; the deciding cell is always there. Near the upper end a few cells find no room and are left
        out.
    random_state : int, RandomState, Generator or None, default=None
        Seed or generator; the same int gives the same data. With None the data is new at every
        call. Global generators are never touched, unless handed in.

    Returns
    -------
    fields : :class:`~sklearn.utils.Bunch`
        With the keys

        images : ndarray of shape (n, H, W), uint8
            Grey levels of a brightfield camera: dark cells on a bright, noisy background.
        target : ndarray of shape (n,), int64
            Class numbers, in random order.
        target_names : ndarray of shape (n_classes,), str
            Names of the classes.
        masks : ndarray of shape (n, H, W), uint8
            0 background, 1 a cell, 2 the deciding cell, all of it.
        DESCR : str
            One paragraph on the data.

    Raises
    ------
    TypeError
        If a parameter is of the wrong type.
    ValueError
        If a parameter is out of its range, or lengths do not agree.

    See Also
    --------
    make_cells : Images of one cell each.

    Examples
    --------
    >>> from sklearn_sparseattn.datasets import make_fields
    >>> fields = make_fields(6, image_size=64, random_state=0)
    >>> fields.images.shape, fields.images.dtype
    ((6, 64, 64), dtype('uint8'))
    >>> print(*fields.target_names)
    ring pair crescent
    >>> bool((fields.masks == 2).any(axis=(1, 2)).all())
    True
    """
    check_scalar(n_classes, "n_classes", Integral, min_val=2, max_val=len(BODIES))
    shape = check_image_size(image_size)
    for side in shape:
        check_scalar(side, "image_size", Integral, min_val=_MIN_SIDE)
    _check_n_cells(n_cells)
    counts = class_counts(n_samples, n_classes, None)
    seed = draw_seed(random_state)
    target = np.repeat(np.arange(n_classes, dtype=np.int64), counts)
    np.random.default_rng([seed, 0]).shuffle(target)
    images, masks = _render(target, shape, n_cells, seed)
    names = list(BODIES)[:n_classes]
    per_class = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return Bunch(
        images=images,
        target=target,
        target_names=np.array(names),
        masks=masks,
        DESCR=(
            f"Generated fields of cells (brightfield, grey levels, uint8), one cell of each decides: "
            f"{len(target)} images of {shape[0]} x {shape[1]} pixels; {per_class}."
        ),
    )


def _check_n_cells(n_cells: tuple[int, int]) -> None:
    """Raise unless `n_cells` is a pair of ints in order and in range."""
    try:
        low, high = n_cells
    except (TypeError, ValueError):
        raise TypeError(f"n_cells must be a pair (fewest, most), got {n_cells!r}.") from None
    for number in (low, high):
        check_scalar(number, "n_cells", Integral, min_val=1, max_val=_MAX_CELLS)
    if low > high:
        raise ValueError(f"n_cells must be a pair (fewest, most) in this order, got {n_cells!r}.")


def _render(
    target: np.ndarray, shape: tuple[int, int], n_cells: tuple[int, int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images and masks, both (n, H, W) uint8, chunk by chunk."""
    images, masks = (np.empty((len(target), *shape), dtype=np.uint8) for _ in range(2))
    texture = draw_texture(_SCALE, np.random.default_rng([seed, 1]))
    size = int(np.clip(CHUNK_PIXELS // (shape[0] * shape[1]), 1, CHUNK_IMAGES))
    for start in range(0, len(target), size):
        rows = slice(start, start + size)
        rng = np.random.default_rng([seed, 2, start])
        images[rows], masks[rows] = _render_chunk(target[rows], shape, n_cells, texture, rng)
    return images, masks


def _render_chunk(
    target: np.ndarray,
    shape: tuple[int, int],
    n_cells: tuple[int, int],
    texture: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Images and masks, both (n, H, W) uint8, of some fields."""
    n = len(target)
    share = shape[0] * shape[1] / _UNIT_AREA
    wanted = np.maximum(1, np.rint(share * rng.uniform(*n_cells, size=n))).astype(int)
    radius = rng.uniform(5.3, 6.2, size=(n, 1)) * np.exp(0.05 * rng.normal(size=(n, wanted.max())))
    radius = np.clip(radius, *RADIUS_LIMITS)
    centre = _scatter(radius / PIXEL, wanted, shape, rng)
    placed = np.isfinite(centre[..., 0])
    field, column = np.nonzero(placed)
    kind = np.where(column == 0, target[field], -1)
    holding = (rng.random(len(kind)) < rng.uniform(0.2, 0.6, size=n)[field]) | (kind >= 0)
    cells = _draw_hosts(radius[placed], kind, holding, rng)
    offset = rng.integers(0, TEXTURE_SIZE, size=(len(kind), 2))
    frame = Frame(shape=shape, pixel=PIXEL, centre=centre[placed], texture=texture, offset=offset)
    maps = project(cells, frame)
    _, body, dots = stained(cells, maps)
    stain = np.exp(0.1 * rng.normal(size=(2, n)))[:, field] * cells.density
    stain = stain.astype(np.float32)[:, :, None, None]
    density = STAIN_CELL * stain[0] * body + STAIN_DOT * stain[1] * dots
    level = np.exp(-_collect(density, field, n, frame, np.add))
    level *= rng.uniform(*LAMP, size=(n, 1, 1)).astype(np.float32)
    labels = (maps.body > 0) * np.where(kind >= 0, 2, 1).astype(np.uint8)[:, None, None]
    return to_camera(level, NOISE, rng), _collect(labels, field, n, frame, np.maximum)


def _scatter(
    radius: np.ndarray, wanted: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Centres (n, C, 2), in pixels, of the first `wanted` (n,) cells of `radius` (n, C) of each field.

    The cells are wholly inside the image and hardly touch. A cell gets a number of tries; one that
    finds no room, or is not wanted, is at infinity. The first always finds room.
    """
    n, most = radius.shape
    side = np.array(shape) - 1
    centre = np.full((n, most, 2), np.inf)
    for cell in range(most):
        margin = 1.25 * radius[:, cell, None, None]  # no outline reaches further
        tries = margin + (side - 2 * margin) * rng.random((n, _TRIES, 2))
        gap = tries[:, :, None] - centre[:, None, :cell]
        apart = 1.12 * (radius[:, None, cell, None] + radius[:, None, :cell]) + 1
        free = (gap[..., 0] ** 2 + gap[..., 1] ** 2 > apart**2).all(axis=2)
        found = free.any(axis=1) & (cell < wanted)
        centre[found, cell] = tries[found, free[found].argmax(axis=1)]
    return centre


def _draw_hosts(radius: np.ndarray, kind: np.ndarray, holding: np.ndarray, rng: np.random.Generator) -> Cells:
    """Cells without nuclei. Those `holding` (n,) contain the body of class `kind` (n,); -1 is granules."""
    n = len(radius)
    shape = np.array(list(BODIES.values()))[kind] * np.exp(0.08 * rng.normal(size=(n, 1)))
    turn, direction, spin = np.exp(2j * np.pi * rng.random((3, n, 1)))
    room = np.maximum(0.82 * radius[:, None] - np.abs(shape).max(axis=1, keepdims=True), 0)
    body = shape * turn + room * np.sqrt(rng.random((n, 1))) * direction
    granules = 0.8 * radius[:, None] * _SUNFLOWER * spin
    granules += 0.4 * (rng.normal(size=granules.shape) + 1j * rng.normal(size=granules.shape))
    dots = np.where(kind[:, None] >= 0, body, granules)
    size = DOT_SIZE * np.exp(0.18 * rng.normal(size=n))
    weight = holding * (DOT_SIZE / size) ** 3  # the total darkness stays
    roughness = np.full(n, 0.03)
    return Cells(
        radius=radius,
        outline=draw_outline(roughness, rng),
        ruffle=np.zeros((n, 0)),
        lobes=np.zeros((n, 0, 3)),
        lobe_radius=np.zeros((n, 0)),
        granules=np.stack([dots.real, dots.imag, np.zeros(dots.shape)], axis=-1),
        granule_weight=np.repeat(weight[:, None], N_DOTS, axis=1),
        granule_size=size,
        granule_tint=np.zeros(n),
        roughness=roughness,
        chromatin=np.zeros(n),
        density=np.exp(rng.normal(scale=0.08, size=n)),
    )


def _collect(patches: np.ndarray, field: np.ndarray, n: int, frame: Frame, combine: np.ufunc) -> np.ndarray:
    """Combine the cells' patches (N, P, P) into images (n, H, W) of zeros; `field` (N,) says whose."""
    half, side = frame.half, patches.shape[1]
    height, width = frame.shape
    canvas = np.zeros((n, height + side, width + side), dtype=patches.dtype)  # patches may stick out
    corner = np.rint(frame.centre).astype(int)
    for patch, image, (top, left) in zip(patches, field, corner, strict=True):
        window = canvas[image, top : top + side, left : left + side]
        combine(window, patch, out=window)
    return canvas[:, half : half + height, half : half + width]
