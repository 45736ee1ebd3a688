"Questions beside the old one: no goal, several goals, a dose, unrelated states, coverage; processes that share a run."
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import refused
from perturbed import N_GENES, tiny

from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.encoder.checkpoints import save_model
from mix_geneformer.perturbation.verb import perturb, perturbed_embeddings

pytestmark = pytest.mark.filterwarnings("ignore:rank_correlation")
CONTEXT = 24
PLAIN = dict(progress=False, device="cpu", n_boot=20)
AB = dict(state="state", start="a", goal="b", **PLAIN)


@pytest.fixture(scope="module")
def cells():
    ids = gene_table("human").query("symbol != ''").index[:N_GENES]
    rng, n = np.random.default_rng(5), 30
    X = rng.poisson(.9, (n, N_GENES)) * rng.integers(1, 9, (n, N_GENES))
    X[:, 0], X[:10, 1], X[:, 59] = 5, 0, 0   # the first gene in every cell, the last in none
    obs = pd.DataFrame(dict(state=np.repeat(["a", "b", "c"], 10), donor=[f"d{i % 3}" for i in range(n)]))
    return ad.AnnData(sp.csr_matrix(X.astype(np.float32)), obs.rename("cell{}".format), pd.DataFrame(index=ids))


@pytest.fixture(scope="module")
def loaded(cells):
    vocab = vocabulary_from_medians({"human": pd.Series(1., index=cells.var_names)})
    return SimpleNamespace(model=tiny(len(vocab)), vocab=vocab, context=CONTEXT)


def by_gene(table): return table.set_index("ensembl_id").sort_index()


@pytest.mark.parametrize("how", [dict(), dict(positions="keep", donor="donor"), dict(mode="overexpress")])
def test_several_goals_are_one_after_the_other(cells, loaded, how):
    if "mode" in how: how = dict(how, genes=loaded.vocab.frame.symbol[:4].tolist())
    both = perturb(cells, loaded, **{**AB, "goal": ["b", "c"], **how})
    assert both.columns[0] == "goal" and both.goal.unique().tolist() == ["b", "c"]
    for goal in "bc":
        alone = perturb(cells, loaded, **{**AB, "goal": goal, **how})
        pd.testing.assert_frame_equal(both[both.goal == goal].drop(columns="goal").reset_index(drop=True), alone)
        assert both.attrs["cos_start_goal"][goal] == alone.attrs["cos_start_goal"]
        assert both.attrs["rank_correlation"][goal] == alone.attrs["rank_correlation"]
    assert both.attrs["n_perturbations"] == alone.attrs["n_perturbations"]   # the passes are shared


def test_without_a_goal_it_is_how_far_cells_move(cells, loaded):
    table = perturb(cells, loaded, **{**AB, "goal": None})
    for gene in table.symbol[:3]:
        e = perturbed_embeddings(cells, loaded, [gene], state="state", start="a", goal="b", device="cpu")
        before, after = (e.obsm["X_mix_geneformer"][e.obs.stage == s].astype(float) for s in ("before", "after"))
        cos = (before*after).sum(1)/np.linalg.norm(before, axis=1)/np.linalg.norm(after, axis=1)
        assert table.set_index("symbol").cosine_shift[gene] == pytest.approx((1-cos).mean(), abs=1e-6)
    assert (table.cosine_shift > 0).all() and table.cosine_shift.is_monotonic_decreasing
    assert table.attrs["goal"] is None and "cos_start_goal" not in table.attrs and table.attrs["n_goal"] == 0


def test_without_a_start_all_other_cells_are_changed(cells, loaded):
    assert perturb(cells, loaded, **PLAIN).attrs["n_start"] == 30
    rest = perturb(cells, loaded, state="state", goal="b", **PLAIN)
    joined = cells.copy()
    joined.obs["state"] = np.where(joined.obs.state == "b", "b", "other")
    pd.testing.assert_frame_equal(rest, perturb(joined, loaded, **{**AB, "start": "other"}))


def test_unrelated_states_are_runs_of_their_own(cells, loaded, tmp_path):
    how = dict(AB, min_cells=1)
    table = perturb(cells, loaded, unrelated=["c"], **how)
    plain, there = perturb(cells, loaded, **how), perturb(cells, loaded, **{**how, "start": "c"})
    pd.testing.assert_frame_equal(table[plain.columns], plain)
    there = by_gene(there).cosine_shift.reindex(table.ensembl_id).to_numpy()
    np.testing.assert_allclose(table.unrelated_shift, there, atol=1e-7)
    np.testing.assert_allclose(table.specific_shift, table.cosine_shift-there, atol=1e-7)
    assert set(table.n_unrelated[~np.isnan(there)]) == {1} and (table.n_unrelated[np.isnan(there)] == 0).all()
    two = perturb(cells, loaded, unrelated=["c"], out=tmp_path/"run", **{**how, "goal": ["b"]})
    pd.testing.assert_frame_equal(two.drop(columns="goal"), table)
    refused(lambda: perturb(cells, loaded, unrelated=["b"], **how), "goal and unrelated are both 'b'")
    refused(lambda: perturb(cells, loaded, unrelated=["c"], **{**how, "start": None}), "pass start=")


