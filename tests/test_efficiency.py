"""What benchmarks/efficiency.py and scaling.py compute beside their measuring, and one small run of each."""

import copy
import gc
import mmap
import re
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
    names = {"accuracy", "differences", "k", "ablation", "dynamic_k", "fields", "robustness", "explanation"}
    for name in names | {"efficiency", "scaling", "persistence", "maps", "faults"}:
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1


# ---- efficiency ----


def contestant(model, runtime, precision, *rates, **setting):
    return {"model": model, "runtime": runtime, "precision": precision, "rates": list(rates), **setting}


CONTESTANTS = {
    "tiles/2%": contestant("tiles/2%", "predict_proba", "fp32", 200.0, 200.0, 200.0),
    "tiles/8.2%": contestant("tiles/8.2%", "predict_proba", "fp32", 100.0, 90.0, 120.0),
    "twin/onnxruntime": contestant("twin", "onnxruntime", "fp32", 10.0, 10.0, 10.0, batch=8, streams=1),
    "twin/openvino": contestant("twin", "openvino", "fp32", 20.0, 30.0, 30.0, batch=32, streams=2),
    "twin/openvino_bf16": contestant("twin", "openvino_bf16", "bf16", 40.0, 60.0, 1.0, batch=64, streams=1),
}


def test_best_setting_is_the_fastest(efficiency):
    found = [
        {"batch": batch, "streams": streams, "images_per_second": speed}
        for batch, streams, speed in [(1, 1, 5.0), (8, 2, 9.0), (64, 2, 8.9)]
    ]
    assert efficiency.best_setting(found) == {"batch": 8, "streams": 2}


def test_fastest_keeps_to_the_precision(tables):
    assert tables.fastest(CONTESTANTS, "twin", ("fp32",)) == "twin/openvino"
    assert tables.fastest(CONTESTANTS, "twin") == "twin/openvino_bf16"
    assert tables.fastest(CONTESTANTS, "mobilenetv2") is None


def test_ratio_is_that_of_the_rounds(tables):
    # The medians' own ratio would be 100 / 30.
    ours, peer = CONTESTANTS["tiles/8.2%"]["rates"], CONTESTANTS["twin/openvino"]["rates"]
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


