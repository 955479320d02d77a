"""Model files: what comes back, and that no damaged or forged one does harm. Pickle, joblib and skops."""

import io
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import time
import tracemalloc

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from skorch.callbacks import EpochScoring

from sklearn_sparseattn import SparseAttnClassifier, export_onnx, load_model, save_model
from sklearn_sparseattn.datasets import make_cells

persistence = sys.modules["sklearn_sparseattn.persistence"]

N, SIDE = 12, 8
X = np.random.default_rng(0).integers(0, 256, size=(N, SIDE, SIDE), dtype=np.uint8)
Y = np.array(["a", "b", "c"])[np.arange(N) % 3]


def quick(**params):
    return SparseAttnClassifier(
        **{"max_epochs": 1, "embed_dim": 4, "hidden_dim": 4, "random_state": 0, **params}
    )


@pytest.fixture(scope="module")
def fitted():
    return quick().fit(X, Y)


@pytest.fixture(scope="module")
def content(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(fitted, path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def round_trip(clf, path):
    save_model(clf, path)
    return load_model(path)


def assert_same_answers(one, other, images=X):
    np.testing.assert_array_equal(one.predict_proba(images), other.predict_proba(images))
    np.testing.assert_array_equal(one.predict(images), other.predict(images))
    np.testing.assert_array_equal(one.transform(images), other.transform(images))
    maps, others = one.attention_maps(images), other.attention_maps(images)
    for name in maps:
        np.testing.assert_array_equal(maps[name], others[name])


# ---- what comes back ----


@pytest.mark.parametrize("options", [{}, {"size": "large"}, {"variant": "paper"}], ids=str)
@pytest.mark.parametrize("shape", [(SIDE, SIDE), (5, 9, 3), (1, 7), (33, 37)])
def test_all_of_a_fitted_classifier_comes_back(options, shape, path):
    images = np.random.default_rng(1).normal(size=(N, *shape))
    clf = quick(**options, max_epochs=3).fit(images, Y)
    loaded = round_trip(clf, path)
    assert_same_answers(clf, loaded, images)
    assert loaded.get_params() == clf.get_params()
    names = {name for name in vars(clf) if name.endswith("_")}
    assert names == {name for name in vars(loaded) if name.endswith("_")}
    for name in names - {"history_", "network_"}:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(clf, name))
        assert type(getattr(loaded, name)) is type(getattr(clf, name)), name
    assert list(loaded.history_) == list(clf.history_)
    for name, column in clf.history_.items():
        np.testing.assert_array_equal(loaded.history_[name], column)
        assert loaded.history_[name].dtype == column.dtype


LABELS = {
    "str": np.array(["a", "b"]),
    "wide str": np.array(["a", "b"], dtype="<U40"),
    "object": np.array(["ä", "\ud800"], dtype=object),
    "bool": np.array([False, True]),
    "int8": np.array([-1, 1], dtype=np.int8),
    "uint64": np.array([0, 2**64 - 1], dtype=np.uint64),
    "big-endian": np.array([1, 2], dtype=">i8"),
    "float": np.array([0.0, 2.0**60]),
    "float16": np.array([1, 2], dtype=np.float16),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_kind(kind, path):
    clf = quick().fit(X, LABELS[kind][np.arange(N) % 2])
    loaded = round_trip(clf, path)
    assert loaded.classes_.dtype == clf.classes_.dtype
    np.testing.assert_array_equal(loaded.predict(X), clf.predict(X))
    assert loaded.predict(X).dtype == clf.predict(X).dtype
    assert round_trip(loaded, path).classes_.tolist() == clf.classes_.tolist()


def test_far_too_wide_labels_become_as_wide_as_they_need_to_be(path):
    clf = quick().fit(X, Y.astype("<U100000"))
    assert round_trip(clf, path).classes_.dtype == "<U1"


@pytest.mark.parametrize("dtype", ["datetime64[D]", "datetime64[ns]", "timedelta64[s]", np.longdouble])
def test_labels_that_json_would_change_are_named(dtype, path, tmp_path):
    """A fit takes them, and so does joblib."""
    clf = quick().fit(X, (np.arange(N) % 2).astype(dtype))
    assert clf.predict(X).dtype == dtype
    for write, verb in [(save_model, "kept"), (export_onnx, "exported")]:
        with pytest.raises(ValueError, match=rf"cannot be {verb}: its classes \['.* are neither numbers"):
            write(clf, path)
    assert list(tmp_path.iterdir()) == []


def test_names_of_columns(path):
    frame = pd.DataFrame(X.reshape(N, -1), columns=[f"pixel {i}" for i in range(SIDE**2)])
    clf = quick().fit(frame, Y)
    loaded = round_trip(clf, path)
    np.testing.assert_array_equal(loaded.feature_names_in_, clf.feature_names_in_)
    assert loaded.feature_names_in_.dtype == object
    assert_same_answers(clf, loaded, frame)
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(frame.rename(columns={"pixel 0": "x"}))


def test_parameters_of_every_kind(path):
    clf = quick(
        k_init=np.int64(20),
        lr=np.float32(0.01),
        class_weight={"a": 2.0, "b": np.float64(1), "c": 3},
        image_shape=(SIDE, np.int64(SIDE)),
        data_range=[0, 300.5],
        early_stopping=np.bool_(False),
        size="large",
        predict_k=np.float64(0.25),
        n_jobs=2,
    ).fit(X, Y)
    loaded = round_trip(clf, path)
    assert loaded.get_params() == clf.get_params()
    assert type(loaded.image_shape) is tuple
    assert type(loaded.data_range) is list
    assert loaded.class_weight == clf.class_weight


def test_objects_among_the_parameters_are_left_out_with_a_warning(path, tmp_path):
    objects = {
        "augment": lambda images, rng: images,
        "callbacks": [EpochScoring("accuracy", use_caching=False, name="x")],
        "random_state": np.random.RandomState(0),
    }
    clf = quick().fit(X, Y).set_params(**objects, checkpoint_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"augment=.* and callbacks=.* and random_state=.* cannot be kept"):
        save_model(clf, path)
    loaded = load_model(path)
    default = SparseAttnClassifier()
    for name in [*objects, "checkpoint_dir"]:
        assert getattr(loaded, name) == getattr(default, name)
    assert_same_answers(clf, loaded)


def test_what_was_loaded_can_be_fitted_again_and_cloned(fitted, path):
    loaded = round_trip(fitted, path)
    assert clone(loaded).get_params() == fitted.get_params()
    assert_same_answers(clone(fitted).fit(X, Y), clone(loaded).fit(X, Y))
    # A warm start goes on to the same bits, and the history with it.
    original = pickle.loads(pickle.dumps(fitted)).set_params(warm_start=True, max_epochs=2).fit(X, Y)
    loaded.set_params(warm_start=True, max_epochs=2).fit(X, Y)
    assert_same_answers(original, loaded)
    assert loaded.n_iter_ == original.n_iter_ == 3


def test_partial_fit_goes_on_from_the_weights(path):
    clf = quick().partial_fit(X, Y, classes=["a", "b", "c"])
    loaded = round_trip(clf, path)
    assert_same_answers(clf, loaded)
    again = round_trip(clf, path)
    for one in (loaded, again):
        one.partial_fit(X, Y)
    assert_same_answers(loaded, again)
    assert loaded.n_iter_ == 2
    assert not np.array_equal(loaded.predict_proba(X), clf.predict_proba(X))


def test_a_file_is_the_same_bytes_again_and_names_its_versions(fitted, content, path):
    save_model(fitted, path)
    assert path.read_bytes() == content
    save_model(load_model(path), path)
    assert path.read_bytes() == content
    versions = model_of(content)["versions"]
    assert versions["torch"] == torch.__version__
    assert set(versions) == {"sklearn-sparseattn", "python", "numpy", "scikit-learn", "skorch", "torch"}


def test_default_settings_make_a_small_file_that_loads_quickly(path):
    cells = make_cells(20, modality="event", n_classes=2, image_size=32, random_state=0)
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(cells.images, cells.target)
    clf.history_ = {name: np.repeat(column, 60) for name, column in clf.history_.items()}
    save_model(clf, path)
    assert path.stat().st_size <= 300 * 1024
    seconds = []
    for _ in range(10):
        start = time.process_time()
        load_model(path)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.05


@pytest.mark.parametrize("options", [{}, {"size": "large"}, {"variant": "paper"}], ids=str)
def test_the_form_of_the_network_is_all_that_it_is_made_with(options, path):
    clf = quick(**options).fit(X, Y)
    save_model(clf, path)
    names = ["n_channels", "n_classes", "embed_dim", "n_heads", "hidden_dim", "strides", "variant", "size"]
    assert list(model_of(path.read_bytes())["network"]) == names
    assert load_model(path).network_.form == clf.network_.form


@pytest.mark.parametrize("predict_k", [None, 3, 0.5, 1.0, 10**6])
def test_predict_k_is_kept_and_can_be_changed_afterwards(predict_k, path):
    clf = quick().fit(X, Y).set_params(predict_k=predict_k)
    loaded = round_trip(clf, path)
    assert loaded.predict_k == predict_k
    assert type(loaded.predict_k) is type(predict_k)
    assert loaded.k_ == clf.k_
    assert_same_answers(clf, loaded)
    assert_same_answers(clf.set_params(predict_k=0.2), loaded.set_params(predict_k=0.2))


@pytest.mark.parametrize("version", [0, 2, 3, -1, 10**9, "1", 1.0, True, None, [1]])
def test_another_format_is_refused_and_named(version, content, path):
    path.write_bytes(forge(model_of(content) | {"format_version": version}, load_arrays(content)))
    message = rf"its format_version is {re.escape(repr(version))}, and this release reads 1"
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_from_a_gpu_to_the_cpu_and_back(path):
    clf = quick(device="cuda").fit(X, Y)
    loaded = round_trip(clf, path)
    assert loaded.device == "cpu"
    np.testing.assert_allclose(loaded.predict_proba(X), clf.predict_proba(X), atol=1e-4)
    back = load_model(path, device="cuda")
    assert next(back.network_.parameters()).device.type == "cuda"
    np.testing.assert_array_equal(back.predict_proba(X), clf.predict_proba(X))


def test_the_device_is_said_when_loading(content, path):
    path.write_bytes(content)
    assert load_model(path, device=torch.device("cpu")).device == torch.device("cpu")
    with pytest.raises(ValueError, match="device='cuda:97' is not available"):
        load_model(path, device="cuda:97")


# ---- what cannot be kept, and where it cannot be written ----


def test_what_cannot_be_kept(path, fitted):
    with pytest.raises(NotFittedError):
        save_model(quick(), path)
    with pytest.raises(TypeError, match="not LogisticRegression"):
        save_model(LogisticRegression(), path)
    broken = pickle.loads(pickle.dumps(fitted))
    with torch.no_grad():
        broken.network_.fusion.out.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"cannot be kept: fusion\.out\.bias"):
        save_model(broken, path)
    broken = pickle.loads(pickle.dumps(fitted))
    broken.history_["epoch"] = broken.history_["epoch"].astype(object)
    with pytest.raises(ValueError, match=r"cannot be kept: history_\['epoch'\] of dtype object"):
        save_model(broken, path)
    assert not path.exists()


def test_where_nothing_can_be_written(fitted, tmp_path):
    with pytest.raises(ValueError, match="is there and no file"):
        save_model(fitted, tmp_path)
    with pytest.raises(ValueError, match=r"/dev/full.* is there and no file"):
        save_model(fitted, "/dev/full")
    with pytest.raises(FileNotFoundError, match=r"nowhere/model'"):
        save_model(fitted, tmp_path / "nowhere" / "model")
    assert list(tmp_path.iterdir()) == []


FILLING = """
import resource, sys
from sklearn_sparseattn import export_onnx, load_model, save_model
clf = load_model(sys.argv[1])
assert "onnx" not in sys.modules
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (save_model, export_onnx):
    try:
        write(clf, sys.argv[2])
    except OSError as error:
        print(error)
"""


def test_a_full_disk_is_said_and_leaves_the_former_file(content, path, tmp_path):
    path.write_bytes(content)
    former = tmp_path / "former"
    former.write_bytes(b"what was there")
    command = [sys.executable, "-c", FILLING, path, former]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.count("File too large") == run.stdout.count(str(former)) == 2
    assert former.read_bytes() == b"what was there"
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "former"}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_behind_a_link(fitted, content, path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    save_model(fitted, link)
    assert link.is_symlink()
    assert path.read_bytes() == content


# ---- what is no model file ----


class Harm:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["HARM"],)


