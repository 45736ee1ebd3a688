"What a perturbation ranking is worth: statistics against scipy and scanpy, controls, the rank artefact, and planted programmes."
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata as ad, numpy as np, pandas as pd, pytest, torch
from scipy.stats import mannwhitneyu, spearmanr, ttest_rel
from transformers import BertConfig, BertForMaskedLM

from conftest import refused, toy
from mix_geneformer.cells.corpora import fetch
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.cells.corpora import part_of_corpus
from mix_geneformer.perturbation.evidence import (
    HOUSEKEEPING, INTERFERON, compare_positions, controls, de_agreement, differential, rank_report, untrained)
from mix_geneformer.perturbation.planted import orders, plant, recovery, scaled_counts
from mix_geneformer.statistics import rank_share
from mix_geneformer.perturbation.edits import POSITIONS
from mix_geneformer.perturbation.verb import perturb

AB = dict(state="cell_type", start="a", goal="b")


@pytest.fixture(scope="module")
def cells(): return toy(n=60)


@pytest.fixture(scope="module")
def small(cells):
    vocab = vocabulary_from_medians({"human": pd.Series(1., index=cells.var_names)})
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, initializer_range=.3)
    return SimpleNamespace(model=BertForMaskedLM(shape).eval(), vocab=vocab, context=64)


@pytest.fixture(scope="module")
def table(cells, small):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return perturb(cells, small, progress=False, device="cpu", **AB)


# differential expression

def test_cells_are_compared_by_the_rank_sum(cells):
    de, x = differential(cells, **AB).set_index("ensembl_id"), cells.X.toarray()
    logs, start = np.log1p(1e4 * x / x.sum(1, keepdims=True)), cells.obs.cell_type.eq("a").to_numpy()
    for i in (0, 1, 7): np.testing.assert_allclose(de.p_value[cells.var_names[i]], mannwhitneyu(logs[~start, i], logs[start, i], use_continuity=False, method="asymptotic").pvalue, rtol=1e-3)
    higher = logs[~start].mean(0) > logs[start].mean(0)
    assert (np.sign(de.score[cells.var_names]) == np.where(higher, 1, -1)).all() and de.score.is_monotonic_decreasing


def test_donors_are_compared_by_paired_pseudobulks(cells):
    de, x, start, donor = differential(cells, donor="donor", **AB).set_index("ensembl_id"), cells.X.toarray().astype(float), cells.obs.cell_type.eq("a").to_numpy(), cells.obs.donor.to_numpy()
    bulk = lambda m: np.array([np.log1p(1e6 * s / s.sum()) for s in (x[m & (donor == d)].sum(0) for d in ("d0", "d1", "d2"))])
    found = ttest_rel(bulk(~start), bulk(start))
    np.testing.assert_allclose(de.score[cells.var_names], found.statistic, rtol=1e-6)
    np.testing.assert_allclose(de.p_value[cells.var_names], found.pvalue, rtol=1e-6)


def test_copies_of_cells_sharpen_cells_and_not_donors(cells):
    many = ad.concat([cells] * 4, index_unique="-")
    p = lambda a, **kw: np.log(differential(a, **kw, **AB)["p_value"]).mean()
    assert p(many) < 2 * p(cells) and p(many, donor="donor") == pytest.approx(p(cells, donor="donor"), rel=1e-6)


