"Pairs against single perturbations, one by one; and which genes' vectors move, against plain transformers."
from itertools import combinations
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import refused
from perturbed import N_GENES, tiny
from scipy.stats import spearmanr

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.perturbation.neighbours import moved_genes
from mix_geneformer.perturbation.pairs import perturb_pairs
from mix_geneformer.perturbation.verb import perturb

pytestmark = pytest.mark.filterwarnings("ignore:rank_correlation")
CONTEXT = 24
AB = dict(state="state", start="a", goal="b", device="cpu", progress=False)


@pytest.fixture(scope="module")
def cells():
    ids = gene_table("human").query("symbol != ''").index[:N_GENES]
    X = np.random.default_rng(7).poisson(.5, (24, N_GENES))
    X[:, :5] += 3   # which every cell holds
    X[:6, 5], X[6:, 5] = 2, 0
    obs = pd.DataFrame(dict(state=np.repeat(["a", "b"], 12)), index=[f"cell{i}" for i in range(24)])
    return ad.AnnData(sp.csr_matrix(X.astype(np.float32)), obs, pd.DataFrame(index=ids))


def loaded_with(cells, spread):
    vocab = vocabulary_from_medians({"human": pd.Series(1., index=cells.var_names)})
    return SimpleNamespace(model=tiny(len(vocab), spread=spread), vocab=vocab, context=CONTEXT)


@pytest.fixture(scope="module")
def loaded(cells): return loaded_with(cells, .5)


@pytest.mark.parametrize("mode, positions, goal", [
    ("delete", "keep", "b"), ("delete", "shift", "b"), ("delete", "keep", None), ("overexpress", "shift", "b"),
    ("inhibit", "keep", "b")])
def test_a_pair_is_both_at_once_less_each_alone(cells, loaded, mode, positions, goal):
    genes = loaded.vocab.frame.symbol[:4].tolist()
    how = dict(AB, goal=goal, positions=positions)
    table = perturb_pairs(cells, loaded, genes, mode, **how).set_index(["symbol_a", "symbol_b"])
    assert set(table.index) == set(combinations(genes, 2)) and (table.n_cells == 12).all()
    alone = perturb(cells, loaded, mode, genes=genes, **how).set_index("symbol").cosine_shift
    for a, b in table.index:
        both = perturb(cells, loaded, mode, genes=[a, b], how="together", **how).cosine_shift[0]
        row = table.loc[(a, b)]
        np.testing.assert_allclose([row.cosine_shift, row.shift_a, row.shift_b], [both, alone[a], alone[b]], atol=1e-6)
        assert row.interaction == pytest.approx(both-alone[a]-alone[b], abs=2e-6)
        assert row.ci_low <= row.interaction <= row.ci_high
    assert table.interaction.abs().is_monotonic_decreasing


def test_only_cells_that_hold_both_are_counted(cells, loaded):
    f = loaded.vocab.frame.symbol
    table = perturb_pairs(cells, loaded, f[[0, 5]].tolist(), **AB)
    assert table.n_cells.tolist() == [6]
    some = cells[[*range(6), *range(12, 24)]].copy()
    alone = perturb(some, loaded, genes=f[[0, 5]].tolist(), positions="keep", **AB).set_index("symbol").cosine_shift
    assert table.shift_a[0] == pytest.approx(alone[f[0]], abs=1e-6)


def test_gradients_find_the_strongest_pairs(cells):
    calm = loaded_with(cells, .1)
    genes = calm.vocab.frame.symbol[:5].tolist()
    every = perturb_pairs(cells, calm, genes, recheck=10, **AB)
    assert spearmanr(every.screened, every.interaction).statistic > .8
    exact = perturb_pairs(cells, calm, genes, **AB).set_index(["symbol_a", "symbol_b"])
    few = perturb_pairs(cells, calm, genes, recheck=3, **AB).set_index(["symbol_a", "symbol_b"])
    np.testing.assert_allclose(few.interaction, exact.interaction[few.index], atol=1e-7)
    strongest = every.set_index(["symbol_a", "symbol_b"]).screened.abs().nlargest(3).index
    assert set(few.index) == set(strongest)


def test_pairs_are_refused(cells, loaded):
    genes = loaded.vocab.frame.symbol[:3].tolist()
    refused(lambda: perturb_pairs(cells, loaded, genes, recheck=1, **{**AB, "goal": None}), "goal=None names 0")
    refused(lambda: perturb_pairs(cells, loaded, genes, recheck=1, positions="shift", **AB), "positions='keep'")
    two = {**AB, "goal": ["b", "a"], "start": None}
    refused(lambda: perturb_pairs(cells, loaded, genes, **two), "pairs go towards 1")


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_moved_genes_are_those_of_plain_passes(cells, loaded, mode):
    genes = loaded.vocab.frame.symbol[[0, 3]].tolist()
    how = dict(state="state", start="a", top=None, positions="shift", min_cells=1, device="cpu")
    table = moved_genes(cells, loaded, genes, mode, **how)
    assert set(table.symbol) == set(genes) and (table.symbol != table.moved_symbol).all()
    def read(ids):
        with torch.inference_mode(): return loaded.model.bert(torch.tensor([ids])).last_hidden_state[0].double()
    sentences, far = encode_cells(cells[:12], loaded.vocab, CONTEXT), {}
    gene = int(loaded.vocab.lookup(genes[:1], "human")[0])
    for i in range(12):
        before = [int(t) for t in sentences[i]]
        rest = [t for t in before if t != gene]
        after = rest if mode == "delete" else [gene, *rest]
        was, now = dict(zip(before, read(before))), dict(zip(after, read(after)))
        for t in rest:
            if t in now: far.setdefault(t, []).append(1-float(torch.cosine_similarity(was[t], now[t], dim=0)))
    mine = table[table.symbol == genes[0]].set_index("moved_ensembl_id")
    assert len(mine) == len(far)
    names = loaded.vocab.describe(list(far), "human").ensembl_id
    np.testing.assert_allclose(mine.distance[names], [np.mean(v) for v in far.values()], atol=1e-5)
    assert mine.n_cells[names].tolist() == [len(v) for v in far.values()]
    other = table[table.symbol == genes[1]].set_index("moved_ensembl_id").distance
    shared = mine.index.intersection(other.index)
    np.testing.assert_allclose(mine.usual[shared], other[shared])
    assert mine.specific.dropna().is_monotonic_decreasing
