"""scikit-learn's own checks, on both estimators, with nothing switched off but the two named here."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from sklearn_sparseattn import PixelSetTransformer, SparseAttnClassifier

# Minibatches: a weight of 2 is not the same as a row that comes twice. scikit-learn's own SGDClassifier
# fails these two for the same reason.
EXPECTED_FAILURES = {
    "SparseAttnClassifier": {
        f"check_sample_weight_equivalence_on_{kind}_data": "rows are visited in minibatches"
        for kind in ("dense", "sparse")
    },
    "PixelSetTransformer": {},
}


def expected_failures(estimator):
    return EXPECTED_FAILURES[type(estimator).__name__]


@parametrize_with_checks(
    [SparseAttnClassifier(), PixelSetTransformer()], expected_failed_checks=expected_failures
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", [SparseAttnClassifier(), PixelSetTransformer()], ids=str)
def test_no_check_is_switched_off_by_a_tag(estimator):
    tags = estimator.__sklearn_tags__()
    assert not tags.non_deterministic
    assert not tags.no_validation
    assert not tags._skip_test
    if tags.classifier_tags is not None:
        assert not tags.classifier_tags.poor_score
