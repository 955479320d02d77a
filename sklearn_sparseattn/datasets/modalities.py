"""What four microscopes make of the same cells. Each function: maps on patches -> camera images.

OPD maps, off-axis holograms and event frames see the refractive index of the living cell; the
brightfield camera sees the absorption of a stained smear.
"""

from __future__ import annotations

import numpy as np

from .population import Cells, rolled
from .projection import FIELD_OF_VIEW, Frame, Maps, paste, project

# Refractive indices relative to the medium (cytoplasm) and to the cytoplasm (the rest).
INDEX_CYTOPLASM, INDEX_NUCLEUS, INDEX_GRANULE = 0.028, 0.018, 0.09
LIVE_CHROMATIN = 0.4  # contrast of chromatin without stain, relative to that with
WAVELENGTH = 0.633
DEFOCUS = 1.0  # micrometres
CARRIER = (0.3, 0.3)  # cycles per pixel down and across: keeps clear of the zeroth order
ELECTRONS_PER_LEVEL = 40.0
EVENT_THRESHOLD = 0.12
OBLIQUITY = 2.0  # relative change of intensity for a slope of 1
# Optical density per channel (R, G, B) of each absorber at its usual concentration.
STAIN_NUCLEUS = (1.15, 1.45, 0.50)
STAIN_CYTOPLASM = (0.20, 0.26, 0.06)
STAIN_BASIC = (0.55, 0.75, 0.25)
STAIN_ACID = (0.12, 0.55, 0.45)
STAIN_RED_CELL = (0.22, 0.36, 0.24)
LAMP = (250.0, 232.0, 208.0)


def path_difference(cells: Cells, maps: Maps) -> np.ndarray:
    """Optical path difference on the patches, (n, P, P) float32, in micrometres."""
    opd = maps.body * maps.rough
    opd *= INDEX_CYTOPLASM
    opd += INDEX_NUCLEUS * maps.nucleus * (1 + LIVE_CHROMATIN * (maps.chromatin - 1))
    opd += INDEX_GRANULE * maps.granules
    opd *= cells.density.astype(np.float32)[:, None, None]
    return opd


def opd_images(cells: Cells, maps: Maps, frame: Frame, noise: float, rng: np.random.Generator) -> np.ndarray:
    """OPD maps as retrieved by a phase microscope, float32, in micrometres."""
    image = paste(path_difference(cells, maps), frame)
    image += _aberration(frame, 0.008 * noise, rng)
    image += (0.006 * noise) * _speckle(image.shape, rng)
    return image