def test_the_cells_are_those_that_are_perturbed(cells, small):
    few = dict(max_cells=8, max_goal_cells=9, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = perturb(cells, small, progress=False, device="cpu", **few, **AB)
    held = differential(cells, **few, **AB)
    assert t.attrs["n_start"] == 8 and t.attrs["n_goal"] == 9 and set(t.ensembl_id) <= set(held.ensembl_id)


@pytest.mark.parametrize("mode,sign", [("delete", -1), ("inhibit", -1), ("overexpress", 1), ("activate", 1)])
def test_agreement_has_the_sign_of_the_mode(table, cells, mode, sign):
    de = differential(cells, **AB)
    both = table.merge(de, on="ensembl_id")
    found = de_agreement(table, de, mode, top=10)
    assert found["spearman"] == pytest.approx(spearmanr(both.cosine_shift, sign * both.score).statistic)
    head = lambda v: set(both.ensembl_id[np.argsort(-v.to_numpy(), kind="stable")[:10]])
    assert found["overlap"] == len(head(both.cosine_shift) & head(sign * both.score)) / 10 and found["chance"] == 10 / len(both)


# controls

def ranked(n=300, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(dict(symbol=[f"G{i}" for i in range(n)], ensembl_id=[f"E{i}" for i in range(n)], cosine_shift=rng.normal(size=n), mean_rank=rng.uniform(1, 99, n), detection=rng.uniform(.05, 1, n)))


def test_auroc_is_the_share_of_pairs_in_order():
    t = ranked()
    a, b = t.cosine_shift[:9].to_numpy(), t.cosine_shift[9:].to_numpy()
    assert controls(t, dict(nine=t.symbol[:9])).auroc[0] == pytest.approx((a[:, None] > b).mean())


def test_set_p_is_uniform_without_effect_even_where_no_cell_holds_most_genes():
    p, rng = [], np.random.default_rng(1)
    for i in range(80):
        t = ranked(seed=i).sort_values("cosine_shift", ascending=False, ignore_index=True)   # as `perturb` returns it
        t.loc[rng.random(300) < .7, ["mean_rank", "detection"]] = np.nan, 0.   # overexpression asks of genes that no start cell holds
        p.append(controls(t, dict(some=rng.choice(t.symbol, 6, replace=False)), draws=400).p_matched[0])
    assert .38 < np.mean(p) < .62 and np.mean(np.array(p) < .05) < .15


def test_controls_of_ids_and_of_absent_genes():
    t = ranked()
    found = controls(t, dict(ids=t.ensembl_id[:4], none=["NOGENE"], all=t.symbol))
    assert found.ranked.tolist() == [4, 0, 300] and found.auroc.isna().tolist() == found.p_matched.isna().tolist() == [False, True, True]
    assert len(set(HOUSEKEEPING)) == 11 and len(set(INTERFERON)) == 7


# the rank artefact

def test_share_of_a_ranking_that_is_rank():
    rng, rank = np.random.default_rng(0), np.random.default_rng(1).uniform(1, 99, 500)
    assert rank_share(-rank ** 2, rank) == pytest.approx(1)
    assert rank_share(rank + rng.normal(size=500) * 28, rank) == pytest.approx(.5, abs=.1)   # as much noise as signal
    assert abs(np.mean([rank_share(rng.normal(size=60), rank[:60]) for _ in range(200)])) < .02   # adjusted: nothing by chance
    assert np.isnan(rank_share(np.ones(9), rank[:9])) and np.isnan(rank_share(rank[:5], rank[:5]))


def test_report_is_of_the_same_cells_and_genes(cells, small, table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep = perturb(cells, small, positions="keep", progress=False, device="cpu", **AB)
        found = rank_report(cells, small, progress=False, device="cpu", **AB)
    assert found == compare_positions(table, keep)
    both = table.merge(keep, on="ensembl_id")
    assert found["rank_shift"] == pytest.approx(spearmanr(both.cosine_shift_x, both.mean_rank_x).statistic) and found["shift_keep"] == pytest.approx(spearmanr(both.cosine_shift_x, both.cosine_shift_y).statistic)


def test_random_weights_are_seeded_and_of_the_same_shape(small):
    a, b, c = (untrained(small, seed).model for seed in (0, 0, 1))
    weights = lambda m: m.bert.embeddings.word_embeddings.weight
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c)) and weights(a).shape == weights(small.model).shape


# planted programmes

@pytest.mark.parametrize("factor", [0, .25, 1, 3])
def test_counts_stay_counts(factor):
    x = np.random.default_rng(0).poisson(8, (500, 20))
    y = scaled_counts(x, factor, np.random.default_rng(1))
    assert y.dtype.kind == "i" and (y >= 0).all() and y.sum() == pytest.approx(factor * x.sum(), rel=.02) and not y[x == 0].any()


def test_only_the_programme_of_half_of_the_cells_changes(cells):
    bed, x = plant(cells, 6, 5., least=.1, most=1, seed=2), cells.X.toarray()
    changed, half = bed.X.toarray() != x, bed.obs.planted.eq("planted").to_numpy()
    assert half.sum() == 30 and bed.var.planted.sum() == 6 and changed[:, bed.var.planted][half].mean() > .4
    assert not changed[~half].any() and not changed[:, ~bed.var.planted].any()
    assert (plant(cells, 6, 5., least=.1, most=1, seed=3).var.planted != bed.var.planted).any()
    refused(lambda: plant(cells, 60), "60 are to be planted")


def test_recall_counts_what_is_found():
    t = recovery(dict(a=list("abcd"), b=list("dcba")), ["a", "d"], at=(1, 2, 3)).set_index("ranking")
    assert t.loc["a", "recall at 1"] == .5 and t.loc["b", "recall at 3"] == .5 and t.loc["a", "auroc"] == .5 and t.loc["chance", "recall at 2"] == .5


def test_a_planted_programme_is_recovered(cells, tmp_path):
    "A classifier trained to tell the halves apart, on hand-made cells: what it learnt is what was planted"
    from mix_geneformer import finetune, tokenize
    from mix_geneformer.encoder.checkpoints import save_model
    from mix_geneformer.encoder.model import build_model
    bed = plant(toy(n=300, genes=40, seed=5), 5, 20., least=.1, most=1, seed=0)
    vocab = vocabulary_from_medians({"human": pd.Series(1., index=bed.var_names)})
    torch.manual_seed(0)
    start = save_model(build_model(vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=64), vocab, tmp_path / "start", dict(pool="mean"))
    data = tokenize(bed, vocab, tmp_path / "tokens", 64, keep=["planted"], progress=False)
    fine = finetune(data, start, "planted", tmp_path / "fine", epochs=6, batch_size=16, learning_rate=2e-3, warmup_steps=10, device="cpu", progress=False)
    assert fine.metrics["accuracy"] > .65
    where, planted = dict(state="planted", start="planted", goal="unplanted"), bed.var_names[bed.var.planted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = [perturb(bed, fine.path, positions=p, max_cells=40, progress=False, device="cpu", **where) for p in POSITIONS]
    t = recovery(orders(*both, differential(bed, **where)), planted, at=(5, 10)).set_index("ranking")
    assert t.loc["differential expression", "recall at 10"] == 1
    assert t.loc["cosine_shift, keep", "auroc"] > .8


# real cells

def test_the_condition_corpus_is_cut_once(tmp_path):
    try: blood = fetch("pbmc_ifnb")
    except Exception as e: pytest.skip(f"the pbmc_ifnb corpus is neither cached nor to be had: {e}")
    part = part_of_corpus(blood, tmp_path, n=50, only=dict(cell_type=["CD14+ Monocytes"]))
    a = read_counts(fetch(part).files["human"], verbose=False)
    assert a.n_obs == 50 and set(a.obs.cell_type) == {"CD14+ Monocytes"} and fetch(part).condition == "condition" and set(INTERFERON) <= set(a.var.symbol)
    stamp = next(part.iterdir()).stat().st_mtime_ns
    assert part_of_corpus(blood, tmp_path, n=50, only=dict(cell_type=["CD14+ Monocytes"])) == part and next(part.iterdir()).stat().st_mtime_ns == stamp


KANG = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "human_pbmc_kang_ifnb.h5ad"

@pytest.mark.skipif(not KANG.is_file(), reason="the cells with their donors are not on this machine")
def test_donors_of_the_condition():
    "Every donor gets a column, and the donor is the unit of p_donor and of the pseudobulks"
    a = ad.read_h5ad(KANG)
    a = a[a.obs.cell_type.eq("CD14 Mono") & a.obs.donor.ne("ambiguous")]
    use = pd.Series(range(a.n_obs)).groupby([a.obs.donor.astype(str).to_numpy(), a.obs.condition.astype(str).to_numpy()]).head(6)
    a = read_counts(a[use.to_numpy()].copy(), verbose=False)
    vocab = vocabulary_from_medians({"human": pd.Series(1., index=a.var_names)})
    torch.manual_seed(0)
    net = BertForMaskedLM(BertConfig(vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)).eval()
    where = dict(state="condition", start="IFN-beta", goal="control", donor="donor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = perturb(a, SimpleNamespace(model=net, vocab=vocab, context=64), progress=False, device="cpu", **where)
    donors = [c for c in t if c.startswith("shift_")]
    assert len(donors) == 8 and t.p_donor.notna().sum() == (t[donors].notna().sum(1) > 2).sum() > 10
    de = differential(a, **where).set_index("symbol")
    assert (de.score[["ISG15", "IFI6", "IFIT3"]] < -3).all()   # interferon's own genes are higher in stimulated cells of each donor
