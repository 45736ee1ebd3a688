"Counts on a log scale are scanpy's; genes that vary are those of largest variance."

import numpy as np
import scanpy as sc
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from mix_geneformer.cells.normalising import log_normalised, variable_genes

COUNTS = arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.integers(0, 1000))


@settings(max_examples=50)
@given(COUNTS)
def test_logs_are_scanpys(x):
    a = AnnData(x.astype(np.float64))
    sc.pp.normalize_total(a, target_sum=1e4)
    sc.pp.log1p(a)
    for kind in np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array:
        np.testing.assert_allclose(log_normalised(kind(x)).toarray(), a.X, rtol=1e-12)


@settings(max_examples=50)
@given(COUNTS, st.integers(1, 8))
def test_no_gene_left_out_varies_more(x, n):
    logs = log_normalised(x)
    kept, variance = variable_genes(logs, n), logs.toarray().var(0)
    assert len(kept) == min(n, x.shape[1]) and (np.diff(kept) > 0).all()
    left = np.delete(variance, kept)
    assert not len(left) or left.max() <= variance[kept].min() + 1e-9