def hologram_images(
    cells: Cells, maps: Maps, frame: Frame, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Off-axis holograms: interference with a tilted reference wave, shot noise, uint8.

    A camera never sits quite in focus, so the cell wave differs in strength as well as in phase.
    """
    n, (height, width) = len(cells.radius), frame.shape
    opd = path_difference(cells, maps)
    strength = np.exp(0.5 * paste(_defocus_contrast(opd, frame), frame))
    phase = paste(opd, frame)
    phase += _aberration(frame, 0.008 * noise, rng)
    phase += (0.004 * noise) * _speckle(phase.shape, rng)
    phase *= 2 * np.pi / WAVELENGTH
    rows, cols = np.arange(height)[:, None], np.arange(width)[None, :]
    # The path between the arms drifts from frame to frame; the tilt of the mirror does not.
    drift = rng.uniform(0, 2 * np.pi, size=(n, 1, 1)).astype(np.float32)
    phase += (2 * np.pi * (CARRIER[0] * rows + CARRIER[1] * cols)).astype(np.float32)
    phase += drift
    image = np.cos(phase, out=phase)
    image *= strength
    image *= rng.uniform(0.4, 0.46, size=(n, 1, 1)).astype(np.float32)  # visibility
    image += 0.5 * (1 + strength**2)
    image *= rng.uniform(98, 106, size=(n, 1, 1)).astype(np.float32)  # laser
    return to_camera(image, noise, rng)


def event_images(
    cells: Cells, maps: Maps, frame: Frame, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Event frames: signed threshold crossings while the cell rolls along the channel, int8."""
    n = len(cells.radius)
    step = rng.uniform(0.8, 1.1, size=n)
    roll = step / cells.radius * rng.uniform(0.7, 1.0, size=n)
    columns = np.maximum(1, np.rint(step / frame.pixel)).astype(int)
    after = rolled(cells, roll)
    change = paste(_log_intensity(after, project(after, frame), frame), frame, shift=columns)
    change -= paste(_log_intensity(cells, maps, frame), frame)
    change += (0.36 * noise**0.5 * EVENT_THRESHOLD) * rng.standard_normal(change.shape, dtype=np.float32)
    change /= EVENT_THRESHOLD
    return np.clip(np.trunc(change, out=change), -127, 127, out=change).astype(np.int8)


def brightfield_images(
    cells: Cells, maps: Maps, frame: Frame, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Stained smear: Beer-Lambert absorption in RGB among red cells, (n, H, W, 3) uint8."""
    n = len(cells.radius)
    absorbers = [paste(absorber, frame) for absorber in stained(cells, maps)]
    red = _red_cells(cells, frame, rng)
    red *= np.maximum(0, 1 - 3 * absorbers[1])
    strength = np.exp(0.13 * rng.normal(size=(4, n, 1, 1))).astype(np.float32)
    tint = cells.granule_tint.astype(np.float32)[:, None, None]
    lamp = rng.uniform(0.95, 1.02, size=(n, 1, 1)).astype(np.float32)
    images = np.empty((n, *frame.shape, 3), dtype=np.uint8)
    for channel in range(3):
        dye = (1 - tint) * STAIN_BASIC[channel] + tint * STAIN_ACID[channel]
        coefficients = (
            STAIN_NUCLEUS[channel] * strength[0],
            STAIN_CYTOPLASM[channel] * strength[1],
            dye.astype(np.float32) * strength[2],
        )
        density = red * (STAIN_RED_CELL[channel] * strength[3])
        for coefficient, absorber in zip(coefficients, absorbers, strict=True):
            density += coefficient * absorber
        np.negative(density, out=density)
        level = np.exp(density, out=density)
        level *= LAMP[channel] * lamp
        images[..., channel] = to_camera(level, noise, rng)
    return images


def stained(cells: Cells, maps: Maps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Amounts of nuclear, cytoplasmic and granular dye on the patches, about 1 where present.

    A smear dries flat, so that the amount of dye hardly follows the thickness of the living cell.
    """
    inside = np.sqrt(maps.nucleus / (1.3 * cells.radius.astype(np.float32)[:, None, None]))
    nucleus = np.minimum(np.sqrt(inside), 1.05) * maps.chromatin
    body = np.sqrt(maps.body / (1.5 * cells.radius.astype(np.float32)[:, None, None]))
    granules = 1.3 * maps.granules * (1 - 0.5 * np.minimum(nucleus, 1))
    return _soften(nucleus), _soften(body * maps.rough), granules


def _red_cells(cells: Cells, frame: Frame, rng: np.random.Generator) -> np.ndarray:
    """Amount of haemoglobin, (n, H, W): biconcave discs side by side around the cell."""
    height, width = frame.shape
    spacing = 7.6 / frame.pixel
    rows = np.arange(-spacing, height + spacing, spacing)
    cols = np.arange(-spacing, width + spacing, spacing)
    grid = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1)
    grid[1::2, :, 1] += spacing / 2
    grid = grid.reshape(-1, 2)
    canvas = np.zeros((len(cells.radius), height, width), dtype=np.float32)
    for image, centre, cell_radius in zip(canvas, frame.centre, cells.radius, strict=True):
        places = grid + spacing * (rng.random(2) - 0.5 + 0.16 * rng.normal(size=grid.shape))
        places = places[rng.random(len(grid)) < 0.75]
        radius = (3.3 + 0.25 * rng.normal(size=len(places))) / frame.pixel
        gap = places - centre
        distance = np.hypot(gap[:, 0], gap[:, 1]) + 1e-9
        apart = np.maximum(distance, 1.02 * cell_radius / frame.pixel + 0.95 * radius)
        places = centre + gap * (apart / distance)[:, None]
        oval, pallor = 0.12 * rng.normal(size=(2, len(places))), rng.uniform(0.4, 0.9, len(places))
        for place, size, stretch, pale in zip(places, radius, oval.T, pallor, strict=True):
            _add_disc(image, place, size, stretch, pale)
    return canvas


def _add_disc(
    image: np.ndarray, place: np.ndarray, radius: float, stretch: np.ndarray, pallor: float
) -> None:
    """Lay one red cell into `image` (H, W), in place; overlapping discs add up in part."""
    low = np.maximum(0, np.ceil(place - 1.3 * radius)).astype(int)
    high = np.minimum(image.shape, np.floor(place + 1.3 * radius).astype(int) + 1)
    if (high <= low).any():
        return
    y = ((np.arange(low[0], high[0]) - place[0]) / radius).astype(np.float32)[:, None]
    x = ((np.arange(low[1], high[1]) - place[1]) / radius).astype(np.float32)[None, :]
    square = (1 + stretch[0]) * y**2 + (1 - stretch[0]) * x**2 + stretch[1] * y * x
    edge = np.clip((1 - square) * (0.35 * radius), 0, 1)
    disc = edge * (1 - pallor * np.exp(-4 * square))
    window = image[low[0] : high[0], low[1] : high[1]]
    np.maximum(window, disc + 0.3 * window * edge, out=window)


def _log_intensity(cells: Cells, maps: Maps, frame: Frame) -> np.ndarray:
    """Log intensity of the cell on its patch under oblique light.

    Light from the left brightens slopes of the path difference that face it and darkens the
    others, up to what the aperture passes; the cell also absorbs a little.
    """
    opd = path_difference(cells, maps)
    slope = np.zeros_like(opd)
    np.subtract(opd[:, :, 2:], opd[:, :, :-2], out=slope[:, :, 1:-1])
    slope *= OBLIQUITY / (2 * frame.pixel)
    np.tanh(slope, out=slope)
    slope -= opd
    return slope


def _defocus_contrast(opd: np.ndarray, frame: Frame) -> np.ndarray:
    """Log intensity of a phase object slightly out of focus (transport of intensity).

    To first order it is minus the defocus times the Laplacian of the path difference; the aperture
    bounds it where the path difference has a kink.
    """
    smooth = _soften(opd)
    contrast = np.zeros_like(opd)
    contrast[:, 1:-1, 1:-1] = (
        4 * smooth[:, 1:-1, 1:-1]
        - (smooth[:, 2:, 1:-1] + smooth[:, :-2, 1:-1])
        - (smooth[:, 1:-1, 2:] + smooth[:, 1:-1, :-2])
    )
    contrast *= DEFOCUS / frame.pixel**2
    return 0.7 * np.tanh(contrast / 0.7)


def _soften(patches: np.ndarray) -> np.ndarray:
    """Blur by (1, 2, 1) / 4 along both axes, the reach of the objective."""
    out = patches.copy()
    out[:, 1:-1] = 0.5 * patches[:, 1:-1] + 0.25 * (patches[:, 2:] + patches[:, :-2])
    rows = out.copy()
    out[:, :, 1:-1] = 0.5 * rows[:, :, 1:-1] + 0.25 * (rows[:, :, 2:] + rows[:, :, :-2])
    return out


def _aberration(frame: Frame, size: float, rng: np.random.Generator) -> np.ndarray:
    """Draw what is left of the optics after correction: a plane and a bowl, (n, H, W)."""
    n, (height, width) = len(frame.centre), frame.shape
    y = ((np.arange(height) - (height - 1) / 2) * (2 * frame.pixel / FIELD_OF_VIEW))[:, None]
    x = ((np.arange(width) - (width - 1) / 2) * (2 * frame.pixel / FIELD_OF_VIEW))[None, :]
    weight = (size * rng.normal(size=(5, n, 1, 1))).astype(np.float32)
    rows = weight[0] * y.astype(np.float32) + weight[1] * (y**2).astype(np.float32) + weight[2]
    cols = weight[3] * x.astype(np.float32) + weight[4] * (x**2).astype(np.float32)
    return rows + cols


def _speckle(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Coherent noise of unit variance, correlated over neighbouring pixels, (n, H, W)."""
    n, height, width = shape
    noise = rng.standard_normal((n, height + 1, width + 1), dtype=np.float32)
    pairs = noise[:, 1:] + noise[:, :-1]
    return 0.5 * (pairs[:, :, 1:] + pairs[:, :, :-1])


def to_camera(level: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Add shot noise to grey levels in place and round them to uint8.

    At some thousand electrons a pixel the Poisson law is a normal one for all purposes.
    """
    shot = np.sqrt(level)
    shot *= rng.standard_normal(level.shape, dtype=np.float32)
    shot *= noise / np.sqrt(ELECTRONS_PER_LEVEL)
    level += shot
    level += 0.5
    return np.clip(level, 0, 255, out=level).astype(np.uint8)
