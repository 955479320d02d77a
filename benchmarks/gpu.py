"""Ours and the peers on a GPU, for efficiency.py."""

import numpy as np
import torch
from ours import fitted, predicting
from timing import rate


def on_gpu(images, target, peers, plan):
    """Images a second by batch size; ours from uint8 arrays, peers from the memory of the GPU."""
    clf = fitted(images, target, plan.k, device="cuda")
    many, found = images[np.arange(2048) % len(images)], {}
    for batch in (64, 256, 2048):
        found.setdefault("tiles", {})[batch] = predicting(clf, many[:batch])
    for name, peer in peers.items():
        network = peer.network.cuda()
        for precision in ("fp32", "bf16"):
            for batch in (64, 256, 1024):
                work = gpu_unit(network, peer.batch(batch).cuda(), precision == "bf16")
                found.setdefault(f"{name}/{precision}", {})[batch] = work
    speeds = {}
    for name, units in found.items():
        for unit in units.values():
            unit()
        speeds[name] = {str(batch): rate(unit, plan.seconds) for batch, unit in units.items()}
    return {"speeds": speeds, "gpu": torch.cuda.get_device_name()}


def gpu_unit(network, images, bfloat16):
    def unit():
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            for _ in range(8):  # one wait for eight batches
                network(images)
        torch.cuda.synchronize()
        return 8 * len(images)

    return unit
