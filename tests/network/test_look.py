"""The compiled coarse network, held to the same network in PyTorch, float64."""

import copy
import ctypes
import hashlib
import re
import runpy
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

from sklearn_sparseattn.network import CoarseAttention, SparseAttnNet, compiled, look

PACKAGE = Path(compiled.__file__).parents[1]
STRIDES = [(2, 2, 2), (1, 2, 2), (1, 1, 2), (3, 2, 1), (1, 5, 1)]
CHANNELS = [(8, 16), (8, 16, 24), (24, 8)]
N_PARTS = 4  # of what is seen: scores, pooled features, the first and the second map


def make_coarse(n_channels, strides=(2, 2, 2), channels=(8, 16), seed=0, kernel_size=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        coarse = CoarseAttention(n_channels, channels, strides, kernel_size)
    with torch.no_grad():
        for layers in (coarse.early, coarse.middle):
            layers[1].weight.uniform_(-0.5, 2, generator=generator)
            layers[1].bias.uniform_(-1, 1, generator=generator)
    return coarse


def make_images(shape, seed=0):
    return 3 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_threads_are_kept_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with compiled.keep_threads():
            with compiled.threads(8) as first, compiled.threads(1) as second:
                assert first is second
                assert compiled.share_out(first, lambda start, stop: 0, 8)
            with compiled.keep_threads(), compiled.threads(8) as inner:
                assert inner is not first
            with compiled.threads(8) as again:
                assert again is first
        with compiled.threads(8) as later:
            assert later is not first
        with pytest.raises(RuntimeError, match="after shutdown"):
            first.submit(int)
    finally:
        torch.set_num_threads(before)


def test_pytorch_alone_is_for_the_thread_that_asks():
    before, counts = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with compiled.pytorch_alone():
            assert torch.get_num_threads() == 3  # where no threads are kept it has its own
        with compiled.keep_threads(), compiled.pytorch_alone():
            assert torch.get_num_threads() == 1
            other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert counts == [3]
            with compiled.threads(8) as pool:
                shares = []
                assert compiled.share_out(pool, lambda *share: shares.append(share) or 0, 8)
                assert sorted(shares) == [(0, 2), (2, 5), (5, 8)]
            with pytest.raises(ZeroDivisionError), compiled.pytorch_alone():
                raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_pytorch_alone_reaches_its_products_of_matrices():
    """MKL, which has a count of threads of its own, takes no processor time on others."""
    a = torch.ones(64, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with compiled.keep_threads(), compiled.pytorch_alone():
            (a @ a).sum()
            time.sleep(0.5)  # until threads that were started before are at rest
            whole, own = time.process_time(), time.thread_time()
            while time.thread_time() - own < 0.3:
                a @ a
            others = (time.process_time() - whole) - (time.thread_time() - own)
    finally:
        torch.set_num_threads(before)
    assert others < 0.1


def in_pytorch(coarse, dtype):
    plain = copy.deepcopy(coarse).to(dtype)
    plain.compiled = False
    return plain


def is_compiled(coarse, images):
    return look.look(images, coarse.early, coarse.middle, coarse.score) is not None


def gradients_of(coarse, images, used=range(N_PARTS)):
    """What is seen, and the gradients of a random linear function of some of it."""
    generator = torch.Generator().manual_seed(1)
    seen = coarse.look(images)
    parts = [seen.scores, seen.z_coarse, *seen.maps]
    weights = [torch.randn(part.shape, generator=generator).to(part) for part in parts]
    sum((parts[i] * weights[i]).sum() for i in used).backward()
    return parts, {name: p.grad for name, p in coarse.named_parameters()}


def distance(found, expected):
    return ((found.double() - expected).abs().max() / (expected.abs().max() + 1e-2)).item()


def assert_as_pytorch(coarse, images, used=range(N_PARTS)):
    assert is_compiled(copy.deepcopy(coarse), images)
    exact, rounded = in_pytorch(coarse, torch.float64), in_pytorch(coarse, torch.float32)
    parts, gradients = gradients_of(coarse, images, used)
    exact_parts, exact_gradients = gradients_of(exact, images.double(), used)
    _, rounded_gradients = gradients_of(rounded, images, used)
    for part, expected in zip(parts, exact_parts, strict=True):
        assert part.shape == expected.shape
        assert distance(part.detach(), expected.detach()) <= 1e-5
    for name, buffer in coarse.named_buffers():
        assert distance(buffer, dict(exact.named_buffers())[name]) <= 1e-5, name
    for name, expected in exact_gradients.items():
        if expected is None:
            assert gradients[name] is None
            continue
        usual = distance(rounded_gradients[name], expected)  # batch norm of few cells magnifies
        assert distance(gradients[name], expected) <= max(1e-3, 5 * usual), name


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 24, 17), (4, 1, 1, 60), (3, 2, 33, 12)], ids=str)
def test_what_is_seen_and_gradients(shape, strides, channels):
    assert_as_pytorch(make_coarse(shape[1], strides, channels), make_images(shape))


