"`perturb` from counts to table: what it returns, keeps and refuses."
import json
import os
import re
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import TINY, refused, toy
from perturbed import CONTEXT, N_GENES, tiny

from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary, vocabulary_from_medians
from mix_geneformer.encoder import states
from mix_geneformer.encoder.checkpoints import load_model, save_model
from mix_geneformer.encoder.masking import mask_tokens
from mix_geneformer.encoder.model import build_model, encode
from mix_geneformer.files import InputError
from mix_geneformer.perturbation.edits import MODES, POSITIONS
from mix_geneformer.perturbation.verb import perturb, perturbed_embeddings
from mix_geneformer.pretraining import pretrain

@pytest.fixture(scope="module")
def vocab():
    ids = gene_table("human").query("symbol != ''").index[:N_GENES]
    return vocabulary_from_medians({"human": pd.Series(1., index=ids)})


@pytest.fixture(scope="module")
def adata(vocab):
    rng, n = np.random.default_rng(3), 24
    X = rng.poisson(.5, (n, N_GENES)) * rng.integers(1, 9, (n, N_GENES))
    X[:, 0], X[:12, 1] = 5, 0   # the first gene in every cell, the second in goal cells only
    X[12:, 1] = 3
    obs = pd.DataFrame(dict(state=["a"] * 12 + ["b"] * 10 + ["c"] * 2, donor=[f"d{i % 3}" for i in range(n)]))
    obs.index = [f"cell{i}" for i in range(n)]
    var = pd.DataFrame(index=vocab.frame.ensembl_id.to_numpy())
    return ad.AnnData(sp.csr_matrix(X.astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="module")
def loaded(vocab): return SimpleNamespace(model=tiny(len(vocab)), vocab=vocab, context=CONTEXT)


AB = dict(state="state", start="a", goal="b", progress=False, device="cpu")


@pytest.mark.filterwarnings("ignore:rank_correlation")
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_table(adata, loaded, mode, positions):
    table = perturb(adata, loaded, mode, positions=positions, donor="donor", **AB)
    assert table.columns.tolist() == [
        "symbol", "ensembl_id", "cosine_shift", "p_value", "fdr", "n_cells", "p_empirical", "ci_low", "ci_high",
        "mean_rank", "detection", "rank", "p_donor", "shift_d0", "shift_d1", "shift_d2"]
    assert table.cosine_shift.is_monotonic_decreasing and table.p_value.between(0, 1, "right").all()
    assert (table.fdr >= table.p_value).all()
    assert table.attrs["n_start"] == 12 and table.attrs["n_goal"] == 10
    assert table.attrs["mode"] == mode and table.attrs["positions"] == positions
    assert len(table) == table.attrs["n_genes"] and table.n_cells.sum() == table.attrs["n_perturbations"]
    json.dumps(table.attrs)
    goal_only = loaded.vocab.frame.symbol[1]
    assert (goal_only in set(table.symbol)) == (mode == "overexpress")
    if mode == "overexpress":
        assert (table.n_cells == 12).all() and table.set_index("symbol").detection[goal_only] == 0
    else: assert (table.n_cells >= 3).all() and (table.n_cells == (table.detection * 12).round()).all()


def test_genes_by_symbol_and_id_each_and_together(adata, loaded):
    f = loaded.vocab.frame
    names = [f.symbol[0], f.ensembl_id[5], f.symbol[5]]
    each = perturb(adata, loaded, genes=names, **AB)
    assert sorted(each.symbol) == sorted(f.symbol[[0, 5]])   # one gene named twice is one row
    together = perturb(adata, loaded, genes=names[:2], how="together", **AB)
    assert together.symbol.tolist() == [f"{f.symbol[0]}+{f.symbol[5]}"] and together.n_cells.tolist() == [12]
    assert together.p_value.isna().all()
    assert not np.isnan(together.ci_low[0])


def test_embeddings_of_before_after_and_goal(adata, loaded):
    kw = dict(state="state", start="a", goal="b", device="cpu")
    genes = loaded.vocab.frame.symbol[[0, 5]].tolist()
    cells = perturbed_embeddings(adata, loaded, genes, "delete", **kw)
    assert cells.obs.stage.value_counts().to_dict() == dict(before=12, after=12, goal=10)
    assert cells.obsm["X_mix_geneformer"].shape == (34, 32)
    shift = perturb(adata, loaded, genes=genes, how="together", **AB).cosine_shift[0]
    assert cells.uns["mix_geneformer"]["cosine_shift"] == pytest.approx(shift, abs=1e-6)
    assert set(cells.obs.state[cells.obs.stage == "after"]) == {"a"}
    assert set(cells.obs.cell[cells.obs.stage == "goal"]) == set(adata.obs_names[12:22])


@pytest.mark.filterwarnings("ignore:rank_correlation")
@pytest.mark.parametrize("orthologs", ["separate", "shared", "tied"])
def test_a_model_directory_and_a_file_suffice(adata, tmp_path, orthologs):
    human = adata.var_names
    mouse = gene_table("human").ortholog[human].replace("", np.nan).dropna()
    medians = dict(human=pd.Series(1., index=human), mouse=pd.Series(1., index=mouse.to_numpy()))
    both = vocabulary_from_medians(medians, orthologs)
    torch.manual_seed(0)
    net = build_model(both, **dict(TINY, hidden_size=32, intermediate_size=64, context=CONTEXT))
    path = save_model(net, both, tmp_path / "model")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    table = perturb(tmp_path / "cells.h5ad", path, positions="keep", **AB)
    pd.testing.assert_frame_equal(table, perturb(adata, load_model(path, "cpu"), positions="keep", **AB))
    assert set(table.ensembl_id) <= set(human) and len(table) > 10
    twin = adata[:, mouse.index].copy()   # the same counts as mouse cells
    twin.var_names = mouse.to_numpy()
    found = perturb(twin, path, **AB)
    assert set(found.ensembl_id) <= set(mouse) and len(found) > 3
    same = perturb(adata[:, mouse.index].copy(), path, **AB).cosine_shift.equals(found.cosine_shift)
    assert same == (orthologs == "shared")   # a shared vocabulary cannot tell them apart, the others do


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_folder_holds_the_table_and_one_run(adata, loaded, tmp_path):
    table = perturb(adata, loaded, out=tmp_path / "run", **AB)
    written = (tmp_path / "run" / "perturb.csv").read_bytes()
    read = pd.read_csv(tmp_path / "run" / "perturb.csv", na_values=[""], keep_default_na=False)
    pd.testing.assert_frame_equal(read, table, check_dtype=False, rtol=1e-12)
    shard = next((tmp_path / "run" / "shards").glob("*.npz"))
    stamp = os.stat(shard).st_mtime_ns
    perturb(adata, loaded, out=tmp_path / "run", **AB)
    assert os.stat(shard).st_mtime_ns == stamp and (tmp_path / "run" / "perturb.csv").read_bytes() == written
    other = "holds another perturbation, which differs in 1 of its inputs .mode.: pass another out="
    with pytest.raises(InputError, match=other): perturb(adata, loaded, "inhibit", out=tmp_path / "run", **AB)
    with pytest.raises(InputError, match="cells or weights"):
        perturb(adata, loaded, out=tmp_path / "run", max_cells=5, **AB)
    note = json.loads((tmp_path / "run" / "perturb.json").read_text())
    assert note["n_start"] == 12 and note["mode"] == "delete" and len(note["fingerprint"]) == 16
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be made .*pass another out="):
        perturb(adata, loaded, out=tmp_path / "file", **AB)


@pytest.mark.parametrize("given, message", [
    (dict(mode="knockout"), "mode='knockout' is none of the 4 known: pass 'delete' or"),
    (dict(how="all"), "how='all' is none of the 2 known: pass 'each' or 'together'"),
    (dict(positions="old"), "positions='old' is none of the 2 known: pass 'shift' or 'keep'"),
    (dict(state="disease"), "state='disease' is none of the . columns of obs: pass one of .*state, donor"),
    (dict(start="z"), "start='z' is the 'state' of 0 of 24 cells: pass one of a, b, c"),
    (dict(goal="z"), "goal='z' is the 'state' of 0 of 24 cells: pass one of a, b, c"),
    (dict(goal="a"), "start and goal are both 'a', 1 state instead of 2: pass two different"),
    (dict(start="c"), "start='c' has only 2 cells, and 3 are the least for a comparison: pass a larger"),
    (dict(max_cells=2), "max cells of start is 2, and 3 are the least"),
    (dict(donor="patient"), "donor='patient' is none of the . columns of obs: pass one of"),
    (dict(genes=["NOGENE1"]), "1 of 1 genes are not in the vocabulary .NOGENE1.: pass"),
    (dict(genes=[]), "genes= lists 0 genes: pass symbols or Ensembl IDs"),
    (dict(min_cells=99), "0 genes are in at least 99 of 12 start cells, the most is 12: "
                         "lower min_cells or pass genes="),
    (dict(min_cells=99, mode="overexpress"), "0 genes are in at least 99 of 12 start or of the goal cells"),
])
def test_refuses(adata, loaded, given, message):
    with pytest.raises(InputError, match=message): perturb(adata, loaded, **{**AB, **given})


def test_gene_that_no_start_cell_holds(adata, loaded):
    here, absent = loaded.vocab.frame.symbol[:2]
    nothing = (f"{absent} is in 0 of 12 start cells, so there is nothing to delete: "
               "pass other genes, or mode='overexpress'")
    with pytest.raises(InputError, match=nothing):
        perturb(adata, loaded, genes=[absent], **AB)
    with pytest.warns(UserWarning, match=f"1 of 2 genes are in 0 of 12 start cells and are left out: {absent}"):
        assert perturb(adata, loaded, genes=[here, absent], **AB).symbol.tolist() == [here]


def test_mouse_cells_in_a_human_vocabulary(adata, loaded):
    mouse = adata.copy()
    mouse.var_names = gene_table("mouse").query("symbol != ''").index[:N_GENES]
    with pytest.raises(InputError, match="0 mouse genes .only human."): perturb(mouse, loaded, **AB)


def test_cells_of_one_gene(adata, loaded):
    poor = adata.copy()
    poor.X = sp.csr_matrix(np.eye(1, N_GENES, dtype=np.float32).repeat(24, 0) * 5)
    few = ("0 of 12 start cells hold 2 genes of the vocabulary .human., the cells being human: "
           "use a model of that species")
    with pytest.raises(InputError, match=few): perturb(poor, loaded, **AB)


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_screened_table_holds_exact_numbers(adata, loaded, tmp_path, capsys):
    calm = SimpleNamespace(model=tiny(len(loaded.vocab), spread=.02), vocab=loaded.vocab, context=CONTEXT)
    kw = dict(AB, positions="keep", screen_sample=60)
    exact, table = perturb(adata, calm, **{**AB, "positions": "keep"}), perturb(adata, calm, screen=.2, **kw)
    assert table.columns.tolist() == [*exact.columns, "screened"] and len(table) == len(exact)
    assert table.screened.notna().all()
    done, rest = table[table.n_cells > 0], table[table.n_cells == 0]
    assert len(done) == table.attrs["n_rechecked"] == np.ceil(.2 * len(exact)) and rest.index.min() == len(done)
    assert done["rank"].tolist() == list(range(1, len(done) + 1))
    assert rest[["rank", "cosine_shift", "p_value", "fdr", "ci_low"]].isna().all(None)
    same = exact.set_index("ensembl_id").loc[done.ensembl_id]
    np.testing.assert_allclose(done.cosine_shift, same.cosine_shift, atol=1e-6)
    np.testing.assert_array_equal(done.n_cells, same.n_cells)
    assert done.p_value.between(0, 1).all() and (done.fdr >= done.p_value).all()
    assert table.p_empirical.isna().all()
    assert table.attrs["n_sample"] == 60 and .9 < table.attrs["screen_correlation"] <= 1
    json.dumps(table.attrs)
    whole = perturb(adata, calm, screen=1, **kw).set_index("ensembl_id")
    np.testing.assert_allclose(whole.cosine_shift[exact.ensembl_id], exact.cosine_shift, atol=1e-6)
    out = dict(kw, out=tmp_path / "run", screen=.2)
    pd.testing.assert_frame_equal(perturb(adata, calm, **out), table)
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "run" / "shards").iterdir()}
    assert {"sample.npz", "screened.npz"} < {f.name for f in stamps}
    again = perturb(adata, calm, **{**out, "progress": True})   # resumed, nothing is computed again
    pd.testing.assert_frame_equal(again, table)
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    assert "60 random ones agree with exact shifts to a correlation of" in capsys.readouterr().out


