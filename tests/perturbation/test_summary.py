"A row per gene: its tests against scipy's, donors, and the warning."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, ranksums, ttest_rel

from mix_geneformer.perturbation.summary import summarise, warn_rank

def simulated(n_genes=30, n_cells=12, seed=0):
    rng = np.random.default_rng(seed)
    cell, gene = (a.ravel() for a in np.meshgrid(np.arange(n_cells), np.arange(n_genes)))
    rank = rng.integers(1, 99, len(cell)).astype(float)
    shifts = pd.DataFrame(dict(cell=cell, gene=gene, rank=rank, shift=rng.normal(size=len(cell)) + (gene == 7) * 4))
    symbols, ids = zip(*[(f"G{i}", f"E{i:02d}") for i in range(n_genes)])
    return shifts, pd.DataFrame(dict(symbol=symbols, ensembl_id=ids, mean_rank=50., detection=1.))


def test_statistics_are_scipys():
    shifts, about = simulated()
    table = summarise(shifts, about, donors=["a", "b", "c"] * 4).set_index("symbol")
    p = {f"G{g}": ranksums(d["shift"], shifts["shift"]).pvalue for g, d in shifts.groupby("gene")}
    mean = shifts.groupby("gene")["shift"].mean().rename(lambda g: f"G{g}")
    np.testing.assert_allclose(table.p_value, pd.Series(p)[table.index], rtol=1e-9)
    np.testing.assert_allclose(table.fdr, false_discovery_control(table.p_value))
    np.testing.assert_allclose(table.cosine_shift, mean[table.index])
    assert table.index[0] == "G7" and table["rank"].tolist() == list(range(1, 31)) and table.p_empirical["G7"] == 1 / 30
    assert ((table.ci_low <= table.cosine_shift) & (table.cosine_shift <= table.ci_high)).all()
    np.testing.assert_allclose(table[["shift_a", "shift_b", "shift_c"]].mean(1), table.cosine_shift)
    pd.testing.assert_frame_equal(summarise(shifts, about), summarise(shifts, about))   # seeded


def test_donors_widen_the_interval():
    shifts, about = simulated()
    shifts["shift"] += np.array([-2., 0, 2])[shifts.cell % 3]   # donors differ, cells of one donor do not
    def width(**kw): return summarise(shifts, about, **kw).eval("ci_high - ci_low").mean()
    assert width(donors=["a", "b", "c"] * 4) > 1.3 * width()


def test_the_donor_test_is_a_paired_t_test_and_copies_of_cells_do_not_sharpen_it():
    shifts, about = simulated()
    donors = np.array(["a", "b", "c"] * 4)
    table = summarise(shifts, about, donors=donors).set_index("symbol")
    mean = shifts.groupby(["gene", donors[shifts.cell]])["shift"].mean().unstack()
    usual = shifts.groupby(donors[shifts.cell])["shift"].mean()
    p = [ttest_rel(mean.loc[int(g[1:])], usual).pvalue for g in table.index]
    np.testing.assert_allclose(table.p_donor, p, rtol=1e-9)
    many = pd.concat([shifts.assign(cell=shifts.cell + 12 * i) for i in range(20)], ignore_index=True)
    copied = summarise(many, about, donors=np.tile(donors, 20)).set_index("symbol").loc[table.index]
    np.testing.assert_allclose(copied.p_donor, table.p_donor, rtol=1e-6)
    assert (copied.p_value < table.p_value).mean() > .9
    assert "p_donor" not in summarise(shifts, about, donors=["a", "b"] * 6)


def test_rank_warning():
    told = r"rank_correlation is 0\.90: a gene's shift mostly follows its rank in .*positions='keep'.*p_empirical"
    with pytest.warns(UserWarning, match=told): warn_rank(.9, "shift")
    shifts, about = simulated()
    shifts["shift"] = -shifts["rank"]
    assert summarise(shifts, about).attrs["rank_correlation"] == pytest.approx(-1)
