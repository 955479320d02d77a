"""`make_cells`: labelled images of generated cells, as four kinds of microscope see them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.utils import Bunch, check_random_state, check_scalar

from . import modalities
from .population import CLASS_NAMES, draw_cells
from .projection import draw_frame, draw_texture, masks_of, paste, project

_RENDERERS = {
    "opd": modalities.opd_images,
    "hologram": modalities.hologram_images,
    "event": modalities.event_images,
    "brightfield": modalities.brightfield_images,
}
_DESCRIPTIONS = {
    "opd": "optical path difference in micrometres, float32",
    "hologram": "off-axis hologram, grey levels, uint8",
    "event": "event frame, signed number of threshold crossings, int8",
    "brightfield": "stained smear, RGB, uint8",
}
_DTYPES = {"opd": np.float32, "hologram": np.uint8, "event": np.int8, "brightfield": np.uint8}
_MIN_SIDE = 8
CHUNK_PIXELS = 2**20
CHUNK_IMAGES = 64


def make_cells(
    n_samples: int | Sequence[int] = 1000,
    *,
    modality: str = "opd",
    n_classes: int = 3,
    weights: Sequence[float] | None = None,
    image_size: int | tuple[int, int] = 135,
    difficulty: float = 0.5,
    return_masks: bool = False,
    random_state: int | np.random.RandomState | np.random.Generator | None = None,
) -> Bunch:
    """Generate labelled images of biological cells.

    One physical model underlies all modalities: a cell is a body with a rough membrane, a nucleus
    of one to five lobes and granules, in three dimensions. The classes are caricatures of the five
    white blood cells. They differ in the number and spacing of the lobes, in number and size of the
    granules and in the roughness of the membrane; size and nucleus/cytoplasm ratio differ
    little, and all traits overlap between classes. Every cell has its own place, orientation and
    size. The shorter side of an image is 20 micrometres, a cell about half of that.

    Parameters
    ----------
    n_samples : int or sequence of int, default=1000
        Number of images, or the number of each class.
    modality : {"opd", "hologram", "event", "brightfield"}, default="opd"
        What the microscope records, see `images` below.
    n_classes : int, default=3
        Number of classes, 2 to 5, in the order lymphocyte, monocyte, neutrophil, eosinophil,
        basophil.
    weights : sequence of float of length n_classes, default=None
        Shares of the classes, scaled to sum to 1. None means equal shares. Not to be combined with
        a sequence for `n_samples`.
    image_size : int or (int, int), default=135
        Side of the images, or (H, W), in pixels; at least 8. Holograms want about 100 or more: the
        fringes carry the detail, and few pixels hold few fringes.
    difficulty : float, default=0.5
        From 0 to 1. With it the class means come closer, the spread within a class grows, and so
        does the noise of the camera. At the default, logistic regression on the pixels stays
        clearly behind a small convolutional network, and neither size nor mean brightness tells
        the classes apart.
    return_masks : bool, default=False
        Whether to return the ground truth of body and nucleus as well.
    random_state : int, RandomState, Generator or None, default=None
        Seed or generator; the same int gives the same data. With None the data is new at every
        call. Global generators are never touched, unless handed in.

    Returns
    -------
    cells : :class:`~sklearn.utils.Bunch`
        With the keys

        images : ndarray
            - "opd": (n, H, W) float32, optical path difference in micrometres, the background
              around 0, cells up to about 0.5;
            - "hologram": (n, H, W) uint8, off-axis interference fringes at 633 nm with a carrier
              of (0.3, 0.3) cycles per pixel and shot noise;
            - "event": (n, H, W) int8, how many contrast thresholds of 12 percent the log intensity
              has risen (positive) or fallen (negative) while the cell rolled on to the
              right; mostly 0;
            - "brightfield": (n, H, W, 3) uint8, RGB of a stained smear with red cells around.
        target : ndarray of shape (n,), int64
            Class numbers, in random order.
        target_names : ndarray of shape (n_classes,), str
            Names of the classes.
        masks : ndarray of shape (n, H, W), uint8
            0 background, 128 cytoplasm, 255 nucleus; in an event frame, before the movement. Only
            if `return_masks`.
        modality : str
            As given.
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
    load_image_folder : Real images instead.

    Notes
    -----
    Images are made in chunks of a fixed size, each with a generator of its own, so that memory
    beyond the result is bounded.

    Examples
    --------
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(20, modality="opd", image_size=32, random_state=0)
    >>> cells.images.shape, cells.images.dtype
    ((20, 32, 32), dtype('float32'))
    >>> print(*cells.target_names)
    lymphocyte monocyte neutrophil
    >>> int(make_cells([30, 10], n_classes=2, image_size=16, random_state=0).target.sum())
    10
    """
    if modality not in _RENDERERS:
        raise ValueError(f"modality must be one of {sorted(_RENDERERS)}, got {modality!r}.")
    check_scalar(n_classes, "n_classes", Integral, min_val=2, max_val=len(CLASS_NAMES))
    check_scalar(difficulty, "difficulty", Real, min_val=0, max_val=1)
    check_scalar(return_masks, "return_masks", (bool, np.bool_))
    shape = check_image_size(image_size)
    counts = class_counts(n_samples, n_classes, weights)
    seed = draw_seed(random_state)
    target = np.repeat(np.arange(n_classes, dtype=np.int64), counts)
    np.random.default_rng([seed, 0]).shuffle(target)
    data = _render(target, modality, shape, float(difficulty), bool(return_masks), seed)
    names = np.array(CLASS_NAMES[:n_classes])
    per_class = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return Bunch(
        **data,
        target=target,
        target_names=names,
        modality=modality,
        DESCR=(
            f"Generated cells ({_DESCRIPTIONS[modality]}): {len(target)} images of "
            f"{shape[0]} x {shape[1]} pixels, difficulty {difficulty}; {per_class}."
        ),
    )


def _render(
    target: np.ndarray,
    modality: str,
    shape: tuple[int, int],
    difficulty: float,
    return_masks: bool,
    seed: int,
) -> dict[str, Any]:
    """Render all images, chunk by chunk, into arrays made beforehand."""
    n = len(target)
    colour = (3,) if modality == "brightfield" else ()
    data = {"images": np.empty((n, *shape, *colour), dtype=_DTYPES[modality])}
    if return_masks:
        data["masks"] = np.empty((n, *shape), dtype=np.uint8)
    texture = draw_texture(shape, np.random.default_rng([seed, 1]))
    noise = 0.5 + difficulty
    size = int(np.clip(CHUNK_PIXELS // (shape[0] * shape[1]), 1, CHUNK_IMAGES))
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        rng = np.random.default_rng([seed, 2, start])
        cells = draw_cells(target[rows], difficulty, rng)
        frame = draw_frame(cells, shape, texture, rng)
        maps = project(cells, frame)
        data["images"][rows] = _RENDERERS[modality](cells, maps, frame, noise, rng)
        if return_masks:
            data["masks"][rows] = paste(masks_of(maps), frame)
    return data


def draw_seed(random_state: int | np.random.RandomState | np.random.Generator | None) -> int:
    """One integer that decides everything; None takes fresh entropy, not the global generator."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    return int(check_random_state(random_state).randint(2**31 - 1))


