"""Model files and ONNX: how large, how fast, and how near to the classifier they come.

    python benchmarks/persistence.py    # writes persistence.json and the table in benchmarks/README.md

For each modality a fit with default settings but few epochs, then 1,250 images that it has not seen, 1,000
of cells and 250 of noise, in both runtimes, 5,000 in all. Images are counted in which other tiles were
chosen than by the classifier: scores that differ in their last digit only come in another order.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from report import machine, put_into
from runtimes import environment

from sklearn_sparseattn import SparseAttnClassifier, export_onnx, load_model, save_model
from sklearn_sparseattn.datasets import make_cells

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "persistence.json", HERE / "README.md"
MODALITIES = ("brightfield", "event", "hologram", "opd")
IMAGE_SIZE, N_TRAIN, N_CELLS, N_NOISE, EPOCHS, BATCH = 135, 150, 1000, 250, 15, 25


def with_tiles(path):
    """The model with the chosen tiles, in ascending order, as a second output."""
    model = onnx.load(path)
    [at] = [i for i, node in enumerate(model.graph.node) if node.op_type == "NonZero"]
    tiles = model.graph.node[at + 2].output[0]  # gathered and brought into form
    model.graph.output.append(onnx.helper.make_tensor_value_info(tiles, onnx.TensorProto.INT64, None))
    return model.SerializeToString()


def in_onnx_runtime(content):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def in_openvino(content):
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = ov.Core()
    model = core.compile_model(core.read_model(content), "CPU", settings)
    return lambda images: [np.array(part) for part in model([images]).values()]


RUNTIMES = {"onnxruntime": in_onnx_runtime, "openvino": in_openvino}


def unseen(modality, data_range):
    """Images of cells, then of noise over the range of the fit."""
    cells = make_cells(N_CELLS, modality=modality, image_size=IMAGE_SIZE, random_state=1).images
    dtype = np.uint8 if cells.dtype == np.uint8 else np.float32
    noise = np.random.default_rng(2).uniform(*data_range, size=(N_NOISE, *cells.shape[1:]))
    return np.concatenate([cells.astype(dtype), noise.astype(dtype)])


def measure(modality, folder):
    cells = make_cells(N_TRAIN, modality=modality, image_size=IMAGE_SIZE, random_state=0)
    clf = SparseAttnClassifier(max_epochs=EPOCHS, random_state=0).fit(cells.images, cells.target)
    file, onnx_file = folder / "model.safetensors", folder / "model.onnx"
    save_model(clf, file)
    seconds = []
    for _ in range(20):
        start = time.process_time()  # of this process, whatever else the machine does
        load_model(file)
        seconds.append(time.process_time() - start)
    export_onnx(clf, onnx_file)
    images = unseen(modality, clf.data_range_)
    expected, chosen = clf.predict_proba(images), np.sort(clf.attention_maps(images).tiles, axis=1)
    found = {
        "file_bytes": file.stat().st_size,
        "onnx_bytes": onnx_file.stat().st_size,
        "load_ms": {"median": 1e3 * float(np.median(seconds)), "most": 1e3 * max(seconds)},
        "n_images": len(images),
        "k": clf.k_,
        "runtimes": {},
    }
    for name, open_runtime in RUNTIMES.items():
        run = open_runtime(with_tiles(onnx_file))
        parts = [run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        probabilities, tiles = (np.concatenate(part) for part in zip(*parts, strict=True))
        apart, same = np.abs(probabilities - expected).max(axis=1), (tiles == chosen).all(axis=1)
        found["runtimes"][name] = {
            "most_apart_same_tiles": float(apart[same].max()),
            "n_other_tiles": int((~same).sum()),
            "most_apart_other_tiles": float(apart[~same].max(initial=0)),
            "n_beyond_1e-5": int((apart > 1e-5).sum()),
            "n_other_answers": int((probabilities.argmax(1) != expected.argmax(1)).sum()),
        }
    return found


def table(results):
    lines = [
        "| images | model file | `load_model` | runtime | difference, same tiles | other tiles chosen "
        "| difference there | beyond 1e-5 | other answers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for modality, found in results["modalities"].items():
        for name, run in found["runtimes"].items():
            lines.append(
                f"| {modality} | {found['file_bytes'] / 1024:.0f} KiB | {found['load_ms']['median']:.0f} ms "
                f"| `{name}` | {run['most_apart_same_tiles']:.1e} "
                f"| {run['n_other_tiles']} of {found['n_images']:,} "
                f"| {run['most_apart_other_tiles']:.1e} | {run['n_beyond_1e-5']} "
                f"| {run['n_other_answers']} |"
            )
    return "\n".join(lines)


def main():
    results = {"machine": machine() | environment(), "modalities": {}}
    with tempfile.TemporaryDirectory() as folder:
        for modality in MODALITIES:
            results["modalities"][modality] = measure(modality, Path(folder))
            print(modality, json.dumps(results["modalities"][modality]), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    put_into(README, "persistence", table(results))


if __name__ == "__main__":
    main()