def test_a_dose_is_told_apart_and_checked(cells, loaded, tmp_path):
    how = {**AB, "mode": "inhibit", "positions": "keep"}
    far, near = (perturb(cells, loaded, dose=d, **how) for d in (10, 1))
    assert np.abs(far.cosine_shift).mean() > np.abs(near.cosine_shift).mean() and far.attrs["dose"] == 10
    first = perturb(cells, loaded, dose=0, **{**how, "mode": "activate"})
    held = perturb(cells, loaded, genes=first.symbol.tolist(), **{**how, "mode": "overexpress"})
    gene = loaded.vocab.frame.symbol[0]   # which every cell holds: put first, it is overexpressed
    assert by_gene(first).cosine_shift.iloc[0] == pytest.approx(by_gene(held).cosine_shift.iloc[0], abs=1e-7)
    assert by_gene(first).symbol.iloc[0] == gene
    perturb(cells, loaded, out=tmp_path/"run", dose=1, **how)
    refused(lambda: perturb(cells, loaded, out=tmp_path/"run", dose=2, **how), "differs in 1 of its inputs (dose)")
    refused(lambda: perturb(cells, loaded, dose=2, **AB), "mode='delete' moves none by degrees")
    refused(lambda: perturb(cells, loaded, dose=-1, **how), "neither a number of places nor a quantile")


def test_coverage_counts_what_the_context_cuts(cells, loaded):
    short = SimpleNamespace(model=loaded.model, vocab=loaded.vocab, context=12)
    table = by_gene(perturb(cells, short, coverage=True, min_cells=1, **AB))
    expressed = pd.Series(np.asarray((cells.X[:10] > 0).sum(0)).ravel(), cells.var_names)[table.index]
    assert (table.n_held == table.n_cells).all() and (table.n_held < expressed).any()
    np.testing.assert_allclose(table.coverage, table.n_held/expressed)
    two = table.symbol[:2].tolist()
    refused(lambda: perturb(cells, short, coverage=True, how="together", genes=two, **AB), "how='each'")


def test_every_gene_of_the_vocabulary_can_be_overexpressed(cells, loaded):
    table = perturb(cells, loaded, "overexpress", min_cells=0, **AB)
    assert set(table.ensembl_id) == set(cells.var_names) and (table.n_cells == 10).all()
    nobody = cells.var_names[59]
    alone = perturb(cells, loaded, "overexpress", genes=[nobody], **AB)
    assert by_gene(table).cosine_shift[nobody] == pytest.approx(alone.cosine_shift[0], abs=1e-7)
    assert by_gene(table).detection[nobody] == 0


def test_a_screening_is_of_one_goal(cells, loaded):
    for more in (dict(goal=None), dict(goal=["b", "c"]), dict(unrelated=["c"])):
        refused(lambda: perturb(cells, loaded, screen=.5, positions="keep", **{**AB, **more}), "or screen=None")


def test_a_dry_run_says_what_the_run_takes(cells, loaded, tmp_path):
    plan = perturb(cells, loaded, dry_run=True, out=tmp_path/"run", **AB)
    table = perturb(cells, loaded, **AB)
    assert plan.forward_passes == table.attrs["n_perturbations"]+20 and plan.genes == len(table) and plan.cells == 10
    assert plan.hours > 0 and plan.memory_bytes > 0 and plan.disk_bytes > 0 and not list(tmp_path.iterdir())
    assert perturb(cells, loaded, dry_run=True, screen=.5, positions="keep", **AB).forward_passes < plan.forward_passes


SCRIPT = """
import sys, torch.distributed as dist
from mix_geneformer import perturb
if "--torchrun" in sys.argv: dist.init_process_group("gloo")
t = perturb(sys.argv[1], sys.argv[2], state="state", start="a", goal="b", out=sys.argv[3], n_boot=20, progress=False,
            device="cpu")
t.to_csv(f"{sys.argv[3]}-{__import__('os').getpid()}.csv", index=False)
"""


@pytest.fixture
def many(cells, loaded, tmp_path):
    "Cells and a model on disk, in several blocks of work"
    large = ad.concat([cells]*14)
    large.obs_names_make_unique()
    large.write_h5ad(tmp_path/"cells.h5ad")
    (tmp_path/"share.py").write_text(SCRIPT)
    return [str(tmp_path/"cells.h5ad"), str(save_model(loaded.model, loaded.vocab, tmp_path/"model"))]


@pytest.mark.parametrize("launch", ["torchrun", "plain"])
def test_two_processes_share_a_run(many, tmp_path, launch):
    script, out = str(tmp_path/"share.py"), str(tmp_path/"run")
    if launch == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
        subprocess.run([*run, *many, out, "--torchrun"], check=True, capture_output=True)
    else:
        both = [subprocess.Popen([sys.executable, "-W", "ignore", script, *many, out]) for _ in range(2)]
        assert [p.wait() for p in both] == [0, 0]
    alone = perturb(*many, **AB).to_csv(index=False)
    found = [p.read_text() for p in tmp_path.glob("run-*.csv")]
    assert found == [alone, alone] and (tmp_path/"run"/"perturb.csv").read_text() == alone
    parts = sorted(p.name for p in (tmp_path/"run"/"shards").iterdir())
    assert len(parts) > 1 and all(p.endswith(".npz") for p in parts)   # no lock is left


def test_an_executor_shares_a_run(cells, loaded, tmp_path):
    with ThreadPoolExecutor(2) as client: shared = perturb(cells, loaded, out=tmp_path/"run", client=client, **AB)
    pd.testing.assert_frame_equal(shared, perturb(cells, loaded, **AB))
    refused(lambda: perturb(cells, loaded, client=client, **AB), "pass out=")


def test_processes_without_a_folder_are_told(cells, loaded, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="2 processes each compute all cells: pass out="): perturb(cells, loaded, **AB)
