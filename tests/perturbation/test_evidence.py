"What a perturbation ranking is worth: statistics against scipy and scanpy, controls, the rank artefact"
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import toy
from scipy.stats import mannwhitneyu, spearmanr, ttest_rel
from transformers import BertConfig, BertForMaskedLM

from mix_geneformer.cells.corpora import fetch, part_of_corpus
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.perturbation.evidence import (
    HOUSEKEEPING,
    INTERFERON,
    compare_positions,
    controls,
    de_agreement,
    differential,
    rank_report,
    untrained,
)
from mix_geneformer.perturbation.verb import perturb

AB = dict(state="cell_type", start="a", goal="b")
SMALL = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)


def perturbed(*args, **how):
    "`perturb`, without its warning of a ranking that is the genes' rank: these models have learnt nothing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return perturb(*args, progress=False, device="cpu", **how)


@pytest.fixture(scope="module")
def cells(): return toy(n=60)


@pytest.fixture(scope="module")
def small(cells):
    vocab = vocabulary_from_medians({"human": pd.Series(1., index=cells.var_names)})
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=len(vocab), num_hidden_layers=2, initializer_range=.3, **SMALL)
    return SimpleNamespace(model=BertForMaskedLM(shape).eval(), vocab=vocab, context=64)


@pytest.fixture(scope="module")
def table(cells, small): return perturbed(cells, small, **AB)


# differential expression

def test_cells_are_compared_by_the_rank_sum(cells):
    de, x = differential(cells, **AB).set_index("ensembl_id"), cells.X.toarray()
    logs, start = np.log1p(1e4 * x / x.sum(1, keepdims=True)), cells.obs.cell_type.eq("a").to_numpy()
    for i in (0, 1, 7):
        plain = mannwhitneyu(logs[~start, i], logs[start, i], use_continuity=False, method="asymptotic")
        np.testing.assert_allclose(de.p_value[cells.var_names[i]], plain.pvalue, rtol=1e-3)
    higher = logs[~start].mean(0) > logs[start].mean(0)
    assert (np.sign(de.score[cells.var_names]) == np.where(higher, 1, -1)).all() and de.score.is_monotonic_decreasing


@pytest.mark.parametrize("donor", [None, "donor"])
def test_cells_without_state_or_donor_are_as_if_they_were_not_there(cells, donor):
    some = cells.copy()
    state, whose = some.obs.cell_type.astype(object), some.obs.donor.astype(object)
    state.iloc[[3, 4]], whose.iloc[[7, 10, 11]] = [None, "nan"], [np.nan, "", "NA"]
    some.obs["cell_type"], some.obs["donor"] = state, whose
    out = [3, 4, 7, 10, 11] if donor else [3, 4]
    how = dict(AB, donor=donor, max_cells=20)
    with pytest.warns(UserWarning, match="2 of 60 cells have no 'cell_type'"): found = differential(some, **how)
    few = cells[[i for i in range(60) if i not in out]].copy()
    pd.testing.assert_frame_equal(found, differential(few, **how))


def test_donors_are_compared_by_paired_pseudobulks(cells):
    de = differential(cells, donor="donor", **AB).set_index("ensembl_id")
    x, donor = cells.X.toarray().astype(float), cells.obs.donor.to_numpy()
    start = cells.obs.cell_type.eq("a").to_numpy()

    def bulk(state):
        sums = [x[state & (donor == d)].sum(0) for d in ("d0", "d1", "d2")]
        return np.array([np.log1p(1e6 * s / s.sum()) for s in sums])
    found = ttest_rel(bulk(~start), bulk(start))
    np.testing.assert_allclose(de.score[cells.var_names], found.statistic, rtol=1e-6)
    np.testing.assert_allclose(de.p_value[cells.var_names], found.pvalue, rtol=1e-6)


def test_copies_of_cells_sharpen_cells_and_not_donors(cells):
    many = ad.concat([cells] * 4, index_unique="-")
    p = lambda a, **kw: np.log(differential(a, **kw, **AB)["p_value"]).mean()
    assert p(many) < 2 * p(cells) and p(many, donor="donor") == pytest.approx(p(cells, donor="donor"), rel=1e-6)


def test_the_cells_are_those_that_are_perturbed(cells, small):
    few = dict(max_cells=8, max_goal_cells=9, seed=3)
    t = perturbed(cells, small, **few, **AB)
    held = differential(cells, **few, **AB)
    assert t.attrs["n_start"] == 8 and t.attrs["n_goal"] == 9 and set(t.ensembl_id) <= set(held.ensembl_id)


@pytest.mark.parametrize("mode,sign", [("delete", -1), ("inhibit", -1), ("overexpress", 1), ("activate", 1)])
def test_agreement_has_the_sign_of_the_mode(table, cells, mode, sign):
    de = differential(cells, **AB)
    both = table.merge(de, on="ensembl_id")
    found = de_agreement(table, de, mode, top=10)
    assert found["spearman"] == pytest.approx(spearmanr(both.cosine_shift, sign * both.score).statistic)
    head = lambda v: set(both.ensembl_id[np.argsort(-v.to_numpy(), kind="stable")[:10]])
    assert found["overlap"] == len(head(both.cosine_shift) & head(sign * both.score)) / 10
    assert found["chance"] == 10 / len(both)


