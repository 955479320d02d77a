"""The classifier on top, against its equation in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_sparseattn.network import FusionClassifier


def make_fusion(*args, **options):
    generator = torch.Generator().manual_seed(0)
    fusion = FusionClassifier(*args, **options).double()
    with torch.no_grad():
        for value in (*fusion.parameters(), *fusion.buffers()):
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for module in fusion.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_var.abs_().add_(0.1)
    return fusion


def array(tensor):
    return tensor.detach().numpy()


def normalized(features, norm, batch_statistics):
    mean = features.mean(0) if batch_statistics else array(norm.running_mean)
    variance = features.var(0) if batch_statistics else array(norm.running_var)
    return (features - mean) / np.sqrt(variance + norm.eps) * array(norm.weight) + array(norm.bias)


def layer(features, layers, batch_statistics):
    linear, norm, _ = layers
    return np.maximum(normalized(features @ array(linear.weight).T, norm, batch_statistics), 0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [(80, 3, 128), (5, 2, 1), (1, 1, 7)])
def test_logits_are_those_of_the_residual_mlp(sizes, training, normalize):
    in_features, n_classes, hidden_dim = sizes
    fusion = make_fusion(in_features, n_classes, hidden_dim=hidden_dim, normalize=normalize).train(training)
    features = np.random.default_rng(0).normal(size=(6, in_features))
    hidden = normalized(features, fusion.norm, training) if normalize else features
    hidden = layer(hidden, fusion.first, training)
    hidden = hidden + layer(hidden, fusion.residual, training)
    expected = hidden @ array(fusion.out.weight).T + array(fusion.out.bias)
    logits = fusion(torch.from_numpy(features))
    np.testing.assert_allclose(array(logits), expected, rtol=1e-10, atol=1e-10)


def test_rows_do_not_mix_in_evaluation():
    fusion = make_fusion(10, 4).eval()
    features = torch.randn(5, 10, dtype=torch.float64)
    alone = torch.cat([fusion(row[None]) for row in features])
    torch.testing.assert_close(alone, fusion(features), rtol=1e-12, atol=1e-12)


def test_gradient_reaches_every_parameter():
    fusion = make_fusion(10, 4).train()
    fusion(torch.randn(8, 10, dtype=torch.float64)).square().sum().backward()
    assert [name for name, p in fusion.named_parameters() if not p.grad.any()] == []