def check_image_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (H, W)."""
    sides = (image_size,) * 2 if isinstance(image_size, (int, np.integer)) else image_size
    try:
        height, width = sides
    except (TypeError, ValueError):
        raise TypeError(f"image_size must be an int or a pair (H, W), got {image_size!r}.") from None
    for side in (height, width):
        check_scalar(side, "image_size", Integral, min_val=_MIN_SIDE)
    return int(height), int(width)


def class_counts(
    n_samples: int | Sequence[int], n_classes: int, weights: Sequence[float] | None
) -> np.ndarray:
    """Count the images of each class: as given, or shares rounded so that the sum is right."""
    if not isinstance(n_samples, Integral):
        counts = np.asarray(n_samples)
        if counts.shape != (n_classes,) or counts.dtype.kind not in "iu" or (counts < 0).any():
            raise ValueError(
                f"n_samples must be an int, or n_classes={n_classes} non-negative ints, got {n_samples!r}."
            )
        if weights is not None:
            raise ValueError(
                f"weights={weights!r} cannot be combined with counts in n_samples={n_samples!r}; "
                "give one of the two."
            )
        if counts.sum() == 0:
            raise ValueError(f"n_samples must have at least one image, got {n_samples!r}.")
        return counts.astype(np.int64)
    check_scalar(n_samples, "n_samples", Integral, min_val=1)
    shares = np.ones(n_classes) if weights is None else np.asarray(weights, dtype=float)
    if shares.shape != (n_classes,) or not (np.isfinite(shares).all() and (shares >= 0).all()):
        raise ValueError(f"weights must be n_classes={n_classes} non-negative numbers, got {weights!r}.")
    if shares.sum() <= 0:
        raise ValueError(f"weights must have a positive sum, got {weights!r}.")
    exact = int(n_samples) * shares / shares.sum()
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: int(n_samples) - counts.sum()]] += 1
    return counts
