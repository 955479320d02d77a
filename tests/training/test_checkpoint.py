"""A fit that is killed and taken up ends as if nothing had happened; what is not its own it leaves alone."""

import contextlib
import errno
import functools
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skorch
import torch
from scipy import sparse

from sklearn_sparseattn import DynamicK, SparseAttnClassifier
from sklearn_sparseattn import files as files_module
from sklearn_sparseattn.files import hold, remove_whole, write_whole
from sklearn_sparseattn.training import checkpoint as checkpoint_module
from sklearn_sparseattn.training.described import describe

SIDE = 8
Y = np.arange(36) % 3
X = (np.random.default_rng(0).integers(0, 80, (36, SIDE, SIDE)) + 60 * Y[:, None, None]).astype(np.uint8)


class Killed(BaseException):
    """Nothing catches this, as nothing outlives kill -9."""


class KillAt(skorch.callbacks.Callback):
    """End the fit in some epoch; counts as the same callback whenever that is."""

    at_ = None
    hook_ = None

    def on_epoch_begin(self, net, **kwargs):
        if self.hook_ is not None:
            self.hook_(net)
        vars(self).setdefault("seen_", []).append(len(net.history))

    def on_batch_end(self, net, training=False, **kwargs):
        if training and len(net.history) == self.at_:
            raise Killed


def kill_at(epoch):
    callback = KillAt()
    callback.at_ = epoch
    return callback


def quick(folder=None, epoch=None, **params):
    callbacks = [*params.pop("callbacks", []), kill_at(epoch)]
    params = {"max_epochs": 4, "batch_size": 10, "random_state": 0, **params}
    return SparseAttnClassifier(**params, checkpoint_dir=folder, callbacks=callbacks)


def same_fit(one, other):
    """Whether two fits are equal to the last bit, times aside."""
    weights, others = one.network_.state_dict(), other.network_.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert one.history_.keys() == other.history_.keys()
    for name in set(one.history_) - {"duration"}:
        np.testing.assert_array_equal(one.history_[name], other.history_[name])
    return True


def saved(path):
    """What a checkpoint holds behind its checksum."""
    return torch.load(io.BytesIO(path.read_bytes()[16:]), weights_only=True)


# ---- taken up ----


def jitter(images, rng):
    return images + rng.normal(0, 0.01, images.shape).astype(np.float32)


