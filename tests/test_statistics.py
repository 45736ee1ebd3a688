"Statistics agree with closed forms, scipy and scikit-learn."
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import refused
from sklearn.metrics import roc_auc_score

from mix_geneformer.statistics import (
    auroc,
    like_genes,
    matched_p,
    mean_interval,
    paired_test,
    rank_share,
    scores,
    verdict,
)

def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    y, p = rng.choice(["a", "b", "c"], 60), rng.dirichlet(np.ones(3), 60).round(1)
    areas = [roc_auc_score(y == t, p[:, i]) for i, t in enumerate("abc")]
    table = pd.DataFrame(p, columns=list("abc"))
    assert auroc(table, y) == pytest.approx(np.mean(areas))
    assert auroc(table[["a", "b"]], ["z"]*30 + ["y"]*30) == .5 and np.isnan(auroc(table, ["a"]*60))


@pytest.mark.parametrize("share", [None, .1, .2, .5])
@pytest.mark.parametrize("n", [2, 5, 10])
def test_intervals_and_tests_against_their_formulas(n, share):
    rng = np.random.default_rng(n)
    a = rng.uniform(.6, 1, n)
    b = a - rng.normal(.03, .02, n)
    d, factor = a - b, 1/n + (share/(1 - share) if share else 0)
    t = d.mean()/np.sqrt(d.var(ddof=1)*factor)
    found = paired_test(a, b, share)
    assert found["p_value"] == pytest.approx(2*scipy.stats.t.sf(abs(t), n - 1))
    assert found["difference"] == pytest.approx(d.mean())
    half = scipy.stats.t.ppf(.975, n - 1)*np.sqrt(d.var(ddof=1)*factor)
    assert (found["low"], found["high"]) == pytest.approx((d.mean() - half, d.mean() + half))
    assert (found["low"] > 0) == (found["p_value"] < .05 and d.mean() > 0)
    if share is None: assert found["p_value"] == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    mean, low, high = mean_interval(a, share)
    width = 2*scipy.stats.t.ppf(.975, n - 1)*np.sqrt(a.var(ddof=1)*factor)
    assert (mean, high - low) == pytest.approx((a.mean(), width))


def test_what_cannot_be_said_is_not_said():
    assert np.isnan(paired_test([.9], [.8])["p_value"]) and np.isnan(mean_interval([.9])[1])
    # the same difference on every seed has no spread to judge it by
    assert verdict(paired_test([.9, .9], [.8, .8])) == "not tested"
    assert verdict(paired_test([.9, .9], [.9, .9])) == "no difference shown"
    refused(lambda: mean_interval([]), "0 values have no mean")
    refused(lambda: paired_test([1, 2], [1, 2], 1.), "test_share=1")


def test_like_genes_are_the_nearest_others():
    rng = np.random.default_rng(0)
    rank, seen = rng.uniform(1, 99, 40), rng.uniform(.1, 1, 40)
    xy = np.column_stack([rank, np.log(seen)])
    xy = (xy - xy.mean(0)) / xy.std(0)
    far = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    np.fill_diagonal(far, np.inf)
    np.testing.assert_array_equal(like_genes(rank, seen, 5), np.argsort(far, 1)[:, :5])
    same = like_genes(np.ones(9), np.ones(9), 4)   # all alike: any others will do
    assert same.shape == (9, 4) and not (same == np.arange(9)[:, None]).any()


def test_matched_p_is_uniform_without_effect():
    rng = np.random.default_rng(0)
    rank = rng.uniform(1, 100, 2000)
    effect = rng.normal(size=2000) * rank + rank   # rank decides mean and spread
    p = matched_p(effect, rank, rng.uniform(.1, 1, 2000))
    assert abs((p < .05).mean() - .05) < .02 and .4 < p.mean() < .6


def test_share_of_a_ranking_that_is_rank():
    rng, rank = np.random.default_rng(0), np.random.default_rng(1).uniform(1, 99, 500)
    assert rank_share(-rank ** 2, rank) == pytest.approx(1)
    as_much_noise = rank + rng.normal(size=500) * 28
    assert rank_share(as_much_noise, rank) == pytest.approx(.5, abs=.1)
    by_chance = [rank_share(rng.normal(size=60), rank[:60]) for _ in range(200)]
    assert abs(np.mean(by_chance)) < .02   # adjusted: nothing
    assert np.isnan(rank_share(np.ones(9), rank[:9])) and np.isnan(rank_share(rank[:5], rank[:5]))


def test_scores_by_hand():
    s = scores(["a", "a", "a", "b", "c"], ["a", "a", "b", "b", "x"])
    # x is in nobody's truth: no type of its own
    f1 = [2 * 1 * (2/3) / (1 + 2/3), 2 * .5 * 1 / 1.5, 0.]
    assert s == dict(accuracy=.6, macro_f1=pytest.approx(sum(f1) / 3), n_cells=5, n_types=3)