@pytest.mark.parametrize("name", ["lenet", "twin"])
def test_a_peer_computes_the_same_in_every_runtime(runtimes, ours, tmp_path, name):
    """Units give back nothing but counts, so that the outputs are looked at on their way."""
    import onnxruntime
    import openvino

    peer = runtimes.Peer(name, ours.cells(4, 32)[0], 1)
    peer.export(tmp_path)
    images = peer.batch(6)
    assert images.dtype == torch.uint8
    np.testing.assert_array_equal(images[4:], images[:2])  # the four again
    with torch.no_grad():
        expected = peer.network(images).numpy()
    np.testing.assert_allclose(expected.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(expected[4:], expected[:2], rtol=1e-5)
    session = onnxruntime.InferenceSession(peer.onnx, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        session.run(None, {"images": images.numpy()})[0], expected, rtol=1e-3, atol=1e-5
    )
    compiled = openvino.Core().compile_model(peer.onnx, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled([images.numpy()])[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "openvino_bf16"])
def test_units_count_their_images(runtimes, ours, tmp_path, runtime):
    runtime = runtimes.RUNTIMES[runtime]
    assert not runtimes.missing(runtime.needs)
    peer = runtimes.Peer("lenet", ours.cells(4, 32)[0], 2)
    peer.export(tmp_path)
    for streams in (1, 2):
        n_images = runtime.open(peer, 4, streams)()
        assert n_images == (4 if streams == 1 else streams * 64)


def test_mobilenetv2_is_run_in_one_runtime(runtimes):
    assert list(runtimes.runtimes_of("mobilenetv2")) == ["openvino"]
    assert runtimes.runtimes_of("twin") == runtimes.RUNTIMES


@pytest.fixture
def ours_fitted(ours):
    images, target = ours.cells(12, 40)
    return ours.fitted(images, target, 300, n_jobs=1), images


@pytest.mark.parametrize("size", ["default", "large"])
@pytest.mark.parametrize("share", [None, 0.5])
def test_multiply_adds_of_the_engine(ours, size, share):
    """PyTorch's own count of a pass, less what the engine has prepared or leaves out."""
    images, target = ours.cells(12, 40)
    clf = ours.predicting_with(ours.fitted(images, target, 304, n_jobs=1, size=size), predict_k=share)
    n, found, network = (50 if share else 19), ours.multiply_adds(clf), copy.deepcopy(clf.network_)
    assert list(found) == ["look", "tokens", "layers", "attention", "head"]
    network.k.fill_(16 * n)
    scaled = torch.from_numpy(PixelScale(clf.data_range_).finite(images[:1, ..., None]))
    with FlopCounterMode(display=False) as counter:
        assert network.eval()(scaled).tiles.shape == (1, n)
    length, width = network.fine.key.in_features, network.fine.key.out_features
    # Query and key of the CLS token and the folding of the keys; the attention that only maps need.
    prepared = 2 * length * width + width * length**2
    counted = counter.get_total_flops() // 2
    assert counted - sum(found.values()) == pytest.approx(prepared + n * width, abs=length * width)
    if size == "default":
        assert found["look"] == 20 * 20 * 9 * 8 + 10 * 10 * (9 * 8 * 16 + 16)
        assert found["tokens"] == n * 32 * (2 + 9 * 16 + 4 * 8)
        assert found["head"] == 96 * 128 + 128 * 128 + 128 * 3


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
    assert found["other_tiles"] < 1
    assert "choose" not in vars(clf.network_)  # it was a copy that was told the tiles


def test_exactness_sees_other_numbers(ours, ours_fitted, monkeypatch):
    """An engine of other weights: differences, and other tiles."""
    clf, images = ours_fitted
    engine = ours.engine_of(clf)
    monkeypatch.setattr(ours, "engine_of", lambda clf: engine)
    with torch.no_grad():
        clf.network_.coarse.score.weight.mul_(-1)
        clf.network_.fusion.out.bias[0] += 1
    found = ours.exactness(clf, [images])
    assert found["probability"] > 1e-3
    assert found["score"] > 1e-3
    assert found["other_tiles"] == 1


def test_without_the_engine_nothing_is_measured(ours, monkeypatch):
    images, target = ours.cells(6, 16)
    monkeypatch.setattr(ours.Engine, "of", lambda *args: None)
    with pytest.raises(SystemExit, match="compiled engine did not run"):
        ours.fitted(images, target, 20)


PLACE = {"processor": "a processor", "vectors": ["avx2", "fma"], "cores": 4, "threads": 2, "engine": "avx2"}
PLACE |= {"versions": {"torch": "2.13", "openvino": "1.0"}}


def test_tables_of_efficiency(tables):
    calls = {
        "tiles/8.2%": {"n": 7, "p50": 0.001, "p99": 0.0025},
        "twin/openvino": {"n": 7, "p50": 0.004, "p99": 0.005},
    }
    results = {
        "throughput/1": {"contestants": CONTESTANTS, "machine": PLACE},
        "throughput/4": {"contestants": CONTESTANTS, "machine": PLACE},
        "latency/1": {"calls": calls, "machine": PLACE},
        "cost": {"models": {"tiles/8.2%": {"parameters": 41388, "multiply_adds": 4_900_000}}},
        "profile": {
            "models": {
                "tiles/8.2%": {
                    "microseconds": {"coarse": 30.0, "Python and validation": 10.0},
                    "multiply_adds": {"coarse": 300_000.0},
                    "ceiling_gflops": 100.0,
                },
            },
        },
        "accuracy": {
            "sets": {
                "noise": {
                    "images": 5000,
                    "probability": 2e-6,
                    "score": 2e-5,
                    "largest_score": 7.0,
                    "other_tiles": 0.01,
                }
            }
        },
    }
    text = tables.tables(results)
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    assert [row[1].strip() for row in rows[:2]] == ["onnxruntime", "openvino"]  # the slowest first
    assert "| 32 × 2 | 30 | 4.00 × (3.00-5.00) | 4.00 ms | 5.00 ms |" in text
    assert "| 32 × 2 | 30 | 4.00 × (3.00-5.00) | - | - |" in text
    assert "| its own | 100 | 1.00 × (1.00-1.00) | 1.00 ms | 2.50 ms |" in text
    assert (
        text.index("| one thread |") < text.index("| 4 threads |") < text.index("`tiles/8.2%`, 4 threads |")
    )
    assert "| `tiles/8.2%` | 41,388 | 4.9 M |" in text
    assert "| coarse | 30.0 | 75.0% | 0.30 M | 20.0 | 20.0% |" in text
    assert "| Python and validation | 10.0 | 25.0% | - | - | - |" in text
    assert "| `predict_proba` | 40.0 | 100.0% | 0.30 M | 15.0 | 15.0% |" in text
    assert "| noise | 5,000 | 2.0e-06 | **2.0e-05** | 7.0 | 1.00% |" in text
    assert text.endswith(
        "Machine: a processor (avx2, fma), 4 cores; compiled engine: avx2; torch 2.13, openvino 1.0."
    )
    assert tables.tables({}) == "Not measured yet."


def test_what_is_to_be_reached_stands_beside_what_is(tables):
    contestants = CONTESTANTS | {
        "mobilenetv2/openvino": contestant(
            "mobilenetv2", "openvino", "fp32", 4.0, 3.0, 5.0, batch=8, streams=1
        )
    }
    calls = {"tiles/8.2%": {"n": 7, "p50": 0.0003, "p99": 0.004}}
    results = {"throughput/2": {"contestants": contestants}, "latency/2": {"calls": calls}}
    lines = tables.summary(results, 2)
    for expected in (
        "| images/s, against `mobilenetv2` in fp32, openvino | 25.00 × (24.00-30.00) | ≥ 25 × | yes |",
        "| images/s, against `twin` in fp32, openvino | 4.00 × (3.00-5.00) | ≥ 2 × | yes |",
        "| images/s, against `twin` in bf16, openvino_bf16 | 2.50 × (1.50-120.00) | ≥ 1 × | yes |",
        "| one image, p50 | 0.30 ms | ≤ 0.25 ms | **no** |",
    ):
        assert expected in lines


def test_machine_says_its_vector_extensions(load_benchmark, monkeypatch):
    report = load_benchmark("report")
    lines = "model name\t: Some Xeon\nflags\t\t: fpu avx2 amx_bf16 avx512f\nmodel name\t: Some Xeon\n"
    monkeypatch.setattr(report.Path, "exists", lambda path: True)
    monkeypatch.setattr(report.Path, "read_text", lambda path: lines)
    found = report.machine()
    assert (found["processor"], found["vectors"]) == ("Some Xeon", ["avx2", "avx512f", "amx_bf16"])


def test_points_of_the_figure_are_those_of_common_splits(tables, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    shares = {"accuracy_share_0.02": 0.7, "accuracy_share_0.04": 0.8, "accuracy_share_0.0823": 0.9}
    shares |= {"accuracy_share_0.16": 0.91, "accuracy_all": 0.92}
    rates = [("2%", 50.0), ("4%", 40.0), ("8.2%", 30.0), ("16%", 20.0), ("all", 10.0)]
    contestants = {f"tiles/{k}": contestant(f"tiles/{k}", "predict_proba", "fp32", r) for k, r in rates}
    contestants |= {key: run for key, run in CONTESTANTS.items() if key.startswith("twin")}
    results = {"throughput/2": {"contestants": contestants}}

    def run(model, split, value, **others):
        return {"data": "event", "model": model, "split": split, "accuracy": value, **others}

    of_accuracy = {
        "a": run("tiles", "seed0", 0.9, **shares),
        "b": run("tiles", "seed1", 0.9, **dict.fromkeys(shares, 0.0)),  # the twin has no such split
        "c": run("twin", "seed0", 0.85),
        "d": run("twin", "seed7", 0.1),
        "e": run("mobilenetv2", "seed0", 0.88),
    }
    runs = {
        model: [one for one in of_accuracy.values() if one["model"] == model][:1]
        for model in ("tiles", "twin")
    }
    points = tables.points_of(results, runs, 2)
    assert points["tiles/2%"] == pytest.approx((50, 70))
    assert points["tiles/all"] == pytest.approx((10, 92))
    assert points["twin, fp32"] == pytest.approx((30, 85))
    assert points["twin, bf16"] == pytest.approx((40, 85))
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    tables.figure(results, of_accuracy, tmp_path / "images" / "figure.png")
    assert (tmp_path / "images" / "figure.png").exists()
    [axes] = drawn[0].axes
    assert axes.get_title() == "event (n = 1)"
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [70, 80, 90, 91, 92])
    with pytest.raises(SystemExit, match="run accuracy"):
        tables.figure(results, {}, tmp_path / "figure.png")
    with pytest.raises(SystemExit, match="run efficiency"):
        tables.figure({}, of_accuracy, tmp_path / "figure.png")


def test_what_is_not_installed_is_left_out(efficiency, tmp_path, monkeypatch, capsys):
    some = efficiency.RUNTIMES["onnxruntime"]
    runtimes = {
        "onnxruntime": some,
        "absent": some._replace(needs=("no_such_runtime",)),
        "broken": some._replace(open=lambda *args: 1 / 0),
        "reduced": some._replace(precision="bf16"),
    }
    monkeypatch.setattr(efficiency, "runtimes_of", lambda name: runtimes)
    monkeypatch.setattr(efficiency, "has_bfloat16", lambda: False)
    monkeypatch.setitem(efficiency.NEEDS, "mobilenetv2", ("no_such_package",))
    path, _ = into(tmp_path, efficiency, monkeypatch)
    peers = efficiency.open_peers(["mobilenetv2", "lenet"], efficiency.cells(4, 32)[0], 1, tmp_path)
    efficiency.calibrate_all(peers, efficiency.QUICK)
    said = capsys.readouterr().out
    assert "mobilenetv2 left out: not installed: no_such_package" in said
    assert "lenet/absent left out: not installed: no_such_runtime" in said
    assert "lenet/broken left out: ZeroDivisionError" in said
    assert "lenet/reduced left out: the processor has no bfloat16" in said
    assert list(efficiency.recorded(path)) == ["calibration/1/lenet/onnxruntime"]


def test_efficiency_quick(efficiency, tmp_path, monkeypatch, capsys):
    """All sections, against the smallest peer."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between turns
    monkeypatch.setattr(efficiency, "has_bfloat16", lambda: False)
    path, document = into(tmp_path, efficiency, monkeypatch)
    efficiency.main(["--quick", "--peers", "lenet", "--threads", "2"])
    results = efficiency.recorded(path)
    sections = {"cost", "profile", "accuracy"}
    assert sections | {f"{name}/{n}" for name in ("throughput", "latency") for n in (1, 2)} <= set(results)
    assert all(results[section]["machine"]["engine"] for section in sections)
    exact = results["accuracy"]["sets"]
    assert [run["images"] for run in exact.values()] == [20, 20]
    assert all(max(run["probability"], run["score"]) < 1e-5 for run in exact.values())
    for n in (1, 2):
        contestants = results[f"throughput/{n}"]["contestants"]
        ours = {f"tiles/{k}" for k in ("2%", "4%", "8.2%", "16%", "all")}
        assert set(contestants) == ours | {"lenet/onnxruntime", "lenet/openvino"}
        assert set(results[f"latency/{n}"]["calls"]) == set(contestants) - ours | {"tiles/8.2%"}
        assert all(len(run["rates"]) == 2 for run in contestants.values())
    models = results["cost"]["models"]
    assert models["lenet"]["parameters"] == 61_111
    assert models["tiles/2%"]["multiply_adds"] < models["tiles/all"]["multiply_adds"]
    text = document.read_text()
    assert text.startswith("before\n")
    assert len(re.findall(r"^\| `lenet` \|", text, re.M)) == 2 * 2 + 1  # one in the table of cost

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
        "k": {"points": points | {"twin": {"microseconds": 1400.0}}, "machine": place},
        "training": {
            "batch_size": 64,
            "k": 2146,
            "models": {"tiles": {"images_per_second": 300.0}, "twin": {"images_per_second": 7.5}},
            "machine": place,
        },
        "epoch": {
            "images": 320,
            "size": 64,
            "models": {
                "tiles": {"mean": 0.5, "first": 1.0, "last": 0.25},
                "twin": {"mean": 9.0, "first": 9.0, "last": 9.0},
            },
            "machine": place,
        },
    }
    text = scaling.tables(results)
    assert "| 18,225 | 232.2 | 38 MB |" in text
    assert "| (`twin`, OpenVINO fp32) | 1,400.0 | - |" in text
    assert "10 µs for 1,000 more pixels chosen, beside 50 (R² = 1.000; exponent " in text
    assert "| `twin` | 7.5 | 40.0 × |" in text
    assert "| `twin` | 9.00 s | 9.00 s | 9.00 s | 18.0 × |" in text


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
        assert set(results[section]["models"]) == {"tiles", "lenet"}
    text = document.read_text()
    assert "µs for 1,000 more pixels chosen" in text
    assert all((tmp_path / "plots" / f"scaling_{name}.png").exists() for name in ("k", "size", "n"))
    scaling.main(["--tables"])
    assert document.read_text() == text
