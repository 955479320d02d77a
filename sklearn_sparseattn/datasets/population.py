"""The cells themselves: what the classes differ in, and cells drawn at random in three dimensions.

Lengths are micrometres, in a frame whose origin is the centre of the cell; z is the optical axis.
Nothing here knows about pixels or cameras.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLASS_NAMES = ("lymphocyte", "monocyte", "neutrophil", "eosinophil", "basophil")
MAX_LOBES = 5
MAX_GRANULES = 96
N_HARMONICS = 32
RADIUS_LIMITS = (3.5, 6.5)

# One column a class. Size and nucleus/cytoplasm ratio differ little and overlap widely, so that
# a class is told by its fine detail, as in a real blood film.
RADIUS = np.array([4.9, 5.2, 5.05, 5.1, 5.0])
NUCLEUS_FRACTION = np.array([0.44, 0.42, 0.40, 0.39, 0.42])  # of the cell's projected area
LOBE_SPACING = np.array([0.70, 0.85, 1.70, 1.75, 1.15])  # in lobe radii; below 1 lobes fuse
GRANULE_COUNT = np.array([9.0, 19.0, 40.0, 34.0, 24.0])
GRANULE_SIZE = np.array([0.25, 0.23, 0.24, 0.34, 0.42])
ROUGHNESS = np.array([0.011, 0.032, 0.018, 0.018, 0.026])  # of the radius
CHROMATIN = np.array([0.28, 0.16, 0.26, 0.22, 0.14])  # relative contrast inside the nucleus
GRANULE_TINT = np.array([0.25, 0.25, 0.30, 0.75, 0.10])  # 0: basic dye, purple; 1: eosin, orange
LOBE_PROBABILITY = np.array(
    [
        [0.86, 0.14, 0.00, 0.00, 0.00],
        [0.15, 0.55, 0.30, 0.00, 0.00],
        [0.01, 0.14, 0.42, 0.30, 0.13],
        [0.04, 0.74, 0.20, 0.02, 0.00],
        [0.25, 0.45, 0.25, 0.05, 0.00],
    ]
)


@dataclass(frozen=True)
class Cells:
    """Some cells, each an ellipsoidal body with a lobed nucleus, granules and a rough membrane.

    Attributes
    ----------
    radius : ndarray of shape (n,)
        Mean radius of the body.
    outline : ndarray of shape (n, N_HARMONICS), complex
        Fourier series of the outline, relative to the radius.
    ruffle : ndarray of shape (n, N_HARMONICS)
        How fast each harmonic's phase runs when the cell rolls.
    lobes : ndarray of shape (n, 2 * MAX_LOBES - 1, 3)
        Centres of the nuclear lobes, then of the bridges between neighbours.
    lobe_radius : ndarray of shape (n, 2 * MAX_LOBES - 1)
        Their radii, 0 where a cell has fewer.
    granules : ndarray of shape (n, MAX_GRANULES, 3)
        Centres of the granules.
    granule_weight : ndarray of shape (n, MAX_GRANULES)
        Optical strength, 0 where a cell has fewer.
    granule_size, granule_tint, roughness, chromatin, density : ndarray of shape (n,)
        Radius of the granules, their dye (0 basic, 1 acid), relative contrast of the membrane's
        folds and of the chromatin, and dry-mass density relative to the average cell.
    """

    radius: np.ndarray
    outline: np.ndarray
    ruffle: np.ndarray
    lobes: np.ndarray
    lobe_radius: np.ndarray
    granules: np.ndarray
    granule_weight: np.ndarray
    granule_size: np.ndarray
    granule_tint: np.ndarray
    roughness: np.ndarray
    chromatin: np.ndarray
    density: np.ndarray


def draw_cells(target: np.ndarray, difficulty: float, rng: np.random.Generator) -> Cells:
    """Draw one cell for each class number in `target`.

    Parameters
    ----------
    target : ndarray of shape (n,), int
        Indices into `CLASS_NAMES`.
    difficulty : float in [0, 1]
        At 0 the class means are far apart and the spread is small, at 1 the other way round.
    rng : numpy.random.Generator
        Source of all draws.

    Returns
    -------
    cells : Cells
    """
    n = len(target)
    separation, spread = 1.3 - 0.6 * difficulty, 0.6 + 0.8 * difficulty

    def trait(means: np.ndarray, sd: float) -> np.ndarray:
        middle = means.mean()
        return (middle + separation * (means - middle))[target] + spread * sd * rng.normal(size=n)

    def log_trait(means: np.ndarray, sd: float) -> np.ndarray:
        return np.exp(trait(np.log(means), sd))

    radius = np.clip(trait(RADIUS, 0.40), *RADIUS_LIMITS)
    roughness = log_trait(ROUGHNESS, 0.25)
    fraction = np.clip(trait(NUCLEUS_FRACTION, 0.05), 0.2, 0.65)
    spacing = np.clip(trait(LOBE_SPACING, 0.22), 0.4, 2.1)
    n_lobes = _draw_lobe_counts(target, difficulty, rng)
    rotation = _random_orientation(n, rng)
    lobes, lobe_radius = _draw_nucleus(radius, fraction, spacing, n_lobes, rng)
    granule_size = np.clip(log_trait(GRANULE_SIZE, 0.12), 0.12, 0.6)
    granules, granule_weight = _draw_granules(radius, log_trait(GRANULE_COUNT, 0.25), rng)
    return Cells(
        radius=radius,
        outline=draw_outline(roughness, rng),
        ruffle=rng.normal(scale=2.0, size=(n, N_HARMONICS)),
        lobes=lobes @ rotation,
        lobe_radius=lobe_radius,
        granules=granules,
        granule_weight=granule_weight,
        granule_size=granule_size,
        granule_tint=np.clip(trait(GRANULE_TINT, 0.2), 0.0, 1.0),
        roughness=roughness,
        chromatin=np.clip(trait(CHROMATIN, 0.05), 0.02, 0.5),
        density=np.exp(rng.normal(scale=0.10, size=n)),
    )


def rolled(cells: Cells, angle: np.ndarray) -> Cells:
    """Return the cells turned by `angle` (n,), in radians, about the y axis.

    The body stays where it is; what is inside turns with it, and the outline changes as other
    folds of the membrane come to the rim.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0], turn[:, 0, 2] = cos, -sin
    turn[:, 2, 0], turn[:, 2, 2] = sin, cos
    turn[:, 1, 1] = 1.0
    state = {name: getattr(cells, name) for name in cells.__dataclass_fields__}
    state["lobes"] = cells.lobes @ turn
    state["granules"] = cells.granules @ turn
    state["outline"] = cells.outline * np.exp(1j * cells.ruffle * angle[:, None])
    return Cells(**state)