@pytest.mark.parametrize("kernel_size", [5, 7])
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 24, 17), (4, 1, 1, 60), (3, 2, 33, 12)], ids=str)
def test_larger_kernels(shape, strides, kernel_size):
    assert_as_pytorch(make_coarse(shape[1], strides, kernel_size=kernel_size), make_images(shape))


@pytest.mark.parametrize("kernel_size", [5, 7])
def test_larger_kernels_of_the_second_stage(kernel_size):
    coarse = make_coarse(2)
    coarse.middle[0] = torch.nn.Conv2d(8, 16, kernel_size, 2, padding=kernel_size // 2, bias=False)
    assert_as_pytorch(coarse, make_images((3, 2, 33, 18)))


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 1, 1), (4, 1, 2, 3)], ids=str)
def test_the_smallest_images(shape, strides, kernel_size):
    assert_as_pytorch(make_coarse(shape[1], strides, kernel_size=kernel_size), make_images(shape))


@pytest.mark.parametrize("shape", [(3, 1, 135, 135), (8, 3, 64, 64), (2, 5, 30, 80)], ids=str)
def test_larger_images(shape):
    assert_as_pytorch(make_coarse(shape[1]), make_images(shape))


@pytest.mark.parametrize("used", [(0,), (1,), (3,), (0, 1), (1, 2, 3)], ids=str)
def test_where_only_some_of_it_is_learned_from(used):
    """Scores that are not used leave no gradient, not zeros: an optimiser would go on by its momentum."""
    assert_as_pytorch(make_coarse(2), make_images((3, 2, 20, 27)), used)


def test_images_in_any_order_of_memory():
    images = make_images((3, 20, 27, 3)).permute(0, 3, 1, 2)
    assert_as_pytorch(make_coarse(3), images)


def test_maxima_that_tie_share_their_gradient():
    images = torch.arange(3.0)[:, None, None, None].expand(3, 2, 24, 24)
    coarse = make_coarse(2)
    flat = coarse.look(images).maps[1].flatten(2)
    assert ((flat == flat.amax(2, keepdim=True)).sum(2) > 1).any()
    assert_as_pytorch(make_coarse(2), images, used=(1,))


def test_a_large_mean_does_not_drown_the_variance():
    coarse, images = make_coarse(1), 1000 + make_images((3, 1, 30, 30))
    with torch.no_grad():
        coarse.early[0].weight.abs_()
    exact = in_pytorch(coarse, torch.float64)
    coarse.look(images)
    exact.look(images.double())
    torch.testing.assert_close(
        coarse.early[1].running_var.double(), exact.early[1].running_var, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("n_threads", [2, 3])
def test_the_same_bits_with_any_number_of_threads(n_threads):
    images, before, outcomes = make_images((7, 3, 40, 33)), torch.get_num_threads(), []
    try:
        for n in (1, n_threads):
            torch.set_num_threads(n)
            coarse = make_coarse(3)
            parts, gradients = gradients_of(coarse, images)
            outcomes.append([*parts, *gradients.values(), *coarse.buffers()])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_without_gradients_statistics_are_kept_all_the_same():
    coarse, images = make_coarse(1), make_images((4, 1, 16, 16))
    plain = in_pytorch(coarse, torch.float32)
    with torch.no_grad():
        found, expected = coarse.look(images), plain.look(images)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    for (name, buffer), other in zip(coarse.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-5, atol=1e-6, msg=name)
    assert coarse.early[1].num_batches_tracked == 1


def test_no_number_goes_by_unseen():
    coarse, images = make_coarse(1), make_images((2, 1, 16, 16))
    with torch.no_grad():
        coarse.early[0].weight[0, 0, 0, 0] = float("nan")
    seen = coarse.look(images)
    assert seen.scores.isnan().all()
    assert seen.z_coarse.isnan().any()


def test_when_pytorch_has_to_do_it():
    coarse, images = make_coarse(2), make_images((3, 2, 16, 16))
    assert is_compiled(coarse, images)
    assert not is_compiled(coarse, images[:1])
    assert not is_compiled(coarse, images.double())
    assert not is_compiled(coarse, images.to("meta"))
    assert not is_compiled(coarse, images.clone().requires_grad_())
    assert not is_compiled(make_coarse(2, channels=(4, 16)), images)
    assert not is_compiled(CoarseAttention(2, (8, 16), depth=3), images)
    for change in (
        lambda c: c.eval(),
        lambda c: c.double(),
        lambda c: setattr(c.early[1], "momentum", None),
        lambda c: setattr(c.middle[0], "stride", (2, 1)),
        lambda c: setattr(c.middle[0], "padding", (0, 0)),
        lambda c: setattr(c.early, "0", torch.nn.Conv2d(2, 8, 9, 2, padding=4, bias=False)),
        lambda c: setattr(c.early, "0", torch.nn.Conv2d(2, 8, (3, 5), 2, padding=(1, 2), bias=False)),
        lambda c: setattr(c.early[0], "padding_mode", "replicate"),
        lambda c: setattr(c.middle[0], "dilation", (2, 2)),
        lambda c: setattr(c.middle[0], "groups", 2),
        lambda c: setattr(c.early[0], "bias", torch.nn.Parameter(torch.zeros(8))),
        lambda c: setattr(c.early, "1", torch.nn.BatchNorm2d(8, affine=False)),
        lambda c: setattr(c.early, "1", torch.nn.BatchNorm2d(8, track_running_stats=False)),
        lambda c: setattr(c.early, "2", torch.nn.GELU()),
        lambda c: setattr(c, "middle", c.middle.append(torch.nn.Tanh())),
        lambda c: setattr(c, "middle", torch.nn.Conv2d(8, 16, 3)),
        lambda c: setattr(c, "score", torch.nn.Conv2d(16, 1, 3, padding=1)),
        lambda c: setattr(c, "score", torch.nn.Conv2d(16, 1, 1, bias=False)),
    ):
        other = make_coarse(2)
        change(other)
        assert not is_compiled(other, images)


HOOKS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
]


