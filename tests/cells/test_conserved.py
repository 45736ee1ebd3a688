"Genes that two data sets share, and how alike they are in both."

import numpy as np
import scipy.sparse as sp
from bothsides import sides
from conftest import partners

from mix_geneformer.cells.conserved import conserved, shared_counts
from mix_geneformer.cells.normalising import log_normalised

def correlation(a, b): return np.corrcoef(a, b)[0, 1]


def test_conserved_is_the_correlation_of_correlations():
    a, b = (log_normalised(x) for x in shared_counts(*sides())[:2])
    A, B = a.toarray(), b.toarray()
    anchors = np.argsort(-(A.var(0)*B.var(0)), kind="stable")[:12]
    plain = []
    for g in range(A.shape[1]):
        among = [[correlation(X[:, g], X[:, k]) for k in anchors] for X in (A, B)]
        plain.append(correlation(*among))
    np.testing.assert_allclose(conserved(a, b, 12), plain, atol=1e-8)
    silent = sp.csr_matrix(A * (np.arange(A.shape[1]) != 3))
    assert conserved(silent, b, 12)[3] == 0 and np.isfinite(conserved(silent, b, 12)).all()


def test_columns_are_orthologs_whatever_their_order():
    human, mouse = sides()
    a, b, genes = shared_counts(human, mouse[:, ::-1].copy())
    to = dict(zip(*partners(40)))
    assert [to[g] for g in genes.a] == genes.b.tolist()
    assert (a != human[:, genes.a].X).nnz == 0 and (b != mouse[:, genes.b].X).nnz == 0