# controls

def ranked(n=300, seed=0):
    rng = np.random.default_rng(seed)
    named = dict(symbol=[f"G{i}" for i in range(n)], ensembl_id=[f"E{i}" for i in range(n)])
    return pd.DataFrame(dict(named, cosine_shift=rng.normal(size=n), mean_rank=rng.uniform(1, 99, n),
                             detection=rng.uniform(.05, 1, n)))


def test_auroc_is_the_share_of_pairs_in_order():
    t = ranked()
    a, b = t.cosine_shift[:9].to_numpy(), t.cosine_shift[9:].to_numpy()
    assert controls(t, dict(nine=t.symbol[:9])).auroc[0] == pytest.approx((a[:, None] > b).mean())


def test_set_p_is_uniform_without_effect_even_where_no_cell_holds_most_genes():
    p, rng = [], np.random.default_rng(1)
    for i in range(80):
        t = ranked(seed=i).sort_values("cosine_shift", ascending=False, ignore_index=True)   # as `perturb` returns it
        unseen = rng.random(300) < .7   # overexpression asks of genes that no start cell holds
        t.loc[unseen, ["mean_rank", "detection"]] = np.nan, 0.
        p.append(controls(t, dict(some=rng.choice(t.symbol, 6, replace=False)), draws=400).p_matched[0])
    assert .38 < np.mean(p) < .62 and np.mean(np.array(p) < .05) < .15


def test_controls_of_ids_and_of_absent_genes():
    t = ranked()
    found = controls(t, dict(ids=t.ensembl_id[:4], none=["NOGENE"], all=t.symbol))
    assert found.ranked.tolist() == [4, 0, 300]
    assert found.auroc.isna().tolist() == found.p_matched.isna().tolist() == [False, True, True]
    assert len(set(HOUSEKEEPING)) == 11 and len(set(INTERFERON)) == 7


# the rank artefact

def test_report_is_of_the_same_cells_and_genes(cells, small, table):
    keep = perturbed(cells, small, positions="keep", **AB)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rank_report(cells, small, progress=False, device="cpu", **AB)
    assert found == compare_positions(table, keep)
    both = table.merge(keep, on="ensembl_id")
    rho = lambda a, b: pytest.approx(spearmanr(both[a], both[b]).statistic)
    assert found["rank_shift"] == rho("cosine_shift_x", "mean_rank_x")
    assert found["shift_keep"] == rho("cosine_shift_x", "cosine_shift_y")


def test_random_weights_are_seeded_and_of_the_same_shape(small):
    def weights(model): return model.bert.embeddings.word_embeddings.weight
    a, b, c = (weights(untrained(small, seed).model) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == weights(small.model).shape


# real cells

def test_the_condition_corpus_is_cut_once(tmp_path):
    try: blood = fetch("pbmc_ifnb")
    except Exception as e: pytest.skip(f"the pbmc_ifnb corpus is neither cached nor to be had: {e}")
    few = dict(n=50, only=dict(cell_type=["CD14+ Monocytes"]))
    part = part_of_corpus(blood, tmp_path, **few)
    a = read_counts(fetch(part).files["human"], verbose=False)
    assert a.n_obs == 50 and set(a.obs.cell_type) == {"CD14+ Monocytes"}
    assert fetch(part).condition == "condition" and set(INTERFERON) <= set(a.var.symbol)
    stamp = next(part.iterdir()).stat().st_mtime_ns
    assert part_of_corpus(blood, tmp_path, **few) == part and next(part.iterdir()).stat().st_mtime_ns == stamp


KANG = Path(__file__).resolve().parents[3] / "shared" / "data" / "human_pbmc_kang_ifnb.h5ad"


@pytest.mark.skipif(not KANG.is_file(), reason="the cells with their donors are not on this machine")
def test_donors_of_the_condition():
    "Every donor gets a column, and the donor is the unit of p_donor and of the pseudobulks"
    a = ad.read_h5ad(KANG)
    a = a[a.obs.cell_type.eq("CD14 Mono") & a.obs.donor.ne("ambiguous")]
    groups = [a.obs.donor.astype(str).to_numpy(), a.obs.condition.astype(str).to_numpy()]
    use = pd.Series(range(a.n_obs)).groupby(groups).head(6)
    a = read_counts(a[use.to_numpy()].copy(), verbose=False)
    vocab = vocabulary_from_medians({"human": pd.Series(1., index=a.var_names)})
    torch.manual_seed(0)
    net = BertForMaskedLM(BertConfig(vocab_size=len(vocab), num_hidden_layers=1, **SMALL)).eval()
    where = dict(state="condition", start="IFN-beta", goal="control", donor="donor")
    t = perturbed(a, SimpleNamespace(model=net, vocab=vocab, context=64), **where)
    donors = [c for c in t if c.startswith("shift_")]
    assert len(donors) == 8 and t.p_donor.notna().sum() == (t[donors].notna().sum(1) > 2).sum() > 10
    de = differential(a, **where).set_index("symbol")
    assert (de.score[["ISG15", "IFI6", "IFIT3"]] < -3).all()   # interferon's own are higher in stimulated cells
