"""The peers of efficiency.py, scaling.py and fields.py, and the runtimes that suit them best.

Each runtime gives, for a peer, a batch size and a number of streams, a unit of work: a function that returns
how many images it did. A peer does the work of `predict_proba`: from bytes to probabilities. What is not
installed is left out.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import torch
from peers import TWINS, Logits, lenet, mobilenetv2, with_channels
from report import machine
from torch import nn

BUILDERS = {**TWINS, "mobilenetv2": mobilenetv2, "lenet": lenet}
NEEDS = {"mobilenetv2": ("transformers",)}


class FromBytes(nn.Module):
    """(n, C, H, W) of uint8 -> probabilities."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        """Probabilities, (n, n_classes)."""
        return self.network(images.float() / 255).softmax(-1)


class Peer:
    """A network in evaluation mode, its ONNX file and its batches; `images` are uint8."""

    def __init__(self, name, images, threads, onnx=None):
        self.name, self.threads, self.onnx = name, threads, onnx
        self.images = torch.from_numpy(with_channels(images)).permute(0, 3, 1, 2).contiguous()

    @cached_property
    def network(self):
        """Batch norms are set to these images: fresh ones let values fade to denormals, which are slow."""
        _, n_channels, height, width = self.images.shape
        network = FromBytes(Logits(BUILDERS[self.name], (height, width, n_channels), 3))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            network.train()(self.images[:16])
        return network.eval()

    def batch(self, n):
        """Some images, again from the first where there are fewer."""
        return self.images[torch.arange(n) % len(self.images)].contiguous()

    def export(self, folder):
        """Write the ONNX file, for any batch size."""
        self.onnx = str(Path(folder) / f"{self.name}-{self.images.shape[2]}.onnx")
        names = {"input_names": ["images"], "output_names": ["probabilities"]}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter calls itself deprecated; the new one fuses less
            axes = {"images": {0: "n"}, "probabilities": {0: "n"}}
            torch.onnx.export(
                self.network, (self.batch(2),), self.onnx, dynamic_axes=axes, dynamo=False, **names
            )


# ---- runtimes: (peer, batch, streams) -> a unit of work that returns how many images it did ----


def onnx_runtime(peer, batch, streams):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = peer.threads // streams, 1
    sessions = [
        onnxruntime.InferenceSession(peer.onnx, options, providers=["CPUExecutionProvider"])
        for _ in range(streams)
    ]
    feed = {"images": peer.batch(batch).numpy()}
    n_each = max(1, 64 // batch) if streams > 1 else 1
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
    queue, n_batches = ov.AsyncInferQueue(compiled, streams), streams * max(1, 64 // batch)
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
    precision: str
    needs: tuple


RUNTIMES = {
    "onnxruntime": Runtime(onnx_runtime, "fp32", ("onnx", "onnxruntime")),
    "openvino": Runtime(openvino, "fp32", ("onnx", "openvino")),
    "openvino_bf16": Runtime(partial(openvino, precision="bf16"), "bf16", ("onnx", "openvino")),
}


def runtimes_of(name):
    """The runtimes that a peer is measured in: MobileNetV2 in that which was the fastest in float32."""
    names = ["openvino"] if name == "mobilenetv2" else list(RUNTIMES)
    return {name: RUNTIMES[name] for name in names}


def has_bfloat16():
    """Whether the processor computes with bfloat16; where it does not, a runtime would use float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(machine()["vectors"]))


def missing(names):
    return [name for name in names if util.find_spec(name) is None]


def left_out(what, reason):
    print(f"{what} left out: {reason}", flush=True)


def open_peers(names, images, threads, folder):
    """Build and export those that can be; the others are said to be left out."""
    peers = {}
    for name in names:
        if lacking := missing(NEEDS.get(name, ())):
            left_out(name, f"not installed: {', '.join(lacking)} (extra `benchmarks`)")
            continue
        peers[name] = Peer(name, images, threads)
        if not missing(("onnx",)):
            peers[name].export(folder)
    return peers


def environment():
    """The machine with the versions of what ran, and the compiled engine's vector extension."""
    from sklearn_sparseattn.inference.library import load

    names = ("torch", "onnxruntime", "openvino", "transformers")
    versions = {n: metadata.version(n) for n in names if not missing((n,))}
    library = load().library
    engine = None if library is None else library.sparseattn_extension().decode()
    return machine() | {"versions": versions, "engine": engine}
