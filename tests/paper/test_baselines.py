"Plain methods see no test label, learn from the training cells alone, and refuse parts that cannot be compared."
import importlib.util

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import refused
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mix_geneformer.cells.normalising import log_normalised, variable_genes
from mix_geneformer.paper.baselines import BASELINES, Split, _labelled_cells, _one_vs_rest, baseline_names, logistic
from mix_geneformer.statistics import scores

NEEDS = dict(celltypist="celltypist", harmony="harmonypy", scanvi="scvi")


def cells(n=150, genes=60, types=3, seed=0):
    rng, kind = np.random.default_rng(seed), np.arange(n) % types
    x = sp.csr_matrix(rng.poisson(.4 + 3*(np.arange(genes) % types == kind[:, None])).astype(np.float32))
    labels = np.array([f"type {k}" for k in range(types)], dtype=object)[kind]
    return Split(x, labels, np.arange(n//3, n), np.arange(n//3), np.array([f"d{i % 4}" for i in range(n)]))


def but(split, **changes): return Split(**{**vars(split), **changes})


@pytest.mark.parametrize("name", BASELINES)
def test_a_method_learns_and_no_test_label_is_used(name):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is of the extra 'baselines', not installed here")
    split = cells()
    y, test = split.labels, split.test
    short = dict(epochs=4, label_epochs=4, device="cpu") if name == "scanvi" else {}
    p = BASELINES[name](split, **short)
    assert list(p.index) == list(test) and list(p.columns) == sorted(set(y))
    assert p.to_numpy().min() >= 0 and p.to_numpy().max() <= 1 + 1e-6
    wrong = y.copy()
    wrong[test] = np.roll(y[test], 1)
    pd.testing.assert_frame_equal(p, BASELINES[name](but(split, labels=wrong), **short))
    wrong[test] = None
    pd.testing.assert_frame_equal(p, BASELINES[name](but(split, labels=wrong), **short))
    if name not in ("majority", "scanvi"): assert scores(y[test], p.idxmax(axis=1))["accuracy"] > .9


@pytest.mark.parametrize("name", ["logistic", "pca_knn"])
def test_genes_and_scaling_come_from_the_training_cells_alone(name):
    "Whatever is in the other test cells, a test cell's probabilities stay"
    split = cells()
    p = BASELINES[name](split)
    other = split.x.toarray()
    other[split.test[1:]] = other[split.test[1:]][:, ::-1]*7
    changed = BASELINES[name](but(split, x=sp.csr_matrix(other)))
    np.testing.assert_allclose(changed.iloc[0], p.iloc[0], rtol=1e-9, atol=1e-12)


def test_logistic_regression_is_the_plain_one():
    split = cells()
    x, train, test = split.x.toarray().astype(float), split.train, split.test
    dense = np.log1p(1e4*x/x.sum(1, keepdims=True))
    genes = np.sort(np.argsort(-dense[train].var(0), kind="stable")[:20])
    scale = StandardScaler().fit(dense[train][:, genes])
    a, b = (np.clip(scale.transform(dense[rows][:, genes]), -10, 10) for rows in (train, test))
    plain = LogisticRegression(C=.1, max_iter=500).fit(a, split.labels[train]).predict_proba(b)
    np.testing.assert_array_equal(variable_genes(log_normalised(split.x[train]), 20), genes)
    np.testing.assert_allclose(logistic(split, n_genes=20), plain, atol=1e-6)


def test_one_against_the_rest_is_a_regression_per_type():
    split = cells()
    x, y = log_normalised(split.x), split.known
    a, b = x[split.train].toarray(), x[split.test].toarray()
    both = _one_vs_rest(C=1., max_iter=500, multi_class="ovr").fit(a, y)
    for i, t in enumerate(both.classes_):
        alone = LogisticRegression(C=1., max_iter=500).fit(a, y == t)
        np.testing.assert_allclose(both.decision_function(b)[:, i], alone.decision_function(b), atol=1e-9)
    two = y != "type 2"
    fitted = _one_vs_rest(C=1.).fit(a[two], y[two])
    np.testing.assert_allclose(fitted.coef_, LogisticRegression(C=1.).fit(a[two], y[two]).coef_)


def test_scanvi_is_given_no_label_of_a_test_cell():
    a = _labelled_cells(cells(), 20)
    assert a.shape == (150, 20) and set(a.obs.label[100:]) == {"not labelled"}
    assert "not labelled" not in set(a.obs.label[:100])
    assert list(a.obs_names[:2]) == ["50", "51"] and set(a.obs.batch) == {"d0", "d1", "d2", "d3"}
    assert set(_labelled_cells(but(cells(), batch=None), 20).obs.batch) == {"all"}


def test_bad_parts_are_refused():
    split = cells()
    refused(lambda: but(split, test=split.train), "100 cells are in the training and in the test part")
    refused(lambda: but(split, train=[]), "0 cells to learn from")
    missing = np.where(np.arange(150) == 60, None, split.labels)
    refused(lambda: but(split, labels=missing), "1 of 100 training cells have no label")
    refused(lambda: baseline_names("svm"), "svm", "scanvi")
    for name, needs in NEEDS.items():
        if importlib.util.find_spec(needs) is None:
            refused(lambda: baseline_names(name), needs, "make reproduce BASELINES=all", "mix-geneformer[baselines]")
