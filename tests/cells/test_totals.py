"""Totals that are kept beside counts: they hold as long as the counts do, whatever else is done to the AnnData, and are
seen through where the counts are others."""
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from conftest import refused, toy

from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.medians import gene_medians
from mix_geneformer.cells.reports import read_column
from mix_geneformer.cells.totals import KEPT

def source(seed=0, n=60, unmapped=500):
    "Cells with 40 known genes, and with one that has no Ensembl ID and holds much"
    a, rng = toy(n=n), np.random.default_rng(seed)
    known = rng.poisson(8, a.shape)*rng.integers(1, 4, (n, 1))
    x = np.hstack([known, rng.poisson(unmapped, (n, 1))]).astype(np.float32)
    names = [*a.var_names, "gene_of_no_name"]
    obs = pd.DataFrame(index=[f"s{seed}c{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(x), obs, pd.DataFrame(index=names))


def read(seed=0, **how): return read_counts(source(seed, **how), verbose=False)


def medians(x, totals):
    "What the medians are, by numpy alone"
    v = x.astype(np.float64)/np.asarray(totals, dtype=np.float64)[:, None]*1e4
    return np.array([np.median(c[c > 0]) if (c > 0).any() else np.nan for c in v.T])


def have(a, totals, n_changed=0):
    "The medians of `a` are those of its counts over these totals, and as many changed cells are told of"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = gene_medians(a).reindex(a.var_names).to_numpy()
    np.testing.assert_allclose(found, medians(a.X.toarray(), totals), rtol=1e-12)
    lines = [str(w.message) for w in told if "other counts" in str(w.message)]
    assert len(lines) == bool(n_changed) and (not lines or f"{n_changed} of {a.n_obs} cells" in lines[0]), lines
    again = read_counts(a, verbose=False)
    assert (read_column(again.obs, "n_counts").to_numpy() == np.asarray(totals)).all()
    assert read_column(read_counts(again, verbose=False).obs, "n_counts").tolist() == list(totals) # kept anew


WHOLE = source().X.toarray().sum(1)


@pytest.mark.parametrize("do", [lambda a: a, lambda a: a.copy(), lambda a: a[:, ::-1].copy(), lambda a: a[:, ::-1]])
def test_they_hold(do): have(do(read()), WHOLE)


@pytest.mark.parametrize("rows", [slice(10, 31), [40, 3, 5], np.arange(60) % 2 == 0], ids=["slice", "list", "mask"])
def test_of_some_cells(rows): have(read()[rows].copy(), WHOLE[rows])


@pytest.mark.parametrize("n", [5, 20, 39])
@pytest.mark.parametrize("rows", [slice(None), slice(5, 50)], ids=["all", "some"])
def test_of_some_genes(n, rows):
    "Genes are taken away, the counts of the others are what they were: a cell's total stays what it was"
    a = read()[rows]
    most = np.sort(np.argsort(-np.asarray(a.X.sum(0)).ravel(), kind="stable")[:n])
    have(a[:, most].copy(), WHOLE[rows])


def test_of_highly_variable_genes():
    a = read()
    logs = a.copy()
    sc.pp.normalize_total(logs), sc.pp.log1p(logs), sc.pp.highly_variable_genes(logs, n_top_genes=15)
    have(a[:, logs.var.highly_variable].copy(), WHOLE)


def test_after_filters_that_write_into_obs():
    "scanpy calls its own sums n_counts"
    a = read()
    sc.pp.filter_cells(a, min_counts=1), sc.pp.filter_genes(a, min_cells=1)
    assert a.obs.n_counts.tolist() == a.X.sum(1).A1.tolist() != WHOLE.tolist()
    have(a, WHOLE)


@pytest.mark.parametrize("join", ["inner", "outer"])
def test_after_concat(join):
    a, b = read(0)[:, :30].copy(), read(1)[:, 10:].copy()
    both = ad.concat([a, b], join=join)
    both.X = sp.csr_matrix(both.X)
    assert not both.uns and both.n_vars == dict(inner=20, outer=40)[join]
    have(both, [*WHOLE, *source(1).X.toarray().sum(1)])


def test_after_concat_with_cells_that_were_never_read():
    a, b = read(0), source(1)[:, :40].copy()
    both = ad.concat([a, b], join="outer")
    both.X = sp.csr_matrix(both.X)
    have(both, [*WHOLE, *b.X.toarray().sum(1)])
    both = ad.concat([a, b])
    have(both, both.X.toarray().sum(1)) # the columns are gone: what is there is the total


@pytest.mark.parametrize("genes", [slice(None), slice(0, 35)], ids=["all genes", "some genes"])
@pytest.mark.parametrize("before", [True, False], ids=["genes first", "counts first"])
def test_after_downsampling(genes, before):
    a = read()
    if before: a = a[:, genes].copy()
    sc.pp.downsample_counts(a, counts_per_cell=100, random_state=0)
    if not before: a = a[:, genes].copy()
    have(a, a.X.toarray().sum(1), 60)


def test_after_downsampling_of_some():
    "Cells below the mark keep their counts and their totals"
    a = read()
    own = a.X.toarray().sum(1)
    mark = int(np.median(own))
    sc.pp.downsample_counts(a, counts_per_cell=mark, random_state=0)
    changed = own > mark
    have(a, np.where(changed, mark, WHOLE), int(changed.sum()))


def test_after_counts_have_joined():
    a = read()
    a.X[3, 0] += 50
    have(a, [t if i != 3 else a.X[3].sum() for i, t in enumerate(WHOLE)], 1)


def test_in_a_file(tmp_path):
    read().write_h5ad(tmp_path/"a.h5ad")
    a = ad.read_h5ad(tmp_path/"a.h5ad")
    have(a, WHOLE)
    pd.testing.assert_series_equal(gene_medians(tmp_path/"a.h5ad"), gene_medians(a))
    pd.testing.assert_series_equal(gene_medians(ad.read_h5ad(tmp_path/"a.h5ad", backed="r")), gene_medians(a))


def test_in_a_layer():
    a = read()
    whole = gene_medians(a)
    a.layers["counts"], a.raw = a.X.copy(), a.copy()
    sc.pp.normalize_total(a), sc.pp.log1p(a)
    refused(lambda: gene_medians(a), "not whole numbers")
    for layer in ("counts", "raw"): pd.testing.assert_series_equal(gene_medians(a, layer=layer), whole)
    a.layers["fewer"] = sp.csr_matrix(np.minimum(a.layers["counts"].toarray(), 3))
    with pytest.warns(UserWarning, match="60 of 60 cells hold other counts"): found = gene_medians(a, layer="fewer")
    x = a.layers["fewer"].toarray()
    np.testing.assert_allclose(found.reindex(a.var_names), medians(x, x.sum(1)), rtol=1e-12)


def test_of_another_hand():
    "Columns of the same names that are none of ours are left alone"
    a = source()[:, :40].copy()
    for name in KEPT: a.obs[name] = "x"
    x = a.X.toarray()
    np.testing.assert_allclose(gene_medians(a).reindex(a.var_names), medians(x, x.sum(1)), rtol=1e-12)
