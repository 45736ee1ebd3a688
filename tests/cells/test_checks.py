"What are counts, and what a refusal of others advises: what works, after looking."
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import refused, toy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mix_geneformer.cells.checks import are_counts
from mix_geneformer.cells.counts import _holds_counts, read_counts

@given(arrays(np.float64, st.integers(0, 9), elements=st.one_of(
    st.floats(), st.integers(0, 2**54).map(float), st.sampled_from([-0., 2.**53, 2.**53-1, -1., .5]))))
def test_counts_are_whole_finite_and_exact(d):
    assert are_counts(d) == all(np.isfinite(v) and v >= 0 and v == int(v) and v < 2**53 for v in d)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 700])
def test_a_matrix_is_looked_at_all_over(n):
    x = np.ones((n, 3))
    assert _holds_counts(x) and _holds_counts(sp.csr_matrix(x))
    for row in {0, n//2, n-1}:
        x[row, 1] = .5
        assert not _holds_counts(x)
        x[row, 1] = 1


def logged(**layers):
    a = toy()
    counts, a.X = a.copy(), a.X.log1p()
    for name, matrix in layers.items(): a.layers[name] = matrix(counts.X)
    return a, counts


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("layers, raw, advice", [
    ({}, False, "pass raw counts."),
    (dict(counts=lambda x: x), False, "pass layer='counts' (--layer counts), which holds whole numbers."),
    (dict(counts=lambda x: x/3), False, "pass raw counts, which none of its 1 other matrices holds either (counts)."),
    (dict(counts=lambda x: x/3, umi=lambda x: x), False, "pass layer='umi' (--layer umi)"),
    (dict(empty=lambda x: x*0), True, "pass layer='raw' (--layer raw)"),
    (dict(spliced=lambda x: x, counts=lambda x: x), True, "pass layer='counts'"),
    ({"my counts": lambda x: x}, False, "pass layer='my counts' (--layer 'my counts')")])
def test_advice(layers, raw, advice, where, tmp_path):
    a, counts = logged(**layers)
    if raw: a.raw = counts
    if where == "file":
        a.write_h5ad(tmp_path/"a.h5ad")
        a = tmp_path/"a.h5ad"
    refused(lambda: read_counts(a, verbose=False), "not whole numbers", advice)


def test_advice_of_x_where_the_layer_is_none():
    a, counts = logged()
    counts.layers["logs"] = a.X
    refused(lambda: read_counts(counts, layer="logs"), "pass layer='X'")
    assert (read_counts(counts, layer="X", verbose=False).X != read_counts(counts, verbose=False).X).nnz == 0
