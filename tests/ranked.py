"Counts, medians and the plain definition of a sentence: what the tests of ranking and encoding share."

import errno
import os
from fractions import Fraction

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from conftest import files_under, genes_of
from hypothesis import strategies as st

from mix_geneformer.cells.vocabulary import vocabulary_from_medians

GENES = genes_of("human", 12)
MEDIANS = st.lists(st.integers(1, 40).map(lambda i: i / 8), min_size=len(GENES), max_size=len(GENES))
COUNT = st.one_of(st.just(0), st.integers(1, 5), st.integers(1, 3000))
COUNTS = st.lists(st.lists(COUNT, min_size=len(GENES), max_size=len(GENES)).filter(any), min_size=1, max_size=6).map(
    lambda r: np.array(r, dtype=np.int64)
)


def by_definition(row, tokens, medians, context):
    "One sentence, in exact arithmetic: normalise, divide by the median, sort, cut"
    total = sum(int(c) for c in row)
    value = [
        (-Fraction(int(c), total) * 10_000 / Fraction(float(m)), int(t))
        for c, t, m in zip(row, tokens, medians)
        if c > 0 and t >= 0
    ]
    return [t for _, t in sorted(value)][:context]


def cells(x, genes=GENES):
    return ad.AnnData(sp.csr_matrix(np.asarray(x, dtype=np.float32)), var=pd.DataFrame(index=list(genes)))


def vocabulary(medians):
    return vocabulary_from_medians({"human": pd.Series(medians, GENES)})


def rows(sentences):
    return [sentences[i].tolist() for i in range(len(sentences))]


def content(folder):
    return {n: (folder / n).read_bytes() for n in files_under(folder) if n.endswith(".arrow")}


def full_replace(*a, **k):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
