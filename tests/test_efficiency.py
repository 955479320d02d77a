"""What benchmarks/efficiency.py and scaling.py compute beside their measuring, and one small run of each."""

import copy
import gc
import mmap
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sklearn_sparseattn.images import PixelScale

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def keep_threads():
    """Some scripts set PyTorch's threads."""
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def efficiency(load_benchmark):
    return load_benchmark("efficiency")


@pytest.fixture
def tables(load_benchmark):
    return load_benchmark("efficiency_tables")


@pytest.fixture
def ours(load_benchmark):
    return load_benchmark("ours")


@pytest.fixture
def runtimes(load_benchmark):
    return load_benchmark("runtimes")


@pytest.fixture
def timing(load_benchmark):
    return load_benchmark("timing")


@pytest.fixture
def scaling(load_benchmark):
    return load_benchmark("scaling")


def into(folder, script, monkeypatch):
    """Let a script write into a folder; its results and its document."""
    name = script.__name__
    document = folder / "README.md"
    document.write_text(f"before\n<!-- {name}: begin -->\n<!-- {name}: end -->\nafter\n")
    monkeypatch.setattr(script, "RESULTS", folder / f"{name}.json")
    monkeypatch.setattr(script, "README", document)
    return script.RESULTS, document


def test_documents_have_a_place_for_the_tables():
    text = (BENCHMARKS / "README.md").read_text()
    for name in ("efficiency", "scaling"):
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1


# ---- efficiency ----


def contestant(model, runtime, precision, *rates, **setting):
    return {"model": model, "runtime": runtime, "precision": precision, "rates": list(rates), **setting}


CONTESTANTS = {
    "sparseattn": contestant("sparseattn", "predict_proba", "fp32", 100.0, 90.0, 120.0),
    "resnet50/eager": contestant("resnet50", "eager", "fp32", 10.0, 10.0, 10.0, batch=4, streams=1),
    "resnet50/openvino": contestant("resnet50", "openvino", "fp32", 20.0, 30.0, 30.0, batch=8, streams=2),
    "resnet50/openvino_bf16": contestant(
        "resnet50", "openvino_bf16", "bf16", 40.0, 60.0, 1.0, batch=1, streams=1
    ),
}


def test_best_setting_is_the_fastest(efficiency):
    found = [
        {"batch": batch, "streams": streams, "images_per_second": speed}
        for batch, streams, speed in [(1, 1, 5.0), (8, 2, 9.0), (64, 2, 8.9)]
    ]
    assert efficiency.best_setting(found) == {"batch": 8, "streams": 2}


def test_fastest_keeps_to_the_precision(tables):
    assert tables.fastest(CONTESTANTS, "resnet50", ("fp32",)) == "resnet50/openvino"
    assert tables.fastest(CONTESTANTS, "resnet50") == "resnet50/openvino_bf16"
    assert tables.fastest(CONTESTANTS, "mobilenetv2") is None


def test_ratio_is_that_of_the_rounds(tables):
    # The medians' own ratio would be 100 / 30.
    ours, peer = CONTESTANTS["sparseattn"]["rates"], CONTESTANTS["resnet50/openvino"]["rates"]
    assert tables.ratio(ours, peer) == pytest.approx((4, 3, 5))


def test_rate_counts_whole_units_and_at_least_one(timing):
    def unit():
        time.sleep(0.01)
        return 5

    assert 5 / 0.1 < timing.rate(unit, 0) <= 5 / 0.01
    assert 5 / 0.1 < timing.rate(unit, 0.05) <= 5 / 0.01


def test_all_take_turns(timing, monkeypatch):
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    calls = []
    found = timing.in_turns({"a": 1, "b": 2, "c": 3}, 8, lambda x: calls.append(x) or len(calls))
    rounds = np.reshape(calls, (8, 3))
    assert (np.sort(rounds) == [1, 2, 3]).all()
    assert len(np.unique(rounds, axis=0)) > 1
    assert sorted(np.concatenate(list(found.values()))) == list(range(1, 25))


def test_peak_memory_sees_what_is_gone_again(load_benchmark):
    """Mapped anew: NumPy may be given memory that is freed but was never handed back, and nothing grows."""
    gc.collect()
    deadline = time.monotonic() + 60  # on a busy machine the watcher's turn may be long in coming
    fresh = mmap.mmap(-1, 30 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with load_benchmark("memory_use").peak_memory() as found, fresh as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        while found["growth_mb"] < 25 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert 25 < found["growth_mb"] < 60


def test_multiply_adds_of_a_peer(efficiency):
    found = efficiency.cost(torch.nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 10, 10))
    assert found == {"parameters": 54, "multiply_adds": 54 * 100}