WAYS = {
    "default": {},
    "plateau": {"lr_schedule": "plateau"},
    "constant rate": {"lr_schedule": None},
    "early stopping": {"early_stopping": True, "patience": 2, "max_epochs": 8, "lr": 0.05},
    "k by batch": {"callbacks": [DynamicK.paper(k_min=3)]},
    "another schedule": {"callbacks": [skorch.callbacks.LRScheduler("StepLR", step_size=1, event_name=None)]},
    "augmented": {"augment": jitter},
    "consistent": {"augment": jitter, "consistency_weight": 0.5},
    "k by epoch": {"callbacks": [DynamicK.paper(k_min=3, update="epoch")]},
    "k by worth, as told": {"callbacks": [DynamicK(step=0.3, n_checks=2)], "k_tolerance": 0.05},
    "large": {"size": "large"},
    "paper": {"variant": "paper", "class_weight": "balanced", "focal_gamma": 2.0},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_fit_taken_up_ends_with_the_same_bits(way, tmp_path):
    params = WAYS[way]
    whole = quick(**params).fit(X, Y)
    for epoch in (2, whole.n_iter_):
        with pytest.raises(Killed):
            quick(tmp_path, epoch, **params).fit(X, Y)
        assert len(list(tmp_path.iterdir())) == 1
        assert same_fit(quick(tmp_path, **params).fit(X, Y), whole)
        assert list(tmp_path.iterdir()) == []


def test_it_is_not_trained_twice(tmp_path):
    with pytest.raises(Killed):
        quick(tmp_path, 4).fit(X, Y)
    clf = quick(tmp_path)
    clf.fit(X, Y)
    seen = clf.callbacks[-1].seen_
    assert seen == [4]
    np.testing.assert_array_equal(clf.history_["epoch"], [1, 2, 3, 4])


def test_a_fit_may_be_killed_again_and_again_and_after_its_last_epoch(tmp_path, monkeypatch):
    whole = quick().fit(X, Y)
    for epoch in (1, 2, 2, 4):
        with pytest.raises(Killed):
            quick(tmp_path, epoch).fit(X, Y)

    def killed(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SparseAttnClassifier, "_make_ready", killed)
        with pytest.raises(Killed):
            quick(tmp_path).fit(X, Y)
    assert same_fit(quick(tmp_path).fit(X, Y), whole)


def test_optimiser_controller_and_generator_come_back(tmp_path, monkeypatch):
    """They are not to be seen in a fitted estimator, but in its last checkpoint."""

    def last_checkpoint(folder):
        with pytest.raises(Killed):
            quick(folder).fit(X, Y)
        [path] = folder.iterdir()
        return saved(path)

    def killed(self):
        raise Killed

    with pytest.raises(Killed):
        quick(tmp_path / "killed", 3).fit(X, Y)
    monkeypatch.setattr(SparseAttnClassifier, "_make_ready", killed)
    whole = last_checkpoint(tmp_path / "whole")
    taken_up = last_checkpoint(tmp_path / "killed")
    for state in (whole, taken_up):
        for row in state["history"]:
            del row["dur"]
    assert {"module", "optimizer", "callbacks", "rng", "start", "history"} <= whole.keys()
    assert {"dynamic_k", "schedule"} <= whole["callbacks"].keys()
    assert whole["callbacks"]["dynamic_k"]["highest_rate"] > 0
    flat, others = (torch.utils._pytree.tree_flatten(state) for state in (whole, taken_up))
    assert flat[1] == others[1]
    for one, other in zip(flat[0], others[0], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_without_a_seed_the_generators_go_on(tmp_path):
    """The split that was drawn in the beginning is drawn again, and the shuffles go on."""
    params = {"random_state": None, "early_stopping": True}
    seen = []

    class KillAt(skorch.callbacks.Callback):
        def __init__(self, at=None):
            self.at_ = at

        def on_batch_begin(self, net, batch=None, training=False, **kwargs):
            if not training:
                seen.append(batch[0].numpy().copy())

        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == self.at_:
                raise Killed

    with pytest.raises(Killed):
        quick(tmp_path, **params).set_params(callbacks=[KillAt(2)]).fit(X, Y)
    clf = quick(tmp_path, **params).set_params(callbacks=[KillAt()]).fit(X, Y)
    assert clf.n_iter_ == 4
    assert len(seen) >= 5
    assert all(np.array_equal(rows, seen[0]) for rows in seen)


def test_a_random_state_instance_is_as_far_on_as_without_a_kill(tmp_path):
    undisturbed, disturbed = np.random.RandomState(3), np.random.RandomState(3)
    whole = quick(random_state=undisturbed).fit(X, Y)
    with pytest.raises(Killed):
        quick(tmp_path, 3, random_state=np.random.RandomState(3)).fit(X, Y)
    assert same_fit(quick(tmp_path, random_state=disturbed).fit(X, Y), whole)
    assert undisturbed.randint(10**9) == disturbed.randint(10**9)


def test_a_warm_start_is_taken_up(tmp_path):
    def warm(folder=None, epoch=None):
        clf = quick(warm_start=True).fit(X, Y)
        return clf.set_params(checkpoint_dir=folder, callbacks=[kill_at(epoch)])

    with pytest.raises(Killed):
        warm(tmp_path, 3).fit(X, Y)
    clf = warm(tmp_path).fit(X, Y)
    assert clf.n_iter_ == 8
    assert same_fit(clf, warm().fit(X, Y))
    # From another network it would be another fit.
    with pytest.raises(Killed):
        warm(tmp_path, 3).fit(X, Y)
    other = quick(warm_start=True, lr=0.02).fit(X, Y).set_params(lr=0.01, checkpoint_dir=tmp_path)
    other.set_params(callbacks=[kill_at(1)])
    with pytest.raises(Killed):
        other.fit(X, Y)
    assert len(list(tmp_path.iterdir())) == 1


FIT = """
import sys
import threading
import numpy as np
from sklearn_sparseattn import SparseAttnClassifier
Y = np.arange(36) % 3
X = (np.random.default_rng(0).integers(0, 80, (36, 8, 8)) + 60 * Y[:, None, None]).astype(np.uint8)
print("begin", flush=True)
SparseAttnClassifier(max_epochs=400, batch_size=10, random_state=0, checkpoint_dir=sys.argv[1]).fit(X, Y)
print("end", flush=True)
"""


def test_kill_9_of_a_process(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", FIT, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"begin\n"
        while not any(path.suffix == ".checkpoint" for path in tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.005)  # which the process has for itself
        same = SparseAttnClassifier(max_epochs=400, batch_size=10, random_state=0, checkpoint_dir=tmp_path)
        with pytest.raises(ValueError, match=r"the same fit.* is running .*\.checkpoint\.lock"):
            same.fit(X, Y)
        assert not hasattr(same, "network_")
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.communicate()[0] == b""
    [path] = [path for path in tmp_path.iterdir() if path.suffix == ".checkpoint"]
    done = len(saved(path)["history"])
    assert 1 <= done < 400
    clf = SparseAttnClassifier(max_epochs=400, batch_size=10, random_state=0)
    seen = []

    class Stop(skorch.callbacks.Callback):
        def on_epoch_end(self, net, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in net.module_.state_dict().items()})
            if len(net.history) == done + 2:
                raise Killed

    with pytest.raises(Killed):
        clf.set_params(callbacks=[Stop()]).fit(X, Y)
    # The same call without callbacks, watched from a place that is no parameter.
    taken_up = []
    ends = skorch.NeuralNet.on_epoch_end

    def watch(self, net, **kwargs):
        taken_up.append({name: tensor.clone() for name, tensor in net.module_.state_dict().items()})
        if len(net.history) == done + 2:
            raise Killed
        return ends(self, net, **kwargs)

    monkeypatch.setattr(skorch.NeuralNet, "on_epoch_end", watch)
    clf.set_params(callbacks=None, checkpoint_dir=str(tmp_path))
    with pytest.raises(Killed):
        clf.fit(X, Y)
    assert len(taken_up) == 2
    for name, tensor in taken_up[-1].items():
        assert torch.equal(tensor, seen[-1][name])


# ---- whose it is ----


def test_the_same_fit_cannot_run_twice_at_a_time(tmp_path):
    """Not in two threads of a process either; another fit can, in the same folder."""
    refused, others = [], []

    def others_begin(net):
        if len(net.history) == 2:
            with ThreadPoolExecutor(1) as pool:
                refused.append(pool.submit(quick(tmp_path).fit, X, Y).exception())
                others.append(pool.submit(quick(tmp_path, lr=0.02).fit, X, Y).result())

    clf = quick(tmp_path)
    clf.callbacks[-1].hook_ = others_begin
    clf.fit(X, Y)
    assert isinstance(refused[0], ValueError)
    assert "is running already" in str(refused[0])
    assert same_fit(clf, quick().fit(X, Y))
    assert same_fit(others[0], quick(lr=0.02).fit(X, Y))
    assert list(tmp_path.iterdir()) == []
    quick(tmp_path).fit(X, Y)


OTHERS = {
    "a parameter": ({"lr": 0.02}, {}),
    "more epochs": ({"max_epochs": 5}, {}),
    "the seed": ({"random_state": 1}, {}),
    "a class weight": ({"class_weight": {0: 2.0, 1: 1.0, 2: 1.0}}, {}),
    "a function": ({"augment": jitter}, {}),
    "a callback": ({"callbacks": [DynamicK(step=0.01)]}, {}),
    "one pixel": ({}, {"X": np.where(np.arange(64).reshape(8, 8) == 63, X ^ 1, X)}),
    "another dtype": ({}, {"X": X.astype(np.uint16)}),
    "labels": ({}, {"y": np.roll(Y, 1)}),
    "names of the classes": ({}, {"y": np.array(["a", "b", "c"])[Y]}),
    "weights": ({}, {"sample_weight": np.linspace(1, 2, 36)}),
    "validation rows": ({}, {"X_val": X[:5], "y_val": Y[:5]}),
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_fit_begins_at_the_beginning(change, tmp_path):
    with pytest.raises(Killed):
        quick(tmp_path, 3).fit(X, Y)
    [left] = tmp_path.iterdir()
    content = left.read_bytes()
    params, data = OTHERS[change]
    data = {"X": X, "y": Y, **data}
    assert same_fit(quick(tmp_path, **params).fit(**data), quick(**params).fit(**data))
    assert list(tmp_path.iterdir()) == [left]  # its own is gone, the other there
    assert left.read_bytes() == content


def test_what_does_not_change_the_fit_does_not_part_from_it(tmp_path):
    with pytest.raises(Killed):
        quick(tmp_path, 3, class_weight={0: 1.0, 1: 2.0, 2: 3.0}).fit(X, Y)
    [left] = tmp_path.iterdir()
    clf = quick(str(tmp_path), 1, class_weight={2: 3.0, 1: np.float64(2.0), 0: 1.0}, n_jobs=2)
    view = np.concatenate([X, X])[:36].swapaxes(1, 2).copy().swapaxes(1, 2)
    clf.fit(view, Y.tolist())  # in epoch 1 nobody kills it: it goes on in epoch 3
    assert not left.exists()
    assert clf.n_iter_ == 4


def test_sparse_images_are_known_again(tmp_path):
    images = sparse.csr_matrix(np.where(X > 120, X, 0).reshape(36, -1))
    with pytest.raises(Killed):
        quick(tmp_path, 3).fit(images, Y)
    assert same_fit(quick(tmp_path, 1).fit(images, Y), quick().fit(images, Y))


# ---- files ----


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a file"
    write_whole(path, b"first")
    assert path.read_bytes() == b"first"
    write_whole(str(path), b"second")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    def killed(*args):
        raise Killed

    for name, fault, error in [("fsync", full, OSError), ("replace", killed, Killed)]:
        with monkeypatch.context() as patch:
            patch.setattr(files_module.os, name, fault)
            with pytest.raises(error) as caught:
                write_whole(path, b"third")
        assert path.read_bytes() == b"second"
        assert list(tmp_path.iterdir()) == [path]
        if error is OSError:
            assert caught.value.errno == errno.ENOSPC
            assert "No space left" in str(caught.value)
            assert "a file" in str(caught.value)


def test_removing_takes_what_killed_processes_left(tmp_path):
    write_whole(tmp_path / "one", b"1")
    write_whole(tmp_path / "other", b"2")
    (tmp_path / ".one.0a1b.part").write_bytes(b"half")
    (tmp_path / ".other.0a1b.part").write_bytes(b"half")
    remove_whole(tmp_path / "one")
    remove_whole(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0a1b.part", "other"]


def test_the_umask_decides_who_reads_a_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755])
def test_who_could_read_a_file_can_read_what_replaces_it(mode, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    path.chmod(mode)
    seen = []
    fsync = os.fsync

    def watch(handle):
        seen.append(os.fstat(handle).st_mode & 0o777)
        fsync(handle)

    monkeypatch.setattr(files_module.os, "fsync", watch)
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == mode
    assert seen[0] == mode  # and nobody else before


def test_one_holds_a_file_at_a_time(tmp_path):
    """Locks that come and go while others ask for them: never two have one, and nothing is left."""
    holders, most = [], []

    def ask():
        n_held = 0
        while n_held < 50:
            with contextlib.suppress(BlockingIOError), hold(tmp_path / "file"):
                n_held += 1
                holders.append(1)
                time.sleep(0)
                most.append(len(holders))
                holders.pop()

    with ThreadPoolExecutor(4) as pool:
        for asked in [pool.submit(ask) for _ in range(4)]:
            asked.result()
    assert most == [1] * 200
    assert list(tmp_path.iterdir()) == []


def test_who_cannot_hold_a_file_is_told_by_whom(tmp_path):
    (tmp_path / ".file.lock").touch()  # of a process that was killed
    with hold(tmp_path / "file"):
        with pytest.raises(BlockingIOError, match=r"\.file\.lock"), hold(str(tmp_path / "file")):
            pass
        with hold(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), hold(tmp_path / "nowhere" / "file"):
        pass


@pytest.mark.parametrize("system", ["Windows", "a file system without locks"])
def test_where_there_are_no_locks_nothing_is_held(system, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    if system == "Windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", refuse)
    with hold(tmp_path / "file"), hold(tmp_path / "file"):
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_fit_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        quick(tmp_path, 3).fit(X, Y)
    [path] = tmp_path.iterdir()
    content = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    clf = quick(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            clf.fit(X, Y)
    assert caught.value.filename == path.as_posix()
    assert not hasattr(clf, "network_")
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    assert same_fit(clf.fit(X, Y), quick().fit(X, Y))


@pytest.mark.parametrize("spoil", [lambda c: c[:-1], lambda c: c[:10], lambda c: c[:99] + b"!" + c[100:]])
def test_a_damaged_checkpoint_is_named(spoil, tmp_path):
    with pytest.raises(Killed):
        quick(tmp_path, 3).fit(X, Y)
    [path] = tmp_path.iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint_dir: .*\.checkpoint is damaged"):
        quick(tmp_path).fit(X, Y)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "a\0b"):
        with pytest.raises(ValueError, match="checkpoint_dir="):
            quick(folder).fit(X, Y)
    quick(tmp_path / "new" / "folder").fit(X, Y)
    assert list((tmp_path / "new" / "folder").iterdir()) == []


# ---- Ctrl-C ----


class Interrupt(skorch.callbacks.Callback):
    """Ctrl-C in the given training batch of an epoch."""

    def __init__(self, epoch, batch):
        self.epoch_, self.batch_ = epoch, batch

    def on_batch_end(self, net, training=False, **kwargs):
        at = len(net.history), len(net.history[-1]["batches"])
        if training and at == (self.epoch_, self.batch_):
            raise KeyboardInterrupt


def interrupted(epoch, batch, **params):
    clf = quick(**params).set_params(callbacks=[Interrupt(epoch, batch)])
    with pytest.warns(UserWarning, match=f"interrupted after {epoch - 1} of") as record:
        clf.fit(X, Y)
    return clf, str(record[0].message)


def test_ctrl_c_leaves_the_last_whole_epoch():
    """Wherever in the next epoch it comes: weights, generator and batch norm are those of that epoch."""
    first, message = interrupted(3, 1)
    later, _ = interrupted(3, 3)
    assert "that of epoch 2, the last whole one." in message
    assert first.n_iter_ == 2
    assert same_fit(first, later)
    assert first.k_ == int(first.history_["k"][-1] + 0.5)
    # As if it had ended there, but for what goes by the length of a fit.
    same = {"lr_schedule": None, "weight_decay": 1e-4}
    short = quick(max_epochs=2, **same).fit(X, Y)
    assert same_fit(interrupted(3, 2, **same)[0], short)


def test_ctrl_c_with_early_stopping_leaves_the_best_epoch():
    params = {"early_stopping": True, "max_epochs": 12, "lr": 0.01, "lr_schedule": None, "patience": 9}
    weights = {}

    class Watch(Interrupt):
        def on_epoch_end(self, net, **kwargs):
            weights[len(net.history)] = net.module_.fusion.out.weight.detach().clone()

    clf = quick(**params).set_params(callbacks=[Watch(8, 2)])
    with pytest.warns(UserWarning, match=r"that of epoch \d, the best so far"):
        clf.fit(X, Y, X_val=X, y_val=(Y + 1) % 3)  # the more it learns, the more it fails
    best = int(clf.history_["valid_loss"].argmin()) + 1
    assert best < 7, "the case would prove nothing"
    assert torch.equal(clf.network_.fusion.out.weight, weights[best])
    assert not torch.equal(clf.network_.fusion.out.weight, weights[7])


def test_after_ctrl_c_the_same_fit_goes_on(tmp_path):
    clf = quick(tmp_path).set_params(callbacks=[Interrupt(3, 2)])
    with pytest.warns(UserWarning, match="goes on from its checkpoint"):
        clf.fit(X, Y)
    clf.predict(X)
    assert len(list(tmp_path.iterdir())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf.set_params(callbacks=[Interrupt(0, 0)]).fit(X, Y)
    assert same_fit(clf, quick().fit(X, Y))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_first_epoch_is_done_ends_as_ctrl_c():
    for epoch, batch in [(1, 1), (1, 3)]:
        with pytest.raises(KeyboardInterrupt):
            quick().set_params(callbacks=[Interrupt(epoch, batch)]).fit(X, Y)


# ---- numbers that go wrong ----


class Spoil(skorch.callbacks.Callback):
    """Put a NaN into a weight in the given training batch."""

    def __init__(self, epoch, batch):
        self.epoch_, self.batch_ = epoch, batch

    def on_batch_end(self, net, training=False, **kwargs):
        at = len(net.history), len(net.history[-1]["batches"])
        if training and at == (self.epoch_, self.batch_):
            with torch.no_grad():
                net.module_.fusion.out.weight[0, 0] = np.nan


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((2, 2), r"epoch 2, batch 3: the loss is not finite"),
        ((2, 4), r"epoch 2, batch 4: a step has led to weights that are not finite"),
    ],
)
def test_divergence_names_epoch_and_batch_and_keeps_what_was(at, message, tmp_path):
    clf = quick(warm_start=True).fit(X, Y)
    before = clf.predict_proba(X)
    with pytest.raises(ValueError, match=f"diverged in {message}.* Try an lr lower than 0.01"):
        clf.set_params(callbacks=[Spoil(*at)], checkpoint_dir=tmp_path).fit(X, Y)
    np.testing.assert_array_equal(clf.predict_proba(X), before)
    [path] = tmp_path.iterdir()  # of the last good epoch
    state = saved(path)
    assert len(state["history"]) == 1
    assert all(tensor.isfinite().all() for tensor in state["module"].values())


# ---- functions and objects ----


def shift(images, rng, by=0.0):
    return images + np.float32(by)


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, images, rng):
        return shift(images, rng, self.by)


def lambda_with(by):
    return lambda images, rng: shift(images, rng, by)


PAIRS = {
    "partial": lambda by: functools.partial(shift, by=by),
    "closure": lambda_with,
    "object": Shift,
    "method": lambda by: Shift(by).__call__,
    "nested": lambda by: functools.partial(lambda_with(by)),
    "generator": lambda by: functools.partial(shift, by=np.random.default_rng(int(100 * by)).normal()),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_function_with_other_arguments_is_another_fit(kind, tmp_path):
    make = PAIRS[kind]
    assert describe("augment", make(0.1)) == describe("augment", make(0.1))
    assert describe("augment", make(0.1)) != describe("augment", make(0.9))


def test_a_fit_with_another_partial_begins_at_the_beginning(tmp_path):
    weak, strong = (functools.partial(shift, by=by) for by in (0.01, 0.2))
    with pytest.raises(Killed):
        quick(tmp_path, 3, augment=weak).fit(X, Y)
    assert same_fit(quick(tmp_path, augment=strong).fit(X, Y), quick(augment=strong).fit(X, Y))
    assert len(list(tmp_path.iterdir())) == 1
    assert same_fit(quick(tmp_path, 1, augment=weak).fit(X, Y), quick(augment=weak).fit(X, Y))


def test_lambdas_differ_by_code_constants_and_defaults():
    several = [lambda x, r: x + 1, lambda x, r: x + 2, lambda x, r: x * 1, lambda x, r, s=1: x + 1]
    assert len({repr(describe("augment", one)) for one in several}) == 4


def test_what_cannot_be_described_is_refused_by_name(tmp_path):
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"augment=.*cannot be described"):
        quick(tmp_path, augment=lambda images, rng: images + bool(lock)).fit(X, Y)
    assert list(tmp_path.iterdir()) == []


NAME_OF_A_FIT = """
import numpy as np
from sklearn_sparseattn.training.checkpoint import __file__, fingerprint
print(__file__, fingerprint({}, np.arange(2), [None]))
"""


def test_the_code_of_the_package_is_part_of_the_name(tmp_path):
    """Of a copy of the package, in which a digit is changed, or a file is added."""
    package = Path(checkpoint_module.__file__).parents[1]
    copied = tmp_path / package.name
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))

    def name_of_a_fit():
        command = [sys.executable, "-c", NAME_OF_A_FIT]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        file, name = run.stdout.split()
        assert Path(file) == copied / "training" / "checkpoint.py"
        return name

    names = [name_of_a_fit()]
    assert names == [checkpoint_module.fingerprint({}, np.arange(2), [None])]
    file = copied / "training" / "losses.py"
    content = file.read_text(encoding="utf-8")
    changed = content.replace("1e-6", "1e-7", 1)
    assert len(changed) == len(content)
    assert changed != content
    file.write_text(changed, encoding="utf-8")
    names.append(name_of_a_fit())
    file.write_text(content, encoding="utf-8")
    file.with_name("_another.py").touch()
    names.append(name_of_a_fit())
    assert len(set(names)) == 3
