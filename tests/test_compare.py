"Statistics agree with closed forms, scipy and scikit-learn"
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from conftest import refused
from mix_geneformer.statistics import auroc, mean_interval, paired_test, verdict


def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    y, p = rng.choice(["a", "b", "c"], 60), rng.dirichlet(np.ones(3), 60).round(1)
    assert auroc(pd.DataFrame(p, columns=list("abc")), y) == pytest.approx(np.mean([roc_auc_score(y == t, p[:, i]) for i, t in enumerate("abc")]))
    assert auroc(pd.DataFrame(p[:, :2], columns=list("ab")), ["z"]*30 + ["y"]*30) == .5 and np.isnan(auroc(pd.DataFrame(p, columns=list("abc")), ["a"]*60))


@pytest.mark.parametrize("share", [None, .1, .2, .5])
@pytest.mark.parametrize("n", [2, 5, 10])
def test_intervals_and_tests_against_their_formulas(n, share):
    rng = np.random.default_rng(n)
    a = rng.uniform(.6, 1, n)
    b = a - rng.normal(.03, .02, n)
    d, factor = a - b, 1/n + (share/(1 - share) if share else 0)
    t = d.mean()/np.sqrt(d.var(ddof=1)*factor)
    found = paired_test(a, b, share)
    assert found["p_value"] == pytest.approx(2*scipy.stats.t.sf(abs(t), n - 1)) and found["difference"] == pytest.approx(d.mean())
    half = scipy.stats.t.ppf(.975, n - 1)*np.sqrt(d.var(ddof=1)*factor)
    assert (found["low"], found["high"]) == pytest.approx((d.mean() - half, d.mean() + half)) and (found["low"] > 0) == (found["p_value"] < .05 and d.mean() > 0)
    if share is None: assert found["p_value"] == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    mean, low, high = mean_interval(a, share)
    assert (mean, high - low) == pytest.approx((a.mean(), 2*scipy.stats.t.ppf(.975, n - 1)*np.sqrt(a.var(ddof=1)*factor)))


def test_what_cannot_be_said_is_not_said():
    assert np.isnan(paired_test([.9], [.8])["p_value"]) and np.isnan(mean_interval([.9])[1])
    assert verdict(paired_test([.9, .9], [.8, .8])) == "not tested"   # the same difference on every seed has no spread to judge it by
    assert verdict(paired_test([.9, .9], [.9, .9])) == "no difference shown"
    refused(lambda: mean_interval([]), "0 values have no mean")
    refused(lambda: paired_test([1, 2], [1, 2], 1.), "test_share=1")