@pytest.mark.parametrize("given, message", [
    (dict(screen=2), "screen=2 is not a share of the genes between 0 and 1: pass screen=0.1"),
    (dict(screen=.1, how="together"), "screen=0.1 ranks genes one by one, and how='together' makes 1 perturbation "
                                      "per cell: pass how='each' or screen=None"),
    (dict(screen=.1, mode="overexpress"), "overexpressions put a gene into a cell that lacks it, which has no gradient "
                                          "to screen by: pass screen=None, or genes="),
    (dict(screen=.1), "random perturbations correlate only by .* .screen_min_correlation=0.8.: "
                      "pass screen=None, or positions='keep'"),
    (dict(screen=.1, positions="keep", screen_min_correlation=2),
     "random perturbations correlate only by .*: pass screen=None$"),
    (dict(emb_layer=3), "emb_layer=3 is none of the 2 layers of this model: pass 1 to 2"),
])
def test_refuses_to_screen(adata, loaded, given, message, tmp_path):
    with pytest.raises(InputError, match=message): perturb(adata, loaded, **{**AB, **given})
    with pytest.raises(InputError, match=message): perturb(adata, loaded, **{**AB, **given}, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())   # so that the remedy can use the folder


def test_overexpression_is_screened_where_every_cell_holds_the_genes(adata, loaded):
    gene = loaded.vocab.frame.symbol[0]
    how = dict(positions="keep", screen=1, screen_min_correlation=-1)
    table = perturb(adata, loaded, "overexpress", genes=[gene], **how, **AB)
    assert table.n_cells.tolist() == [12] and table.screened.notna().all()


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_bf16_agreement_is_noted(adata, loaded, monkeypatch):
    kw = dict(AB, positions="keep", screen_sample=80)
    table, exact = perturb(adata, loaded, bf16=True, **kw), perturb(adata, loaded, **kw)
    found = table.attrs["bf16_agreement"]
    assert found["n"] == 80 and 0 < found["max_difference"] < .1 and .9 < found["spearman"] < 1
    assert np.abs(table.set_index("symbol").cosine_shift - exact.set_index("symbol").cosine_shift).max() < .01
    assert "bf16_agreement" not in exact.attrs

    def confused(*a):   # a device that mixes up the cells of a batch
        return encode(*a).flip(0) if torch.is_autocast_enabled("cpu") else encode(*a)
    monkeypatch.setattr(states, "encode", confused)
    told = ("bf16_agreement is .*: the shifts of 80 random perturbations in bfloat16 differ from float32 by up to .*; "
            "pass bf16=False")
    with pytest.warns(UserWarning, match=told): perturb(adata, loaded, bf16=True, **kw)


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_time_is_told_before_it_starts(adata, loaded, capsys):
    table = perturb(adata, loaded, batch_tokens=24, **{**AB, "progress": True})
    told = r"about ([\d,]+) perturbations, ([\d,]+)/s, about (\d\d:\d\d)"
    n, rate, time = re.search(told, capsys.readouterr().out).groups()
    assert int(n.replace(",", "")) == table.attrs["n_perturbations"]


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_genes_that_leave_nothing_to_compare(adata, loaded):
    poor = adata.copy()
    poor.X = sp.csr_matrix(np.eye(2, N_GENES, dtype=np.float32).sum(0, keepdims=True).repeat(24, 0) * 5)
    genes = loaded.vocab.frame.symbol[:2].tolist()
    with pytest.raises(InputError, match=(
        "0 of 12 perturbations leave a cell another gene to look at: pass fewer genes"
    )):
        perturb(poor, loaded, genes=genes, how="together", **AB)