def test_a_peer_computes_the_same_in_every_runtime(runtimes, ours, tmp_path):
    """Units give back nothing but counts, so that the outputs are looked at on their way."""
    import onnxruntime
    import openvino

    peer = runtimes.Peer("lenet", ours.cells(4, 32)[0], 1)
    peer.export(tmp_path)
    images = peer.batch(6)
    np.testing.assert_array_equal(images[4:], images[:2])  # the four again
    with torch.no_grad():
        expected = peer.network(images).numpy()
    np.testing.assert_allclose(expected[4:], expected[:2], rtol=1e-5)
    session = onnxruntime.InferenceSession(peer.onnx, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        session.run(None, {"images": images.numpy()})[0], expected, rtol=1e-3, atol=1e-5
    )
    compiled = openvino.Core().compile_model(peer.onnx, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled([images.numpy()])[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("runtime", ["eager", "channels_last_bf16", "onnxruntime", "openvino"])
def test_units_count_their_images(runtimes, ours, tmp_path, runtime):
    runtime = runtimes.RUNTIMES[runtime]
    assert not runtimes.missing(runtime.needs)
    peer = runtimes.Peer("lenet", ours.cells(4, 32)[0], 2)
    peer.export(tmp_path)
    for streams in runtime.streams:
        n_images = runtime.open(peer, 4, streams)()
        assert n_images == (4 if streams == 1 else streams * 32)


@pytest.fixture
def ours_fitted(ours):
    images, target = ours.cells(12, 40)
    return ours.fitted(images, target, 300, n_jobs=1), images


@pytest.mark.parametrize("depth", [2, 3])
def test_multiply_adds_of_the_engine(ours, depth):
    """PyTorch's own count of a pass, less what the engine has prepared or leaves out."""
    images, target = ours.cells(12, 40)
    clf = ours.fitted(images, target, 300, n_jobs=1, depth=depth)
    found, network = ours.multiply_adds(clf, images), clf.network_
    assert list(found) == ["coarse", "selection", "tokens", "head"]
    counted, plain = [], copy.deepcopy(network).double()  # in float32, compiled code may hide from the count
    scaled = PixelScale(clf.data_range_).finite(images[..., None]).astype(np.float64)
    for image in torch.from_numpy(scaled)[:, None]:
        with FlopCounterMode(display=False) as counter:
            pixels = plain(image).pixels.numpy()
        # 3x3 of each channel by itself is no matrix product, and not counted by PyTorch.
        n_early, n_middle = (
            ours.n_distinct_cells(pixels, 40, step, 40 // step, 40 // step) for step in (2, 4)
        )
        counted.append(counter.get_total_flops() / 2 + 9 * (8 * n_early + 16 * n_middle))
    length, width = network.fine.key.in_features, network.fine.key.out_features
    # Query and key of the CLS token and the folding of the keys; the attention that only maps need.
    prepared = 2 * length * width + width * length**2
    assert np.mean(counted) - sum(found.values()) == pytest.approx(prepared + 300 * width, abs=length * width)
    assert found["coarse"] == 20 * 20 * 9 * 8 + 10 * 10 * (9 * 8 * 16 + (depth - 2) * 9 * 16 * 16 + 16)
    assert found["head"] == 64 * 128 + 128 * 128 + 128 * 3


def test_distinct_cells(ours):
    # Of 5 x 6 pixels, cells over every second: 0-0, 0-1, 0-1 | 0-0, 2-2 (the last row has no cell below).
    pixels = np.array([[0, 1, 2], [0, 0, 29]])
    assert ours.n_distinct_cells(pixels, 6, 2, 3, 3) == 4


def test_profile(ours, ours_fitted):
    n_threads = torch.get_num_threads()
    found = ours.profile(*ours_fitted, rounds=2)
    parts = ["coarse", "selection", "tokens", "head", "reading", "Python and validation"]
    assert list(found["microseconds"]) == parts
    assert all(found["microseconds"][part] > 0 for part in parts[:4])
    assert found["ceiling_gflops"] > 0.1
    assert torch.get_num_threads() == n_threads


def test_exactness(ours, ours_fitted):
    clf, images = ours_fitted
    found = ours.exactness(clf, [images[:5], images[5:]])
    assert found["images"] == 12
    assert 0 < found["probability"] < 1e-5
    assert 0 < found["score"] < 1e-5
    assert found["left_to_float64"] == 0
    assert "choose" not in vars(clf.network_)  # it was a copy that was told the pixels


def test_exactness_sees_other_numbers(ours, ours_fitted, monkeypatch):
    """An engine of other weights: differences, and other pixels."""
    clf, images = ours_fitted
    engine = ours.engine_of(clf)
    monkeypatch.setattr(ours, "engine_of", lambda clf: engine)
    with torch.no_grad():
        clf.network_.coarse.score.weight.mul_(-1)
        clf.network_.fusion.out.bias[0] += 1
    found = ours.exactness(clf, [images])
    assert found["probability"] > 1e-3
    assert found["score"] > 1e-3
    assert found["other_pixels"] == 1


def test_without_the_engine_nothing_is_measured(ours, monkeypatch):
    images, target = ours.cells(6, 16)
    monkeypatch.setattr(ours.Engine, "of", lambda *args: None)
    with pytest.raises(SystemExit, match="compiled engine did not run"):
        ours.fitted(images, target, 20)


PLACE = {"processor": "a processor", "threads": 2, "versions": {"torch": "2.13", "openvino": "1.0"}}


def test_tables_of_efficiency(tables):
    rest = {"largest_score": 7.0, "other_pixels": 0.01}
    calls = {
        "sparseattn": {"n": 7, "p50": 0.001, "p99": 0.0025},
        "resnet50/eager": {"n": 7, "p50": 0.004, "p99": 0.005},
    }
    results = {
        "throughput": {"contestants": CONTESTANTS, "machine": PLACE, "engine": True},
        "latency": {"calls": calls, "machine": PLACE},
        "cost": {"models": {"sparseattn": {"parameters": 41388, "multiply_adds": 4_900_000}}},
        "memory": {"growth": {"sparseattn": {"growth_mb": 12.3}}},
        "profile": {
            "models": {
                "sparseattn": {
                    "microseconds": {"coarse": 30.0, "Python and validation": 10.0},
                    "multiply_adds": {"coarse": 300_000.0},
                    "ceiling_gflops": 100.0,
                },
            },
        },
        "accuracy": {
            "sets": {"noise": {"images": 5000, "probability": 2e-6, "score": 2e-5, "map": 3e-6} | rest}
        },
    }
    text = tables.tables(results)
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    assert [row[1].strip() for row in rows[:2]] == ["eager", "openvino"]  # the slowest first
    assert "| 8 × 2 | 30 | 4.00 × (3.00-5.00) | - | - |" in text
    assert "| its own | 100 | 1.00 × (1.00-1.00) | 1.00 ms | 2.50 ms |" in text
    assert "| `sparseattn` | 41,388 | 4.9 M | 12 MB |" in text
    assert "| coarse | 30.0 | 75.0% | 0.30 M | 20.0 | 20.0% |" in text
    assert "| Python and validation | 10.0 | 25.0% | - | - | - |" in text
    assert "| `predict_proba` | 40.0 | 100.0% | 0.30 M | 15.0 | 15.0% |" in text
    assert "| noise | 5,000 | 2.0e-06 | **2.0e-05** | 3.0e-06 | 7.0 | 1.00% |" in text
    assert text.endswith(
        "Machine: a processor, 2 threads; torch 2.13, openvino 1.0. The compiled engine ran."
    )
    assert tables.tables({}) == "Machine: nothing measured yet."


def test_what_is_to_be_reached_stands_beside_what_is(tables):
    def latency(p50, p99):
        return {"n": 7, "p50": p50, "p99": p99}

    contestants = CONTESTANTS | {
        "mobilenetv2/eager": contestant("mobilenetv2", "eager", "fp32", 10.0, 9.0, 12.0),
        "mobilenetv2/openvino_bf16": contestant("mobilenetv2", "openvino_bf16", "bf16", 50.0, 45.0, 60.0),
    }
    calls = {
        "sparseattn": latency(0.001, 0.004),
        "mobilenetv2/eager": latency(0.004, 0.008),
        "mobilenetv2/openvino_bf16": latency(0.0016, 0.0072),
    }
    results = {"throughput": {"contestants": contestants}, "latency": {"calls": calls}}
    lines = tables.summary(results, "sparseattn")
    against = "| images/s, against"
    any_precision = "the fastest in any precision, openvino_bf16"
    for expected in (
        f"{against} `mobilenetv2`, the fastest in fp32, eager | 10.0 × (10.0-10.0) | ≥ 6.4 × | yes |",
        f"{against} `mobilenetv2`, {any_precision} | 2.0 × (2.0-2.0) | ≥ 3 × | **no** |",
        f"{against} `resnet50`, the fastest in fp32, openvino | 4.0 × (3.0-5.0) | ≥ 29.6 × | **no** |",
        f"{against} `resnet50`, {any_precision} | 2.5 × (1.5-120.0) | - |  |",
        "| one image, p50, against `mobilenetv2`, the quickest in fp32, eager "
        "| 1.00 / 4.00 ms = 0.25 | ≤ 0.5 | yes |",
        "| one image, p50, against `mobilenetv2`, the quickest in any precision, openvino_bf16 "
        "| 1.00 / 1.60 ms = 0.62 | ≤ 0.5 | **no** |",
        "| one image, p99 / p50 | 4.00; `mobilenetv2`'s own, openvino_bf16: 4.50 "
        "| ≤ 3, or the peer's own | yes |",
    ):
        assert expected in lines


def test_what_is_not_installed_is_left_out(efficiency, tmp_path, monkeypatch, capsys):
    runtimes = {
        "eager": efficiency.RUNTIMES["eager"],
        "absent": efficiency.RUNTIMES["eager"]._replace(needs=("no_such_runtime",)),
        "broken": efficiency.RUNTIMES["eager"]._replace(open=lambda *args: 1 / 0),
    }
    monkeypatch.setattr(efficiency, "RUNTIMES", runtimes)
    monkeypatch.setitem(efficiency.NEEDS, "resnet50", ("no_such_package",))
    path, _ = into(tmp_path, efficiency, monkeypatch)
    peers = efficiency.open_peers(["resnet50", "lenet"], efficiency.cells(4, 32)[0], 1, tmp_path)
    efficiency.calibrate_all(peers, efficiency.QUICK)
    said = capsys.readouterr().out
    assert "resnet50 left out: not installed: no_such_package" in said
    assert "lenet/absent left out: not installed: no_such_runtime" in said
    assert "lenet/broken left out: ZeroDivisionError" in said
    assert list(efficiency.recorded(path)) == ["calibration/lenet/eager"]


def test_efficiency_quick(efficiency, tmp_path, monkeypatch, capsys):
    """All sections, against the smallest peer in the runtimes that start fast."""
    for name in efficiency.RUNTIMES.keys() - {"eager", "channels_last", "onnxruntime"}:
        monkeypatch.delitem(efficiency.RUNTIMES, name)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between turns
    in_child, memory_use = efficiency.in_child, sys.modules["memory_use"]

    def one_child(**spec):
        """Of ours for real; the peer's work is done here, to save a process."""
        if spec["work"] == "predict":
            return in_child(**spec)
        memory_use.CHILD_WORK["peer"](spec, {})
        return {"growth_mb": 1.0}

    monkeypatch.setattr(efficiency, "in_child", one_child)
    path, document = into(tmp_path, efficiency, monkeypatch)
    efficiency.main(["--quick", "--peers", "lenet", "--threads", "1"])
    results = efficiency.recorded(path)
    assert {"cost", "throughput", "latency", "memory", "profile", "accuracy"} <= set(results)
    assert all(results[section]["engine"] for section in ("throughput", "latency", "profile"))
    exact = results["accuracy"]["sets"]
    assert [run["images"] for run in exact.values()] == [20, 20]
    assert all(max(run["probability"], run["score"]) < 1e-5 for run in exact.values())
    contestants = results["throughput"]["contestants"]
    assert {"sparseattn", "lenet/eager", "lenet/channels_last"} <= set(contestants)
    assert set(results["latency"]["calls"]) == set(contestants)
    assert all(len(run["rates"]) == 2 for run in contestants.values())
    assert results["cost"]["models"]["lenet"]["parameters"] == 61_111
    assert 0 < results["memory"]["growth"]["sparseattn"]["growth_mb"] < 500
    text = document.read_text()
    assert text.startswith("before\n")
    assert len(re.findall(r"^\| `lenet` \|", text, re.M)) == len(contestants)  # one in the table of cost

    capsys.readouterr()
    efficiency.main(["--tables"])
    efficiency.main(["--quick", "--device", "cuda", "--tables"])
    assert document.read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_a_message(efficiency, tmp_path, monkeypatch, capsys):
    path, _ = into(tmp_path, efficiency, monkeypatch)
    efficiency.main(["--quick", "--device", "cuda"])
    assert "cuda left out: there is no CUDA device here" in capsys.readouterr().out
    assert not path.exists()


# ---- scaling ----


def test_line(scaling):
    x = np.array([1.0, 2.0, 5.0, 10.0])
    found = scaling.line(x, 3 + 2 * x)
    assert found["slope"] == pytest.approx(2)
    assert found["intercept"] == pytest.approx(3)
    assert found["r2"] == pytest.approx(1)
    assert scaling.line(x, 7 * x**2)["exponent"] == pytest.approx(2)
    assert scaling.line(x, 7 * x**2)["r2"] < 0.99
    assert scaling.line(x, [4, 4, 4, 4])["slope"] == pytest.approx(0)


def test_clock(scaling, monkeypatch):
    now = iter([0, 10, 11, 12, 20, 25, 27])
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(now))
    clock = scaling.BatchClock()
    clock.on_train_begin(None)
    for n_batches in (3, 2):
        clock.on_epoch_begin(None)
        for _ in range(n_batches):
            clock.on_batch_end(None, training=True)
            clock.on_batch_end(None, training=False)  # validation
    assert clock.epoch_seconds() == [12, 7]
    assert clock.batch_seconds() == 1  # of 1, 1 and 2; the first of each epoch does not count


def test_resized(scaling):
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    assert scaling.resized(images, 20).shape == (2, 20, 20)
    np.testing.assert_array_equal(scaling.resized(images, 8), images)


def test_tables_of_scaling(scaling):
    place = {"processor": "a processor", "threads": 2, "torch": "2.13"}
    points = {
        str(k): {"microseconds": 50 + 0.01 * k, "memory_mb": 20 + 0.001 * k} for k in (1000, 2000, 18225)
    }
    results = {
        "k": {"points": points | {"mobilenetv2": {"microseconds": 1400.0}}, "machine": place},
        "training": {
            "batch_size": 64,
            "k": 2146,
            "models": {"sparseattn": {"images_per_second": 300.0}, "resnet50": {"images_per_second": 7.5}},
            "machine": place,
        },
        "epoch": {
            "images": 320,
            "size": 64,
            "models": {
                "sparseattn": {"mean": 0.5, "first": 1.0, "last": 0.25},
                "resnet50": {"mean": 9.0, "first": 9.0, "last": 9.0},
            },
            "machine": place,
        },
    }
    text = scaling.tables(results)
    assert "| 18,225 | 232.2 | 38 MB |" in text
    assert "| (`mobilenetv2`, OpenVINO fp32) | 1,400.0 | - |" in text
    assert "10 µs for 1,000 more pixels chosen, beside 50 (R² = 1.000; exponent " in text
    assert "| `resnet50` | 7.5 | 40.0 × |" in text
    assert "| `resnet50` | 9.00 s | 9.00 s | 9.00 s | 18.0 × |" in text


def test_scaling_quick(scaling, tmp_path, monkeypatch, capsys):
    """Measure, take up again, draw; memory is measured for real in the run of efficiency.py."""
    path, document = into(tmp_path, scaling, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between turns
    specs = []

    def no_child(**spec):
        specs.append(spec)
        return {"growth_mb": 20.0 + len(specs), "seconds": 0.1}

    monkeypatch.setattr(scaling, "in_child", no_child)
    arguments = ["--quick", "--peers", "lenet", "--threads", "1"]
    scaling.main([*arguments, "--only", "k,training"])
    assert len(specs) == 2
    scaling.main([*arguments, "--plots", str(tmp_path / "plots")])
    done = re.findall(r"^(\w+) done$", capsys.readouterr().out, re.M)
    assert done == ["k", "training", "size", "n", "training_memory", "epoch"]
    assert [spec["n"] for spec in specs if "n" in spec] == [8, 16]
    assert specs[-1]["k"] == 400
    results = scaling.recorded(path)
    assert set(results["k"]["points"]) == {"102", "1024"}
    assert set(results["size"]["points"]) == {"256", "1024"}
    for section in ("training", "epoch"):
        assert set(results[section]["models"]) == {"sparseattn", "lenet"}
    text = document.read_text()
    assert "µs for 1,000 more pixels chosen" in text
    assert all((tmp_path / "plots" / f"scaling_{name}.png").exists() for name in ("k", "size", "n"))
    scaling.main(["--tables"])
    assert document.read_text() == text
