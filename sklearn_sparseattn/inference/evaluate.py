"""Run a fitted network over images, a few at a time.

Float64 throughout: what else is in the call changes an image's result by less than 1e-9, where in float32 it
could change which of two nearly equal pixels is chosen.
"""

import copy
from collections.abc import Iterator

import torch

from ..images import ImageRows, PixelScale, chunk_slices
from ..network import SparseAttnNet, SparseAttnOutput


def evaluate(
    network: SparseAttnNet, images: ImageRows, scale: PixelScale
) -> Iterator[tuple[slice, SparseAttnOutput]]:
    """Pass images through the network, in chunks of bounded memory.

    Parameters
    ----------
    network : SparseAttnNet
        Fitted; it is not changed. It works where it is, on MPS (which has no float64) on the CPU instead.
    images : ImageRows
        Validated.
    scale : PixelScale
        The map learned in the fit.

    Yields
    ------
    rows : slice
        Which images.
    output : SparseAttnOutput
        Their results, float64 on the CPU.

    Raises
    ------
    ValueError
        If values of X are so far outside the range of the fit that they overflow when scaled.
    """
    device = next(network.parameters()).device
    if device.type == "mps":
        device = torch.device("cpu")
    exact = copy.deepcopy(network).to(device=device, dtype=torch.float64).eval()
    for rows in chunk_slices(len(images), images.image_shape):
        batch = torch.from_numpy(scale.finite(images.read(rows))).to(device=device, dtype=torch.float64)
        with torch.inference_mode():
            output = SparseAttnOutput(*(part.cpu() for part in exact(batch)))
        yield rows, output
