"""The ONNX model answers as the classifier does, in ONNX Runtime and in OpenVINO."""

import json
import pickle
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from sklearn_sparseattn import SparseAttnClassifier, export_onnx
from sklearn_sparseattn.datasets import make_cells


def in_onnx_runtime(path, outputs=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(outputs, {"images": images})


def in_openvino(path):
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: list(model([images]).values())


RUNTIMES = {"onnxruntime": in_onnx_runtime, "openvino": in_openvino}


def fit(images, n_classes=3, **params):
    y = np.arange(len(images)) % n_classes
    return SparseAttnClassifier(**{"max_epochs": 2, "random_state": 0, **params}).fit(images, y)


def noise(n, shape, dtype, data_range=(0, 255)):
    values = np.random.default_rng(7).uniform(*data_range, size=(n, *shape))
    return values.astype(dtype)


def with_pixels(path):
    """The model with its chosen pixels as a second output, beside it."""
    model = onnx.load(path)
    [nonzero] = [node.output[0] for node in model.graph.node if node.op_type == "NonZero"]
    [gathered] = [node.output[0] for node in model.graph.node if nonzero in node.input]
    [pixels] = [node.output[0] for node in model.graph.node if gathered in node.input]
    model.graph.output.append(onnx.helper.make_tensor_value_info(pixels, onnx.TensorProto.INT64, None))
    onnx.save(model, path.with_suffix(".pixels.onnx"))
    return path.with_suffix(".pixels.onnx")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("variant", ["context", "paper"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((40, 40), "uint8"),
        ((33, 50, 3), "uint8"),
        ((17, 9), "float32"),
        ((1, 30), "float32"),
        ((6, 5, 2), "uint16"),
    ],
    ids=str,
)
def test_it_answers_as_the_classifier(runtime, variant, shape, dtype, tmp_path):
    """In any number of images; uint16 and float32 come with whatever range was learned."""
    images = noise(60, shape, dtype, (0, 255) if dtype == "uint8" else (1000, 3000))
    clf = fit(images[:30], variant=variant)
    path = tmp_path / "model.onnx"
    export_onnx(clf, path, dtype=dtype)
    run = RUNTIMES[runtime](with_pixels(path))
    for some in (images, images[:1], images[7:9]):
        probabilities, pixels = run(some)
        assert probabilities.dtype == np.float32
        assert probabilities.shape == (len(some), 3)
        np.testing.assert_allclose(probabilities, clf.predict_proba(some), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(pixels, np.sort(clf.attention_maps(some).pixels, axis=1))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5},
        {"kernel_size": 7, "depth": 3},
        {"kernel_size": 7, "variant": "paper"},
        {"depth": 3, "variant": "paper"},
    ],
    ids=str,
)
def test_larger_and_more_kernels(runtime, options, tmp_path):
    images = noise(40, (20, 27), "uint8")
    clf = fit(images, **options)
    path = tmp_path / "model.onnx"
    export_onnx(clf, path)
    probabilities, pixels = RUNTIMES[runtime](with_pixels(path))(images)
    np.testing.assert_allclose(probabilities, clf.predict_proba(images), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(pixels, np.sort(clf.attention_maps(images).pixels, axis=1))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("modality", ["brightfield", "event", "hologram", "opd"])
def test_it_answers_as_the_classifier_of_cells(runtime, modality, tmp_path):
    """Where the same pixels are chosen: scores that differ in the last digit may come in another order."""
    cells = make_cells(200, modality=modality, image_size=40, random_state=0)
    images = cells.images if cells.images.dtype == np.uint8 else cells.images.astype(np.float32)
    clf = fit(images[:60])
    path = tmp_path / "model.onnx"
    export_onnx(clf, path)
    probabilities, pixels = RUNTIMES[runtime](with_pixels(path))(images)
    expected = np.sort(clf.attention_maps(images).pixels, axis=1)
    same = (pixels == expected).all(axis=1)
    assert same.mean() >= 0.95
    np.testing.assert_allclose(probabilities[same], clf.predict_proba(images)[same], rtol=0, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("k", [1, 100, 1600])
def test_equal_scores_go_to_the_lower_index(runtime, k, tmp_path):
    """Of a flat image all scores but those at the border are equal."""
    clf = fit(noise(30, (40, 40), "uint8"), k_init=k, k_min=k, k_max=k)
    path = tmp_path / "model.onnx"
    export_onnx(clf, path)
    flat = np.full((3, 40, 40), [[[0]], [[90]], [[255]]], dtype=np.uint8)
    with pytest.warns(UserWarning, match="units of the training images"):  # one of them alone spans nothing
        clf.predict_proba(np.concatenate([flat[:1], flat[:1] + 1]))
    _, pixels = RUNTIMES[runtime](with_pixels(path))(flat)
    np.testing.assert_array_equal(pixels, np.sort(clf.attention_maps(flat).pixels, axis=1))


@pytest.mark.parametrize("data_range", [(-3.3, 1e6), (1e4 + 0.1, 1e4 + 1)])
def test_ranges_that_float32_does_not_hold(data_range, tmp_path):
    images = noise(60, (12, 12), np.float32, data_range)
    clf = fit(images, data_range=data_range)
    export_onnx(clf, tmp_path / "model.onnx")
    [probabilities] = in_onnx_runtime(tmp_path / "model.onnx")(images)
    np.testing.assert_allclose(probabilities, clf.predict_proba(images), rtol=0, atol=1e-5)


def test_the_model_says_what_it_is(tmp_path):
    labels = np.array(["blast", "ä"])
    images = noise(20, (8, 10, 3), "uint8")
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(images, labels[np.arange(20) % 2])
    path = tmp_path / "model.onnx"
    export_onnx(clf, path)
    model = onnx.load(path)
    facts = {fact.key: json.loads(fact.value) for fact in model.metadata_props}
    assert facts == {
        "classes": ["blast", "ä"],
        "image_shape": [8, 10, 3],
        "data_range": [0.0, 255.0],
        "k": clf.k_,
    }
    assert model.producer_name == "sklearn-sparseattn"
    [given], [result] = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("images", "probabilities")
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sizes = [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim]
    assert sizes == ["n", 8, 10, 3]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["k"]) == clf.k_


def test_the_dtype_follows_the_range_and_can_be_said(tmp_path):
    path = tmp_path / "model.onnx"
    clf = fit(noise(20, (8, 8), "uint8"))
    found = []
    for dtype in (None, "uint16", "float32"):
        export_onnx(clf, path, dtype=dtype)
        found.append(onnx.load(path).graph.input[0].type.tensor_type.elem_type)
    assert found == [onnx.TensorProto.UINT8, onnx.TensorProto.UINT16, onnx.TensorProto.FLOAT]
    export_onnx(fit(noise(20, (8, 8), "float32", (0, 1))), path)
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    clf = fit(noise(20, (8, 8), "uint8"))
    with pytest.raises(NotFittedError):
        export_onnx(SparseAttnClassifier(), path)
    with pytest.raises(TypeError, match="not LogisticRegression"):
        export_onnx(LogisticRegression(), path)
    with pytest.raises(ValueError, match="dtype='int8' must be None or one of"):
        export_onnx(clf, path, dtype="int8")
    with pytest.raises(ValueError, match="is there and no file"):
        export_onnx(clf, tmp_path)
    changed = pickle.loads(pickle.dumps(clf))
    changed.network_.fusion.out = torch.nn.Sequential(changed.network_.fusion.out)
    with pytest.raises(ValueError, match="replaced layer"):
        export_onnx(changed, path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"sklearn-sparseattn\[onnx\]"):
        export_onnx(clf, path)
    assert list(tmp_path.iterdir()) == []


def test_the_classifier_stays_as_it_is(tmp_path):
    images = noise(20, (8, 8), "uint8")
    clf = fit(images)
    before = clf.predict_proba(images)
    export_onnx(clf, tmp_path / "one.onnx")
    export_onnx(clf, tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert {tensor.dtype for tensor in clf.network_.parameters()} == {torch.float32}
    np.testing.assert_array_equal(clf.predict_proba(images), before)
