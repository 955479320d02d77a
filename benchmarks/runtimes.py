"""The peers of efficiency.py and scaling.py, and the runtimes that suit them best.

Each runtime gives, for a peer, a batch size and a number of streams, a unit of work: a function that returns
how many images it did. What is not installed is left out.
"""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peers import Logits, lenet, mobilenetv2, resnet50
from report import machine
from torch import nn

BUILDERS = {"mobilenetv2": mobilenetv2, "resnet50": resnet50, "lenet": lenet}
NEEDS = {"mobilenetv2": ("transformers",), "resnet50": ("transformers",), "lenet": ()}


class Peer:
    """A network in evaluation mode, its ONNX file and its batches."""

    def __init__(self, name, images, threads, onnx=None):
        self.name, self.threads, self.onnx = name, threads, onnx
        self.images = torch.from_numpy(images[:, None].astype(np.float32) / 255)

    @cached_property
    def network(self):
        """Channels last; batch norms set to these images: fresh ones let values fade to denormals."""
        network = Logits(BUILDERS[self.name], (*self.images.shape[2:], 1), 3)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            network.train()(self.images[:16])
        return network.eval()

    @cached_property
    def compiled(self):
        """By inductor; frozen, so that batch norms are folded and weights packed."""
        return torch.compile(self.network, dynamic=False, options={"freezing": True})

    def batch(self, n):
        """Some images, again from the first where there are fewer."""
        return self.images[torch.arange(n) % len(self.images)].contiguous()

    def export(self, folder):
        """Write the ONNX file, for any batch size."""
        self.onnx = str(Path(folder) / f"{self.name}.onnx")
        names = {"input_names": ["images"], "output_names": ["logits"]}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter calls itself deprecated; the new one fuses less
            axes = {"images": {0: "n"}, "logits": {0: "n"}}
            torch.onnx.export(
                self.network, (self.batch(2),), self.onnx, dynamic_axes=axes, dynamo=False, **names
            )


# ---- runtimes: (peer, batch, streams) -> a unit of work that returns how many images it did ----


def eager(peer, batch, streams, channels_last=True, bfloat16=False, compiled=False):
    images = peer.batch(batch)
    network = peer.compiled if compiled else peer.network
    if not channels_last:
        network = copy.deepcopy(peer.network.network).to(memory_format=torch.contiguous_format)

    def unit():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            network(images)
        return batch

    return unit


def onnx_runtime(peer, batch, streams):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = peer.threads // streams, 1
    sessions = [
        onnxruntime.InferenceSession(peer.onnx, options, providers=["CPUExecutionProvider"])
        for _ in range(streams)
    ]
    feed = {"images": peer.batch(batch).numpy()}
    n_each = max(1, 32 // batch) if streams > 1 else 1
    pool = ThreadPoolExecutor(streams)

    def work(session):
        for _ in range(n_each):
            session.run(None, feed)

    def unit():
        list(pool.map(work, sessions)) if streams > 1 else work(sessions[0])
        return streams * n_each * batch

    return unit


def openvino(peer, batch, streams, precision="f32"):
    import openvino as ov

    core = ov.Core()
    model = core.read_model(peer.onnx)
    model.reshape([batch, *peer.images.shape[1:]])
    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # by itself it takes bf16 where the processor has it
        "PERFORMANCE_HINT": "THROUGHPUT" if streams > 1 else "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": peer.threads,
        "ENABLE_HYPER_THREADING": True,
    }
    compiled = core.compile_model(model, "CPU", settings)
    images = ov.Tensor(peer.batch(batch).numpy(), shared_memory=True)
    if streams == 1:
        request = compiled.create_infer_request()
        request.set_input_tensor(images)

        def one():
            request.infer()
            return batch

        return one
    queue, n_batches = ov.AsyncInferQueue(compiled, streams), streams * max(1, 32 // batch)
    for request in queue:
        request.set_input_tensor(images)

    def unit():
        for _ in range(n_batches):
            queue.start_async()
        queue.wait_all()
        return n_batches * batch

    return unit


class Runtime(NamedTuple):
    """How a peer is run."""

    open: object
    precision: str = "fp32"
    needs: tuple = ()
    streams: tuple = (1,)
    compiles: bool = False


RUNTIMES = {
    "eager": Runtime(partial(eager, channels_last=False)),
    "channels_last": Runtime(eager),
    "channels_last_bf16": Runtime(partial(eager, bfloat16=True), "bf16"),
    "compile": Runtime(partial(eager, compiled=True), compiles=True),
    "onnxruntime": Runtime(onnx_runtime, "fp32", ("onnx", "onnxruntime"), (1, 2)),
    "openvino": Runtime(openvino, "fp32", ("onnx", "openvino"), (1, 2)),
    "openvino_bf16": Runtime(partial(openvino, precision="bf16"), "bf16", ("onnx", "openvino"), (1, 2)),
}


def missing(names):
    return [name for name in names if util.find_spec(name) is None]


def left_out(what, reason):
    print(f"{what} left out: {reason}", flush=True)


def open_peers(names, images, threads, folder):
    """Build and export those that can be; the others are said to be left out."""
    peers = {}
    for name in names:
        if lacking := missing(NEEDS[name]):
            left_out(name, f"not installed: {', '.join(lacking)} (extra `benchmarks`)")
            continue
        peers[name] = Peer(name, images, threads)
        if not missing(("onnx",)):
            peers[name].export(folder)
    return peers


def environment():
    """The machine with the versions of what ran."""
    names = ("torch", "onnxruntime", "openvino", "transformers")
    return machine() | {"versions": {n: metadata.version(n) for n in names if not missing((n,))}}