def test_other_files_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    others = {
        "empty": b"",
        "pickle": pickle.dumps(Harm()),
        "text": b"a text that is longer than eight bytes",
        "other arrays": save_arrays({"a": np.zeros(3)}),
        "huge header": (2**62).to_bytes(8, "little") + b"{}",
    }
    for name, other in others.items():
        path.write_bytes(other)
        with pytest.raises(
            ValueError, match=rf"{path.name} is not a model file that can be loaded: it was not"
        ):
            load_model(path)
        assert not (tmp_path / "harm").exists(), name


def test_paths_that_cannot_be_read(tmp_path, path, content, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        load_model(tmp_path)
    with pytest.raises(
        ValueError, match="/dev/zero is not a model file that can be loaded: it is not a file"
    ):
        load_model("/dev/zero")
    path.write_bytes(content)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # root may read what others may not
    with pytest.raises(PermissionError, match=path.name):
        load_model(path)


# ---- damage: the checksum sees it ----


def header_length(content):
    return 8 + int.from_bytes(content[:8], "little")


def assert_refused(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a model file that can be loaded"):
        load_model(path)


@pytest.fixture
def overwritten(content, path):
    """A function: what happens with some bytes in other places of the file, which is then whole again."""
    path.write_bytes(content)
    with open(path, "r+b", buffering=0) as file:

        def overwrite(at, new):
            os.pwrite(file.fileno(), new, at)
            with pytest.raises(ValueError, match="is not a model file that can be loaded"):
                load_model(path)
            os.pwrite(file.fileno(), content[at : at + len(new)], at)

        yield overwrite
    load_model(path)


def test_every_byte_of_the_header(content, overwritten):
    for i in range(header_length(content)):
        for flip in (1 << i % 8, 0xFF):
            overwritten(i, bytes([content[i] ^ flip]))


def test_every_length(content, path):
    path.write_bytes(content)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="is not a model file that can be loaded"):
            load_model(path)
    assert_refused(content + b"\0", path)


def random_places(content, n_places):
    rng = np.random.default_rng(0)
    for _ in range(n_places):
        at = int(rng.integers(len(content)))
        n = int(rng.integers(1, min(16, len(content) - at) + 1))
        new = rng.bytes(n)
        if new != content[at : at + n]:
            yield at, new


def test_ten_thousand_random_corruptions(content, overwritten):
    for at, new in random_places(content, 10_000):
        overwritten(at, new)


def test_bytes_put_in_and_taken_out(content, path):
    for at, new in random_places(content, 500):
        assert_refused(content[:at] + new + content[at:], path)
        assert_refused(content[:at] + content[at + len(new) :], path)


# ---- forged files: the checksum is right, and something else is not ----


def model_of(content):
    header = json.loads(content[8 : header_length(content)])
    return json.loads(header["__metadata__"]["sklearn_sparseattn"])


def forge(model, arrays):
    text = json.dumps(model, separators=(",", ":"))
    return seal(save_arrays(arrays, metadata={"sklearn_sparseattn": text}))


def seal(content):
    """As someone who knows how would do it."""
    mark = rb"\"checksum\":\""
    if mark not in content:
        return content
    at = content.index(mark) + len(mark)
    content = content[:at] + b"0" * 64 + content[at + 64 :]
    return content[:at] + persistence._checksum(content, at) + content[at + 64 :]


def load_forged(content, path):
    """The classifier, or None if it is refused."""
    path.write_bytes(content)
    try:
        return load_model(path)
    except ValueError:
        return None


def test_forging_works(content, path, fitted):
    assert_same_answers(load_forged(forge(model_of(content), load_arrays(content)), path), fitted)


STRANGE = [None, True, 0, -1, 1e308, 10**30, "x", [], [[]], {}, {"tuple": 1}, {"a": 1, "b": 2}]


def test_strange_values_everywhere(content, path, fitted):
    """Wherever the JSON has a value, other ones: an error, or the same predictions."""
    arrays = load_arrays(content)
    few = {"params": dict.fromkeys(["class_weight", "lr"]), "versions": {}}

    def places(value, place=()):
        yield place
        items = (
            value if isinstance(value, dict) else dict(enumerate(value if isinstance(value, list) else ()))
        )
        for key, item in items.items():
            yield from places(item, (*place, key))

    refused = 0
    for place in list(places(model_of(content) | few))[1:]:
        for strange in STRANGE:
            model = model_of(content)
            *way, last = place
            holder = model
            for key in way:
                holder = holder[key]
            if holder[last] == strange:
                continue
            holder[last] = strange
            loaded = load_forged(forge(model, arrays), path)
            refused += loaded is None
            # Other units, shapes and names of classes cannot be told from true ones.
            if loaded is not None and place[0] not in ("data_range", "spanned_range", "image_shape"):
                np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1}, "k=1 is not that of the network"),
        ({"image_shape": [SIDE, SIDE, 3]}, "not for 3 channels"),
        ({"image_shape": [10**9, 10**9, 0]}, "image_shape"),
        ({"image_shape": [10**9, 10**9, 1]}, "image_shape"),
        ({"image_shape": [1, 2**41, 1]}, "image_shape"),
        ({"classes": {"dtype": "<U1", "values": ["a", "b"]}}, "not for 1 channels and 2 classes"),
        ({"classes": {"dtype": "<U1", "values": ["a", "c", "b"]}}, "classes are not distinct"),
        ({"classes": {"dtype": "<U100000000", "values": ["a", "b", "c"]}}, "not possible"),
        ({"classes": {"dtype": "O", "values": ["a", "b", {}]}}, "classes"),
        ({"data_range": [1.0, 0.0]}, "data_range"),
        ({"data_range": [-1e308, 1e308]}, "data_range"),
        ({"spanned_range": [1.0, 0.0]}, "spanned_range"),
        ({"spanned_range": [0.0, 1e309]}, "spanned_range"),
        ({"feature_names": ["x"]}, "64 names"),
        ({"history": ["epoch"]}, "history"),
        ({"params": {"new_one": 1}}, r"does not know its parameters \['new_one'\]"),
        ({"params": {"n_jobs": "all"}}, "n_jobs='all'"),
        ({"params": {"n_jobs": True}}, "n_jobs=True"),
        ({"params": {"n_jobs": 10**9}}, "n_jobs=1000000000 is no number of threads up to 1024"),
        ({"params": {"n_jobs": -(10**9)}}, "n_jobs=-1000000000"),
        ({"params": {"predict_k": 0}}, "predict_k=0 is not a number or share of pixels"),
        ({"params": {"predict_k": True}}, "predict_k=True"),
        ({"params": {"predict_k": [0.5]}}, r"predict_k=\[0.5\]"),
        ({"params": {"predict_k": 1.5}}, r"predict_k=1\.5"),
    ],
    ids=str,
)
def test_forged_facts(content, path, change, message):
    path.write_bytes(forge(model_of(content) | change, load_arrays(content)))
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": [10**9, 1, 1]}, "strides"),
        ({"embed_dim": 10**9}, "sizes"),
        ({"embed_dim": 8}, "arrays are not those"),
        ({"n_heads": 5}, "n_heads=5"),
        ({"variant": "other"}, "variant='other'"),
        ({"variant": ["tiles"]}, r"variant=\['tiles'\]"),
        ({"variant": "paper"}, "arrays are not those"),
        ({"size": "huge"}, "size='huge'"),
        ({"size": True}, "size=True"),
        ({"size": "large"}, "arrays are not those"),
        ({"variant": "paper", "size": "large"}, "size='large' has no effect"),
        ({"spread": 3.0}, "spread"),
        ({"k": 3}, "multiple values"),
    ],
    ids=str,
)
def test_forged_networks(content, path, change, message):
    model = model_of(content)
    model["network"] |= change
    path.write_bytes(forge(model, load_arrays(content)))
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("network.fusion.out.bias", np.zeros(4, np.float32), "arrays are not those"),
        ("network.fusion.out.bias", np.zeros((3, 1), np.float32), "arrays are not those"),
        ("network.fusion.out.bias", np.zeros(3), "arrays are not those"),
        ("network.fusion.out.bias", np.full(3, np.nan, np.float32), "values that cannot be"),
        ("network.fusion.first.1.running_var", np.full(4, -1, np.float32), "values that cannot be"),
        ("network.fusion.out.bias", np.zeros(3, np.uint8), "does not belong"),
        ("network.more", np.zeros(3, np.float32), "arrays are not those"),
        ("more", np.zeros(3), "does not belong"),
        ("network.k", np.array(np.inf), "values that cannot be"),
        ("network.k", np.array(60.0), "k=.* is not that"),
        ("history.epoch", np.zeros((2, 2)), "history"),
        ("history.more", np.zeros(1), "history"),
        ("network.fusion.out.bias", None, "arrays are not those"),
    ],
    ids=str,
)
def test_forged_arrays(content, path, name, value, message):
    arrays = load_arrays(content) | {name: value}
    path.write_bytes(forge(model_of(content), {name: a for name, a in arrays.items() if a is not None}))
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize("shape", [(2, 2), (0, 2), (2, 0), ()])
def test_a_history_is_of_columns(content, path, shape):
    arrays = load_arrays(content)
    arrays |= {name: np.zeros(shape) for name in arrays if name.startswith("history.")}
    path.write_bytes(forge(model_of(content), arrays))
    with pytest.raises(ValueError, match="history"):
        load_model(path)