def _draw_lobe_counts(target: np.ndarray, difficulty: float, rng: np.random.Generator) -> np.ndarray:
    """Draw 1 to MAX_LOBES lobes a cell; difficulty mixes in what all classes have in common."""
    shared = 0.16 * difficulty
    table = (1 - shared) * LOBE_PROBABILITY + shared * LOBE_PROBABILITY.mean(axis=0)
    cumulative = np.cumsum(table, axis=1)[target]
    return 1 + (rng.random((len(target), 1)) > cumulative[:, :-1]).sum(axis=1)


def draw_outline(roughness: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fourier series of the outline: a slight oval that says nothing, and the rough membrane."""
    n = len(roughness)
    order = np.arange(N_HARMONICS)
    amplitude = np.zeros((n, N_HARMONICS))
    amplitude[:, 2:5] = 0.08 / order[2:5] ** 1.2
    rough = order >= 6
    amplitude[:, rough] = 1.8 * roughness[:, None] / np.sqrt(rough.sum())
    noise = rng.normal(size=(2, n, N_HARMONICS))
    return amplitude * (noise[0] + 1j * noise[1]) / np.sqrt(2)


def _draw_nucleus(
    radius: np.ndarray,
    fraction: np.ndarray,
    spacing: np.ndarray,
    n_lobes: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Lobes along an arc in the plane z = 0, with thinner bridges between neighbours."""
    n = len(radius)
    index = np.arange(MAX_LOBES)
    lobe_radius = (radius * np.sqrt(fraction / n_lobes))[:, None]
    arc = 0.62 * (radius[:, None] - lobe_radius)
    step = 2 * np.arcsin(np.minimum(1.0, spacing[:, None] * lobe_radius / (2 * arc)))
    # Five lobes far apart would close the ring and meet again.
    step = np.minimum(step, 1.7 * np.pi / n_lobes[:, None])
    angle = step * (index - (n_lobes[:, None] - 1) / 2 + 0.12 * rng.normal(size=(n, MAX_LOBES)))
    distance = arc * (1 + 0.12 * rng.normal(size=(n, MAX_LOBES)))
    # A single lobe sits anywhere from the middle to the rim.
    distance *= np.where(n_lobes == 1, 1.3 * rng.random(n), 1.0)[:, None]
    height = 0.08 * radius[:, None] * rng.normal(size=(n, MAX_LOBES))
    lobes = np.stack([distance * np.cos(angle), distance * np.sin(angle), height], axis=-1)
    size = lobe_radius * np.exp(0.1 * rng.normal(size=(n, MAX_LOBES)))
    size[index >= n_lobes[:, None]] = 0.0
    bridges = (lobes[:, 1:] + lobes[:, :-1]) / 2
    thin = np.where(size[:, 1:] > 0, 0.45 * size[:, :-1], 0.0)
    return np.concatenate([lobes, bridges], axis=1), np.concatenate([size, thin], axis=1)


def _draw_granules(
    radius: np.ndarray, count: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Granules spread evenly through the ball of 0.9 radii."""
    shape = (len(radius), MAX_GRANULES)
    direction = rng.normal(size=(*shape, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    distance = 0.9 * radius[:, None] * np.cbrt(rng.random(shape))
    weight = np.exp(0.25 * rng.normal(size=shape) + 0.2 * rng.normal(size=(len(radius), 1)))
    weight[np.arange(MAX_GRANULES) >= np.round(count)[:, None]] = 0.0
    return direction * distance[..., None], weight


def _random_orientation(n: int, rng: np.random.Generator) -> np.ndarray:
    """Rotation matrices (n, 3, 3): any angle in the image plane, a moderate tilt out of it."""
    spin, tilt = 2 * np.pi * rng.random(n), 0.35 * rng.normal(size=n)
    matrix = np.zeros((n, 3, 3))
    matrix[:, 0, 0], matrix[:, 0, 1] = np.cos(spin), np.sin(spin)
    matrix[:, 1, 0], matrix[:, 1, 1] = -np.sin(spin), np.cos(spin)
    matrix[:, 2, 2] = 1.0
    lean = np.zeros((n, 3, 3))
    lean[:, 0, 0] = 1.0
    lean[:, 1, 1], lean[:, 1, 2] = np.cos(tilt), np.sin(tilt)
    lean[:, 2, 1], lean[:, 2, 2] = -np.sin(tilt), np.cos(tilt)
    return lean @ matrix