def test_a_species_token_leads_and_is_never_predicted(tmp_path):
    "And `perturb` says that it does not take such a model"
    human, mouse = (read_counts(toy(s, 80, 40, seed), verbose=False) for seed, s in enumerate(("human", "mouse")))
    both, plain = (Vocabulary.build([human, mouse], species_token=t) for t in (True, False))
    assert both.specials == ("<pad>", "<mask>", "<human>", "<mouse>")
    assert Vocabulary.load(both.save(tmp_path).parent) == both
    for a, first in ((human, 2), (mouse, 3)):
        with_, without = encode_cells(a, both, 24), encode_cells(a, plain, 23)
        assert (with_.values[with_.offsets[:-1]] == first).all()
        assert [with_[i][1:].tolist() for i in range(a.n_obs)] == [(without[i] + 2).tolist() for i in range(a.n_obs)]
    corpus = tokenize([human, mouse], both, tmp_path/"corpus", 24, progress=False)
    ids, n = sentences_of(corpus).flat(np.arange(len(corpus)))
    chosen = mask_tokens(ids, n, np.arange(len(corpus)), len(both), both.n_special, mlm_probability=.9)[1]
    assert chosen.any() and not chosen[ids < both.n_special].any()
    model = pretrain(corpus, tmp_path/"model", **TINY, max_steps=1, progress=False)
    refused(lambda: perturb(human, model, state="cell_type", start="a", goal="b", progress=False),
            "<human>, <mouse>", "species_token")
    assert load_model(model).vocab == both