def test_a_large_image_that_is_possible_takes_no_memory_before_it_comes(content, path):
    """The network would be the same; what it is given says how much is needed."""
    model = model_of(content) | {"image_shape": [2**20, 2**20, 1]}
    path.write_bytes(forge(model, load_arrays(content)))
    tracemalloc.start()
    loaded = load_model(path)
    with pytest.raises(ValueError, match="1099511627776 features"):
        loaded.predict(X.reshape(N, -1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 + 20 * len(content)


def with_header(content, change):
    n = header_length(content)
    header = json.loads(content[8:n])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    return seal(len(text).to_bytes(8, "little") + text + content[n:])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["network.fusion.out.bias"].update(shape=[2**40, 2**40]),
        lambda header: header["network.fusion.out.bias"].update(data_offsets=[0, 2**60]),
        lambda header: header["network.fusion.out.bias"].update(data_offsets=[2**63, 2**64]),
        lambda header: header["network.fusion.out.bias"].update(dtype="F8_E4M3"),
        lambda header: header.update(
            {"more": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}
        ),
        lambda header: header["__metadata__"].update(sklearn_sparseattn=r'{"checksum":"' + "[" * 10**6),
    ],
    ids=["shape", "offsets", "offsets beyond", "dtype", "more", "deep"],
)
def test_huge_sizes_take_no_memory(content, path, change):
    path.write_bytes(with_header(content, change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="is not a model file that can be loaded"):
        load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_memory_goes_with_the_size_of_the_file(content, path):
    path.write_bytes(content)
    tracemalloc.start()
    load_model(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 + 20 * len(content)


def test_random_forgeries_of_the_header(content, path):
    """Bytes of the header replaced, under a right checksum: an error, or a classifier that answers."""
    rng, likely = np.random.default_rng(0), list(b'0123456789"{}[],:.-eabn')
    n = header_length(content)
    for _ in range(500):
        forged = bytearray(content)
        for at in rng.integers(8, n, size=rng.integers(1, 3)):
            forged[at] = rng.choice(likely) if rng.random() < 0.8 else rng.integers(256)
        loaded = load_forged(seal(bytes(forged)), path)
        if loaded is not None:
            images = np.zeros((2, loaded.n_features_in_), dtype=np.uint8)
            assert np.isfinite(loaded.predict_proba(images)).all()


# ---- pickle, joblib, skops ----


def test_joblib_with_a_memory_map(tmp_path):
    clf = quick(hidden_dim=128).fit(X, Y)
    joblib.dump(clf, tmp_path / "model.joblib")
    loaded = joblib.load(tmp_path / "model.joblib", mmap_mode="r")
    assert_same_answers(clf, loaded)
    loaded.partial_fit(X, Y)


def test_skops_keeps_what_partial_fit_goes_on_from():
    clf = quick().partial_fit(X, Y, classes=["a", "b", "c"])
    kept = skops.io.dumps(clf)
    types = skops.io.get_untrusted_types(data=kept)
    assert all(name.startswith("sklearn_sparseattn.") for name in types)
    loaded = skops.io.loads(kept, trusted=types)
    assert_same_answers(clf.partial_fit(X, Y), loaded.partial_fit(X, Y))


@pytest.mark.parametrize("variant", ["tiles", "paper"])
def test_skops_asks_for_trust_in_the_classifier_alone(variant):
    clf = quick(variant=variant).fit(X, Y)
    kept = skops.io.dumps(clf)
    types = skops.io.get_untrusted_types(data=kept)
    assert types == ["sklearn_sparseattn.classifier.SparseAttnClassifier"]
    with pytest.raises(skops.io.exceptions.UntrustedTypesFoundException):
        skops.io.loads(kept)
    loaded = skops.io.loads(kept, trusted=types)
    assert_same_answers(clf, loaded)
    assert loaded.get_params() == clf.get_params()
    assert_same_answers(clone(clf).fit(X, Y), loaded.fit(X, Y))


def test_a_pickle_keeps_what_was_done_to_the_network(fitted):
    """Where form and weights are not all there is to it, the network itself is pickled."""
    changed = pickle.loads(pickle.dumps(fitted))
    changed.network_.fusion.out = torch.nn.Sequential(changed.network_.fusion.out, torch.nn.Softplus())
    changed = pickle.load(io.BytesIO(pickle.dumps(changed)))
    assert isinstance(changed.network_.fusion.out, torch.nn.Sequential)
    assert not np.array_equal(changed.predict_proba(X), fitted.predict_proba(X))
