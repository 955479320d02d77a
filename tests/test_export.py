"""The ONNX model answers as the network does in float64, in ONNX Runtime and in OpenVINO."""

import copy
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
from torch import nn

from sklearn_sparseattn import SparseAttnClassifier, export_onnx
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.images import CLIP, PixelScale
from sklearn_sparseattn.network import SparseAttnNet, select_pixels, strides_for


def in_onnx_runtime(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def in_openvino(path):
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: next(iter(model([images]).values()))


RUNTIMES = {"onnxruntime": in_onnx_runtime, "openvino": in_openvino}
FORMS = [{}, {"size": "large"}, {"variant": "paper"}]


class TiedExactly(SparseAttnNet):
    """Chooses as in exact arithmetic, in which scores of equal pixels tie: float64 tells them apart."""

    def choose(self, images, scores):
        return select_pixels(scores.round(decimals=9), self.n_chosen(*images.shape[2:]))


def expected(clf, images):
    """Probabilities by PyTorch in float64."""
    network = copy.deepcopy(clf.network_).double().eval()
    network.__class__ = TiedExactly
    if clf.predict_k is not None:
        n_pixels = network.area_of(*clf.image_shape_[:2])
        network.k.fill_(clf.predict_k * (n_pixels if isinstance(clf.predict_k, float) else 1))
    scaled = PixelScale(clf.data_range_)(images.reshape(len(images), *clf.image_shape_))
    with torch.no_grad():
        return network(torch.from_numpy(scaled).double()).logits.softmax(1).numpy()


def drawn(image_shape, data_range=(0.0, 255.0), **form):
    """A classifier as a fit leaves it, with weights that are drawn."""
    height, width, n_channels = (*image_shape, 1)[:3]
    network = SparseAttnNet(n_channels, 3, k=0.2 * height * width, strides=strides_for(height, width), **form)
    generator = torch.Generator().manual_seed(0)
    network.reset_parameters(generator)
    network.coarse.background.fill_(0.37)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.weight, 1, 0.3, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    with torch.no_grad():  # no key is about 0 in all tokens: their shares would magnify any rounding
        network.fine.cls_token.abs_()
        network.fine.key.weight.abs_()
    clf = SparseAttnClassifier()
    clf.network_, clf.classes_ = network.eval(), np.arange(3)
    clf.image_shape_, clf.data_range_ = (height, width, n_channels), data_range
    return clf


def fit(images, n_classes=3, **params):
    y = np.arange(len(images)) % n_classes
    return SparseAttnClassifier(**{"max_epochs": 2, "random_state": 0, **params}).fit(images, y)


def noise(n, shape, dtype, data_range=(0, 255)):
    values = np.random.default_rng(7).uniform(*data_range, size=(n, *shape))
    return values.astype(dtype)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("dtype", "data_range"), [("uint8", (10.0, 40.0)), ("uint16", (100.0, 350.0)), ("float32", (0.0, 1.0))]
)
def test_what_lies_far_out_is_clipped(dtype, data_range, runtime, tmp_path):
    clf = drawn((24, 24), data_range)
    images = noise(6, (24, 24), dtype, data_range)
    images[1, 3, 4], images[2, 5:9], images[3] = 0, 250, 255
    if dtype != "uint8":
        images[4, 20, 20] = 60000
    if dtype == "float32":
        images[5, 0, 0], images[5, 9, 9] = -3e38, 3e38
    assert (PixelScale(data_range)(images[..., None]) == CLIP[1]).any()
    export_onnx(clf, tmp_path / "model.onnx", dtype=dtype)
    found = RUNTIMES[runtime](tmp_path / "model.onnx")(images)
    np.testing.assert_allclose(found, expected(clf, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("predict_k", [1, 15, 0.15, 0.6, 1.0])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: str([*form.values()]))
@pytest.mark.parametrize("shape", [(64, 64, 3), (40, 40), (17, 23), (8, 8), (1, 30), (6, 5, 2)], ids=str)
def test_it_answers_as_the_network(shape, form, predict_k, runtime, tmp_path):
    """In any number of images, also of images and halves of images in which all pixels are equal."""
    clf = drawn(shape, **form)
    clf.set_params(predict_k=predict_k)
    images = noise(12, shape, "uint8")
    images[0], images[1], images[2], images[3, shape[0] // 2 :] = 0, 90, 255, 130
    export_onnx(clf, tmp_path / "model.onnx")
    run = RUNTIMES[runtime](tmp_path / "model.onnx")
    for some in (images, images[:1], images[7:9]):
        probabilities = run(some)
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, expected(clf, some), rtol=0, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: str([*form.values()]))
def test_it_answers_as_a_classifier_of_cells(runtime, form, tmp_path):
    cells = make_cells(120, modality="hologram", image_size=40, random_state=0)
    clf = fit(cells.images[:60], **form)
    export_onnx(clf, tmp_path / "model.onnx", dtype="float32")
    images = cells.images.astype(np.float32)
    probabilities = RUNTIMES[runtime](tmp_path / "model.onnx")(images)
    sure = np.ones(len(images), dtype=bool)
    if clf.network_.tile == 1:  # without gates it matters which of two nearly equal pixels is chosen
        scores = np.sort(clf.attention_maps(images.astype(float)).coarse.reshape(len(images), -1), axis=1)
        gap = scores[:, -clf.k_] - scores[:, -clf.k_ - 1]
        sure = (gap == 0) | (gap > 1e-6)  # beyond the last cells, scores tie exactly
        assert sure.mean() > 0.9
    np.testing.assert_allclose(probabilities[sure], clf.predict_proba(images)[sure], rtol=0, atol=1e-5)


def test_it_has_the_tiles_that_the_estimator_has_now(tmp_path):
    images = noise(20, (12, 12), "uint8")
    clf = fit(images)
    found = []
    for predict_k in (1, 0.5, None):
        clf.set_params(predict_k=predict_k)
        export_onnx(clf, tmp_path / "model.onnx")
        probabilities = in_onnx_runtime(tmp_path / "model.onnx")(images)
        np.testing.assert_allclose(probabilities, clf.predict_proba(images), rtol=0, atol=1e-5)
        found.append(probabilities)
    assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((17, 9), "float32"), ((6, 5, 2), "uint16"), ((33, 50, 3), "uint16")]
)
@pytest.mark.parametrize("data_range", [(1000, 3000), (-3.3, 1e6), (1e4 + 0.1, 1e4 + 1), (0, 1e-7)])
def test_other_dtypes_and_ranges(shape, dtype, data_range, runtime, tmp_path):
    """Float32 holds neither all bounds nor all widths."""
    clf = drawn(shape, data_range)
    low, high = (min(max(bound, 0), 65535) if dtype == "uint16" else bound for bound in data_range)
    images = noise(12, shape, dtype, (low, high))
    export_onnx(clf, tmp_path / "model.onnx", dtype=dtype)
    probabilities = RUNTIMES[runtime](tmp_path / "model.onnx")(images)
    np.testing.assert_allclose(probabilities, expected(clf, images), rtol=0, atol=1e-5)


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
        "tile": clf.network_.tile,
        "n_tiles": clf.attention_maps(images).tiles.shape[1],
    }
    assert model.producer_name == "sklearn-sparseattn"
    [given], [result] = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("images", "probabilities")
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sizes = [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim]
    assert sizes == ["n", 8, 10, 3]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["tile"]) == clf.network_.tile


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


@pytest.mark.parametrize("k", [0, -3, 2.5])
def test_a_number_of_pixels_that_cannot_be_is_refused(k, tmp_path):
    clf = drawn((16, 16, 1)).set_params(predict_k=k)
    with pytest.raises(ValueError, match=f"predict_k={k} must be None"):
        export_onnx(clf, tmp_path / "cells.onnx")
    assert not list(tmp_path.iterdir())
