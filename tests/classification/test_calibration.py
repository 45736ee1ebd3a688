"The temperature is scikit-learn's where that one is defined, changes no label, and never grows certain of little"
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from mix_geneformer.classification.calibration import calibrated, calibration_error, folds_of, temperature_of

class Said(ClassifierMixin, BaseEstimator):
    "A classifier whose scores are its input"
    def __init__(self, n=3): self.n, self.classes_ = n, np.arange(n)
    def fit(self, x, y): return self
    def decision_function(self, x): return x
    def predict(self, x): return x.argmax(1)


def boasting(seed, n=400, types=4, times=3.):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, types, n)
    return softmax(times*(2*np.eye(types)[y]+draw.normal(size=(n, types))), 1), y


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_is_scikit_learns(seed):
    p, y = boasting(seed)
    theirs = CalibratedClassifierCV(FrozenEstimator(Said(4)), method="temperature").fit(np.log(p), y)
    np.testing.assert_allclose(calibrated(p, temperature_of(p, y, own=0)), theirs.predict_proba(np.log(p)), atol=2e-3)
    np.testing.assert_allclose(temperature_of(p, y), temperature_of(p, y, own=0), rtol=.05)  # one cell more or less


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.floats(.1, 20))
def test_no_label_changes_and_scores_stay_probabilities(seed, n, times):
    p, y = boasting(seed, n, 3, times)
    found = calibrated(p, temperature_of(p, y))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert (np.take_along_axis(found, p.argmax(1)[:, None], 1)[:, 0] >= found.max(1)-1e-9).all()


@pytest.mark.parametrize("n", [1, 5, 50, 500])
def test_a_few_right_cells_make_no_certainty(n):
    p = softmax(20*np.eye(3)[np.arange(n) % 3], 1)
    found = calibrated(p, temperature_of(p, np.arange(n) % 3)).max()
    assert found < 1-.2/(n+1)


def test_held_out_donors_are_whole():
    labels, donors = np.repeat(["a", "b", "c"], 20), np.tile(["d1", "d2", "d3", "d4", "d5"], 12)
    turn = folds_of(labels, donors)
    assert len(set(turn)) == 3 and all(len(set(turn[donors == d])) == 1 for d in set(donors))
    assert set(folds_of(np.array(["a"]))) == {0} and len(set(folds_of(np.array(["a", "b"])))) == 2
    assert len(set(folds_of(labels, np.array(["only"]*60)))) == 3                     # one donor: by cells


def test_the_error_is_that_of_the_bins():
    assert calibration_error([1., 1., 1., 1.], [True, True, True, False]) == pytest.approx(.25)
    assert np.isnan(calibration_error([], []))