# What PyTorch says where a layer is given images, which have no gradients.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", ["early", "early.0", "early.1", "middle.2", "score"])
def test_hooks_are_called(layer, hook):
    coarse, images, calls = make_coarse(1), make_images((3, 1, 16, 16)), []
    handle = getattr(coarse.get_submodule(layer), hook)(lambda *given: calls.append(layer))
    assert not is_compiled(coarse, images)
    coarse.look(images).scores.square().sum().backward()
    assert calls == [layer]
    handle.remove()
    assert is_compiled(coarse, images)


def test_without_compiled_code_pytorch_does_it(monkeypatch):
    images = make_images((4, 1, 16, 16))
    network = SparseAttnNet(1, 3, 40)
    compiled = copy.deepcopy(network)(images)
    monkeypatch.setattr(look, "_LIBRARY", None)
    plain = network(images)
    torch.testing.assert_close(compiled.scores, plain.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.logits, plain.logits, rtol=1e-3, atol=1e-4)


def test_images_may_have_gradients():
    images = make_images((3, 1, 12, 12)).requires_grad_()
    make_coarse(1).look(images).scores.square().sum().backward()
    assert images.grad.abs().sum() > 0


def library_of(sources):
    return SimpleNamespace(sparseattn_sources=lambda: sources)


def test_code_whose_sources_were_changed_is_known():
    digest = hashlib.blake2b((PACKAGE / "network/_look.c").read_bytes(), digest_size=8).hexdigest()
    known, other = f"network/_look.c:{digest}", f"network/_lanes.h:{'0' * 16}"
    assert not compiled.is_stale(library_of(known.encode()))
    assert compiled.is_stale(library_of(f"{known},{other}".encode()))
    # Of what is not there, nothing can be said.
    assert not compiled.is_stale(library_of(f"{known},{other.replace('_lanes', '_none')}".encode()))
    assert not compiled.is_stale(library_of(b""))
    assert not compiled.is_stale(SimpleNamespace())


@pytest.mark.filterwarnings(r"ignore:`\[tool.setuptools.ext-modules\]` .* is still \*experimental")
def test_setup_tells_compiled_code_what_it_is_built_from(tmp_path, monkeypatch):
    monkeypatch.chdir(PACKAGE.parent)
    found = {}
    monkeypatch.setattr("setuptools.setup", lambda cmdclass: found.update(cmdclass))
    runpy.run_path("setup.py")
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    for extension in distribution.ext_modules:
        extension.extra_compile_args = ["-std=gnu11", "-O0", "-w"]
    build = found["build_ext"](distribution)
    build.build_lib, build.build_temp = str(tmp_path), str(tmp_path / "temp")
    build.ensure_finalized()
    build.run()
    for extension in distribution.ext_modules:
        library = ctypes.CDLL(build.get_ext_fullpath(extension.name))
        assert not compiled.is_stale(library)
        told = library.sparseattn_sources().decode()
        included = re.findall('#include "([^"]*)"', Path(extension.sources[0]).read_text())
        assert included
        for name in (extension.sources[0], *included):
            assert f"{Path(name).name}:" in told


def test_code_built_from_other_sources_is_refused():
    class Other(ctypes.Structure):
        _fields_ = [("n", ctypes.c_int32)]

    with pytest.raises(ImportError, match="built from other sources"):
        look.load_library("look", Other)
