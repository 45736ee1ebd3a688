"Medians, exact and sketched."

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from conftest import toy
from hypothesis import given
from hypothesis import strategies as st
from ranked import cells

from mix_geneformer.cells import medians
from mix_geneformer.cells.counts import as_counts
from mix_geneformer.cells.medians import MedianSketch, gene_medians
from mix_geneformer.cells.names import map_genes

def test_hand_computed_medians():
    # totals 4, 3, 4: GCG 2/4, 3/3; PDX1 2/4, 1/4; ARX 3/4, each times 10,000
    a = cells([[2, 2, 0], [3, 0, 0], [0, 1, 3]], ["GCG", "PDX1", "ARX"])
    m = gene_medians(a)
    assert m[map_genes(["GCG", "PDX1", "ARX"]).ensembl_ids].tolist() == [7500.0, 3750.0, 7500.0]
    assert m.attrs == dict(species="human", cells=3, values=5, exact=True)
    # a gene without an Ensembl ID still counts towards its cell's total
    assert gene_medians(cells([[2, 2, 4]], ["GCG", "PDX1", "gene_1"]))[map_genes(["GCG"]).ensembl_ids].tolist() == [
        2500.0
    ]


VALUES = st.lists(st.tuples(st.integers(0, 3), st.floats(1e-3, 9e3)), min_size=1, max_size=60)


@given(VALUES, st.sampled_from([0.001, 0.01, 0.1]), st.integers(0, 60))
def test_sketch_is_accurate_and_merges(pairs, accuracy, cut):
    genes, values = (np.array(c) for c in zip(*pairs))
    whole, one, two = (MedianSketch(4, accuracy) for _ in range(3))
    whole.update(genes, values), one.update(genes[:cut], values[:cut]), two.update(genes[cut:], values[cut:])
    one.merge(two)
    np.testing.assert_array_equal(one.medians(), whole.medians())
    for g, m in enumerate(whole.medians()):
        mine = np.sort(values[genes == g])
        if not len(mine):
            assert np.isnan(m)
        else:
            assert abs(m / mine[(len(mine) - 1) // 2] - 1) <= accuracy * (1 + 1e-6)


def test_sketched_medians_are_near_the_exact_ones():
    a = toy(n=201)
    exact, sketched = gene_medians(a), gene_medians(a, exact_below=0)
    parts = gene_medians([a[:50].copy(), a[50:].copy()], exact_below=500)  # turns into a sketch on the way
    assert (
        exact.attrs["exact"]
        and not sketched.attrs["exact"]
        and not parts.attrs["exact"]
        and sketched.attrs["values"] == a.X.nnz
    )
    pd.testing.assert_series_equal(sketched, parts)
    c = as_counts(a)
    ((_, x, total),) = c.blocks(10_000)
    for j, g in enumerate(c.ensembl_ids):
        v = np.sort((x[:, j].toarray().ravel() / total * 10_000)[x[:, j].toarray().ravel() > 0])
        assert exact[g] == np.median(v) and abs(sketched[g] / v[(len(v) - 1) // 2] - 1) < 0.0101


def test_medians_of_sources_that_share_some_genes():
    "Exactly the median of all their values, block by block, whatever the blocks"
    a, b = toy(n=30, seed=3)[:, :25].copy(), toy(n=17, seed=4)[:, 10:].copy()
    both, got = ad.concat([a, b], join="outer", fill_value=0, index_unique="-"), gene_medians([a, b])
    x = both.X.toarray().astype(np.float64)
    x = x / x.sum(1, keepdims=True) * 10_000
    assert got.attrs["cells"] == 47 and all(
        got[g] == np.median(x[:, j][x[:, j] > 0]) for j, g in enumerate(both.var_names)
    )
    big = sp.vstack([toy(n=24).X] * 90, format="csr")  # more than one block
    pd.testing.assert_series_equal(
        gene_medians(ad.AnnData(big, var=toy().var)), gene_medians(toy(n=24)), check_exact=True
    )


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1e-6, 0.5, 1.0, 1.0, 2.5, 7.0, 1e5]) | st.floats(1e-3, 9e3)),
             min_size=1, max_size=60),
    st.integers(1, 60), st.sampled_from([0.01, 0.3]), st.integers(1, 50))
def test_a_second_look_is_exact(pairs, cut, accuracy, at_most):
    genes, values = np.array([g for g, _ in pairs]), np.array([v for _, v in pairs])
    sketch = MedianSketch(4, accuracy)
    sketch.update(genes, values)
    near = medians._Between(sketch, at_most)
    for part in (slice(None, cut), slice(cut, None)):
        rows = np.arange(len(genes[part]))
        near.look(sp.csr_matrix((values[part], (rows, genes[part])), shape=(len(rows), 4)))
    want = [np.median(values[genes == g]) if (genes == g).any() else np.nan for g in range(4)]
    np.testing.assert_array_equal(near.found(), want)


def test_medians_are_the_same_whether_values_are_held_or_looked_at_twice(monkeypatch):
    sources = [toy(n=60), toy(n=40, seed=3)]
    held = gene_medians(sources)
    monkeypatch.setattr(medians, "HELD", 50)
    twice = gene_medians(sources)
    pd.testing.assert_series_equal(held, twice, check_exact=True)
    assert twice.attrs == held.attrs and twice.attrs["exact"]
    assert not gene_medians(sources, exact_below=100).attrs["exact"]
