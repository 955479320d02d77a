"""Which device a network works on."""

import torch


def resolve_device(device: str | torch.device) -> torch.device:
    """Find the device, or say that it is not to be had.

    Parameters
    ----------
    device : str or torch.device
        "cpu", "cuda", "cuda:1", "mps" or "auto".

    Returns
    -------
    torch.device
        One that is there.

    Raises
    ------
    ValueError
        If the device is unknown or not there.
    """
    mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f'device={device!r} is unknown: "cpu", "cuda", "cuda:1", "mps" or "auto".'
        ) from error
    n_there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}.get(found.type, 0)
    if (found.index or 0) >= n_there:
        raise ValueError(f'device={str(device)!r} is not available here. "auto" takes what there is.')
    return found
