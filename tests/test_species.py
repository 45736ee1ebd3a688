"A third species is one more table: what it brings."
import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from conftest import FISHES as N
from conftest import fish, fish_cells, fish_ids, genes_of, toy

from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.vocabulary import Vocabulary, vocabulary_from_medians
from mix_geneformer.cells.encoding import encode_cells


def test_three_species_share_tokens_where_the_table_says_so(fish_table):
    fish(fish_table)
    human, mouse, zebrafish = toy("human", genes=N), toy("mouse", genes=N, seed=1), fish_cells()
    vocab = Vocabulary.build([human, mouse, zebrafish], orthologs="shared")
    assert vocab.species == ("human", "mouse", "zebrafish")
    token = lambda s, ids: vocab.columns(ids, s)[0]
    shared = token("human", genes_of("human", N - 3))
    assert (shared >= 2).all() and np.array_equal(shared, token("zebrafish", fish_ids(N - 3)))
    assert np.array_equal(shared, token("mouse", gene_table("human").loc[genes_of("human", N - 3)].ortholog))
    alone = token("zebrafish", fish_ids()[-3:])
    assert (alone >= 2).all() and not set(alone) & set(vocab.frame.token[~vocab.frame.species.eq("zebrafish")])
    apart = Vocabulary.build([human, mouse, zebrafish])
    assert len(apart) == 2 + len(apart.frame) == apart.frame.token.nunique() + 2


def test_a_renamed_cell_is_the_same_sentence(fish_table):
    fish(fish_table)
    n = N - 3
    ids = {"human": genes_of("human", n), "zebrafish": fish_ids(n)}
    vocab = vocabulary_from_medians({s: pd.Series(np.arange(1., n + 1), g) for s, g in ids.items()}, "shared")
    x = toy("human", genes=N).X[:, :n]
    a, b = (encode_cells(ad.AnnData(sp.csr_matrix(x), var=pd.DataFrame(index=g)), vocab, 24) for g in ids.values())
    assert np.array_equal(a.values, b.values) and np.array_equal(a.offsets, b.offsets)
