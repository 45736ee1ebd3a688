"In silico perturbation: batched against a plain loop written from the definition, the verb, and what it refuses."
import json, os, sys
from types import SimpleNamespace

import anndata as ad, numpy as np, pandas as pd, pytest, scipy.sparse as sp, torch
from scipy.stats import false_discovery_control, ranksums
from transformers import BertConfig, BertForMaskedLM

from mix_geneformer.genes import InputError, gene_table, vocabulary_from_medians
from mix_geneformer.model import build_model, load_model, save_model
from mix_geneformer.perturb import (HOW, MODES, POSITIONS, all_shifts, cell_states, cosine, goal_mean, matched_p, perturb,
                                    perturbed_embeddings, perturbed_means, summarise, warn_rank)

N_GENES, CONTEXT = 60, 24


def tiny(size, context=CONTEXT, types=2):
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                      max_position_embeddings=context, type_vocab_size=types, initializer_range=.5)).eval()


@pytest.fixture(scope="module")
def model(): return tiny(N_GENES + 2)


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(1)   # lengths 2, 3, 4, one as long as the context, and some between
    return [rng.permutation(np.arange(2, N_GENES + 2))[:n] for n in (9, 2, CONTEXT, 3, 17, 4, CONTEXT)]


@pytest.fixture(scope="module")
def goal(model): return goal_mean(model, [np.array([4, 9, 6]), np.array([16, 4, 8, 3])]).mean(0)


# the definition, one perturbation and one token at a time

def changed(sentence, genes, mode, context):
    "The new sentence as a list, and where each of its genes was meant to stand"
    s, L = list(map(int, sentence)), len(sentence)
    quarter = max(1, L // 4)
    if mode == "delete": return [t for t in s if t not in genes], {}
    if mode == "overexpress": return (list(genes) + [t for t in s if t not in genes])[:context], {g: i for i, g in enumerate(genes)}
    (g,) = genes
    old = s.index(g)
    new = min(old + quarter, L - 1) if mode == "inhibit" else max(old - quarter, 0)
    s.remove(g)
    s.insert(new, g)
    return s, {g: new}


def hidden(model, sentence, places):
    with torch.inference_mode():
        return model.bert(input_ids=torch.tensor([sentence]), position_ids=torch.tensor([places])).last_hidden_state[0].numpy()


def plain_shift(model, sentence, genes, mode, positions, context, goal):
    old = list(map(int, sentence))
    new, placed = changed(sentence, genes, mode, context)
    places = list(range(len(new))) if positions == "shift" else [placed[t] if t in placed else old.index(t) for t in new]
    common = [t for t in new if t in old and t not in genes]
    before, after = hidden(model, old, list(range(len(old)))), hidden(model, new, places)
    before = np.mean([before[old.index(t)] for t in common], axis=0)
    after = np.mean([after[new.index(t)] for t in common], axis=0)
    cos = lambda a, b: np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    return cos(after, goal) - cos(before, goal)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_batched_equals_the_definition(model, cells, goal, mode, positions):
    genes = np.arange(2, N_GENES + 2)
    found = all_shifts(model, cells, genes, goal, mode, "each", positions, CONTEXT)
    expected = [(i, j, plain_shift(model, s, [int(g)], mode, positions, CONTEXT, goal)) for i, s in enumerate(cells) for j, g in enumerate(genes)
                if mode == "overexpress" or g in s]
    assert found[["cell", "gene"]].values.tolist() == [[i, j] for i, j, _ in expected]
    np.testing.assert_allclose(found["shift"], [x for *_, x in expected], atol=1e-6)
    assert np.abs(found["shift"]).max() > 1e-3   # there is something to compare


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_together_equals_the_definition(model, cells, goal, mode, positions):
    genes = np.array([5, 40, 33, 12])
    found = all_shifts(model, cells, genes, goal, mode, "together", positions, CONTEXT)
    for _, row in found.iterrows():
        held = [int(g) for g in genes if mode == "overexpress" or g in cells[int(row.cell)]]
        assert abs(row["shift"] - plain_shift(model, cells[int(row.cell)], held, mode, positions, CONTEXT, goal)) < 1e-6
    assert len(found) == sum(mode == "overexpress" or bool(set(genes) & set(s)) for s in cells)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", MODES)
def test_neighbours_padding_and_batch_size_do_not_matter(model, cells, goal, mode, how):
    genes = np.arange(2, 40)
    whole = all_shifts(model, cells, genes, goal, mode, how, context=CONTEXT)
    for budget in (1, 50, 10**6):
        pd.testing.assert_frame_equal(whole, all_shifts(model, cells, genes, goal, mode, how, context=CONTEXT, budget=budget), rtol=0, atol=1e-6)
    alone = pd.concat([all_shifts(model, [s], genes, goal, mode, how, context=CONTEXT).assign(cell=i) for i, s in enumerate(cells)], ignore_index=True)
    pd.testing.assert_frame_equal(whole, alone, rtol=0, atol=1e-6)


def test_last_and_first_token(model, cells, goal):
    for s in cells[2:]:
        first, last = s[:1], s[-1:]
        shift = lambda gene, mode, positions: all_shifts(model, [s], gene, goal, mode, "each", positions, CONTEXT)["shift"][0]
        assert abs(shift(last, "delete", "keep") - shift(last, "delete", "shift")) < 1e-6   # no later token to move
        for positions in POSITIONS:
            for gene, mode in ((last, "inhibit"), (first, "activate"), (first, "overexpress")):
                assert abs(shift(gene, mode, positions)) < 1e-6   # already there


def test_kept_positions_ignore_the_order_of_the_batch_rows(model):
    s, kept = np.array([7, 3, 9, 5]), dict(positions="keep", context=CONTEXT)
    m = next(perturbed_means(model, [s], np.array([9]), "delete", **kept))
    np.testing.assert_allclose(m["after"][0], hidden(model, [5, 7, 3], [3, 0, 1]).mean(0), atol=1e-5)


def test_species_of_a_tied_vocabulary_reach_the_encoder(model, cells, goal):
    genes, types = np.arange(2, 40), np.array([0, 1] * 4)[:len(cells)]
    both = all_shifts(model, cells, genes, goal, types=types)
    for t in (0, 1):
        rows = np.flatnonzero(types == t)
        part = all_shifts(model, [cells[i] for i in rows], genes, goal, types=np.full(len(rows), t))
        np.testing.assert_allclose(part["shift"], both[both.cell.isin(rows)]["shift"], atol=1e-6)
    assert np.abs(all_shifts(model, cells, genes, goal)["shift"] - both["shift"]).max() > 1e-4


def test_bfloat16_encoder_keeps_float32_means(model, cells, goal):
    m = next(perturbed_means(model, cells, np.arange(2, 40), "delete", bf16=True))
    assert m["before"].dtype == m["after"].dtype == np.float32 and cosine(m["after"], goal).dtype == np.float64


def test_killed_run_resumes(model, cells, goal, tmp_path, monkeypatch):
    module = sys.modules[all_shifts.__module__]   # the name mix_geneformer.perturb is the verb
    cut, calls = module.cell_blocks, []
    monkeypatch.setattr(module, "cell_blocks", lambda lengths, rows: cut(lengths, rows, most_cells=2))
    encode = module.encode_arrays

    def dies(*a, **k):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return encode(*a, **k)
    genes = np.arange(2, 40)
    whole = all_shifts(model, cells, genes, goal)
    monkeypatch.setattr(module, "encode_arrays", dies)
    with pytest.raises(KeyboardInterrupt): all_shifts(model, cells, genes, goal, shards=tmp_path)
    left = len(list(tmp_path.glob("*.npz")))
    assert 0 < left < 4 and not list(tmp_path.glob("*.partial"))
    pd.testing.assert_frame_equal(all_shifts(model, cells, genes, goal, shards=tmp_path), whole, rtol=0, atol=1e-6)


# statistics

def simulated(n_genes=30, n_cells=12, seed=0):
    rng = np.random.default_rng(seed)
    cell, gene = (a.ravel() for a in np.meshgrid(np.arange(n_cells), np.arange(n_genes)))
    shifts = pd.DataFrame(dict(cell=cell, gene=gene, rank=rng.integers(1, 99, len(cell)).astype(float), shift=rng.normal(size=len(cell)) + (gene == 7) * 4))
    about = pd.DataFrame(dict(symbol=[f"G{i}" for i in range(n_genes)], ensembl_id=[f"E{i:02d}" for i in range(n_genes)], mean_rank=50., detection=1.))
    return shifts, about


def test_statistics_are_scipys():
    shifts, about = simulated()
    table = summarise(shifts, about, donors=["a", "b", "c"] * 4).set_index("symbol")
    p = {f"G{g}": ranksums(d["shift"], shifts["shift"]).pvalue for g, d in shifts.groupby("gene")}
    np.testing.assert_allclose(table.p_value, pd.Series(p)[table.index], rtol=1e-9)
    np.testing.assert_allclose(table.fdr, false_discovery_control(table.p_value))
    np.testing.assert_allclose(table.cosine_shift, shifts.groupby("gene")["shift"].mean().rename(lambda g: f"G{g}")[table.index])
    assert table.index[0] == "G7" and table["rank"].tolist() == list(range(1, 31)) and table.p_empirical["G7"] == 1 / 30
    assert ((table.ci_low <= table.cosine_shift) & (table.cosine_shift <= table.ci_high)).all()
    np.testing.assert_allclose(table[["shift_a", "shift_b", "shift_c"]].mean(1), table.cosine_shift)
    pd.testing.assert_frame_equal(summarise(shifts, about), summarise(shifts, about))   # seeded


def test_donors_widen_the_interval():
    shifts, about = simulated()
    shifts["shift"] += np.array([-2., 0, 2])[shifts.cell % 3]   # donors differ, cells of one donor do not
    width = lambda **kw: summarise(shifts, about, **kw).eval("ci_high - ci_low").mean()
    assert width(donors=["a", "b", "c"] * 4) > 1.3 * width()


def test_matched_p_is_uniform_without_effect():
    rng = np.random.default_rng(0)
    rank = rng.uniform(1, 100, 2000)
    p = matched_p(rng.normal(size=2000) * rank + rank, rank, rng.uniform(.1, 1, 2000))   # rank decides mean and spread
    assert abs((p < .05).mean() - .05) < .02 and .4 < p.mean() < .6


def test_rank_warning():
    with pytest.warns(UserWarning, match=r"rank_correlation is 0\.90: a gene's shift mostly follows its rank in the cell.*positions='keep'.*p_empirical"): warn_rank(.9, "shift")
    shifts, about = simulated()
    shifts["shift"] = -shifts["rank"]
    assert summarise(shifts, about).attrs["rank_correlation"] == pytest.approx(-1)


# the verb

@pytest.fixture(scope="module")
def vocab():
    return vocabulary_from_medians({"human": pd.Series(1., index=gene_table("human").query("symbol != ''").index[:N_GENES])})


@pytest.fixture(scope="module")
def adata(vocab):
    rng, n = np.random.default_rng(3), 24
    X = rng.poisson(.5, (n, N_GENES)) * rng.integers(1, 9, (n, N_GENES))
    X[:, 0], X[:12, 1] = 5, 0   # the first gene in every cell, the second in goal cells only
    obs = pd.DataFrame(dict(state=["a"] * 12 + ["b"] * 10 + ["c"] * 2, donor=[f"d{i % 3}" for i in range(n)]), index=[f"cell{i}" for i in range(n)])
    X[12:, 1] = 3
    return ad.AnnData(sp.csr_matrix(X.astype(np.float32)), obs=obs, var=pd.DataFrame(index=vocab.frame.ensembl_id.to_numpy()))


@pytest.fixture(scope="module")
def loaded(vocab): return SimpleNamespace(model=tiny(len(vocab)), vocab=vocab, context=CONTEXT)


AB = dict(state="state", start="a", goal="b", progress=False, device="cpu")


@pytest.mark.filterwarnings("ignore:rank_correlation")
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_table(adata, loaded, mode, positions):
    table = perturb(adata, loaded, mode, positions=positions, donor="donor", **AB)
    assert table.columns.tolist() == ["symbol", "ensembl_id", "cosine_shift", "p_value", "fdr", "n_cells", "p_empirical", "ci_low", "ci_high",
                                      "mean_rank", "detection", "rank", "shift_d0", "shift_d1", "shift_d2"]
    assert table.cosine_shift.is_monotonic_decreasing and table.p_value.between(0, 1, "right").all() and (table.fdr >= table.p_value).all()
    assert table.attrs["n_start"] == 12 and table.attrs["n_goal"] == 10 and table.attrs["mode"] == mode and table.attrs["positions"] == positions
    assert len(table) == table.attrs["n_genes"] and table.n_cells.sum() == table.attrs["n_perturbations"]
    json.dumps(table.attrs)
    goal_only = loaded.vocab.frame.symbol[1]
    assert (goal_only in set(table.symbol)) == (mode == "overexpress")
    if mode == "overexpress": assert (table.n_cells == 12).all() and table.set_index("symbol").detection[goal_only] == 0
    else: assert (table.n_cells >= 3).all() and (table.n_cells == (table.detection * 12).round()).all()


def test_genes_by_symbol_and_id_each_and_together(adata, loaded):
    f = loaded.vocab.frame
    names = [f.symbol[0], f.ensembl_id[5], f.symbol[5]]
    each = perturb(adata, loaded, genes=names, **AB)
    assert sorted(each.symbol) == sorted(f.symbol[[0, 5]])   # one gene named twice is one row
    together = perturb(adata, loaded, genes=names[:2], how="together", **AB)
    assert together.symbol.tolist() == [f"{f.symbol[0]}+{f.symbol[5]}"] and together.n_cells.tolist() == [12] and together.p_value.isna().all()
    assert not np.isnan(together.ci_low[0])


def test_embeddings_of_before_after_and_goal(adata, loaded):
    kw = dict(state="state", start="a", goal="b", device="cpu")
    genes = loaded.vocab.frame.symbol[[0, 5]].tolist()
    cells = perturbed_embeddings(adata, loaded, genes, "delete", **kw)
    assert cells.obs.stage.value_counts().to_dict() == dict(before=12, after=12, goal=10) and cells.obsm["X_mix_geneformer"].shape == (34, 32)
    assert cells.uns["mix_geneformer"]["cosine_shift"] == pytest.approx(perturb(adata, loaded, genes=genes, how="together", **AB).cosine_shift[0], abs=1e-6)
    assert set(cells.obs.state[cells.obs.stage == "after"]) == {"a"} and set(cells.obs.cell[cells.obs.stage == "goal"]) == set(adata.obs_names[12:22])


@pytest.mark.filterwarnings("ignore:rank_correlation")
@pytest.mark.parametrize("orthologs", ["separate", "shared", "tied"])
def test_a_model_directory_and_a_file_suffice(adata, tmp_path, orthologs):
    human = adata.var_names
    mouse = gene_table("human").ortholog[human].replace("", np.nan).dropna()
    both = vocabulary_from_medians({"human": pd.Series(1., index=human), "mouse": pd.Series(1., index=mouse.to_numpy())}, orthologs)
    torch.manual_seed(0)
    path = save_model(build_model(both, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=CONTEXT), both, tmp_path / "model")
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
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "run" / "perturb.csv", na_values=[""], keep_default_na=False), table, check_dtype=False, rtol=1e-12)
    shard = next((tmp_path / "run" / "shards").glob("*.npz"))
    stamp = os.stat(shard).st_mtime_ns
    perturb(adata, loaded, out=tmp_path / "run", **AB)
    assert os.stat(shard).st_mtime_ns == stamp and (tmp_path / "run" / "perturb.csv").read_bytes() == written
    with pytest.raises(InputError, match="holds another perturbation, which differs in 1 of its inputs .mode.: pass another out="):
        perturb(adata, loaded, "inhibit", out=tmp_path / "run", **AB)
    with pytest.raises(InputError, match="cells or weights"): perturb(adata, loaded, out=tmp_path / "run", max_cells=5, **AB)
    note = json.loads((tmp_path / "run" / "perturb.json").read_text())
    assert note["n_start"] == 12 and note["mode"] == "delete" and len(note["fingerprint"]) == 64
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be made .*pass another out="): perturb(adata, loaded, out=tmp_path / "file", **AB)


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
    (dict(min_cells=99), "0 genes are in at least 99 of 12 start cells, the most is 12: lower min_cells or pass genes="),
    (dict(min_cells=99, mode="overexpress"), "0 genes are in at least 99 of 12 start or of the goal cells"),
])
def test_refuses(adata, loaded, given, message):
    with pytest.raises(InputError, match=message): perturb(adata, loaded, **{**AB, **given})


def test_gene_that_no_start_cell_holds(adata, loaded):
    here, absent = loaded.vocab.frame.symbol[:2]
    with pytest.raises(InputError, match=f"{absent} is in 0 of 12 start cells, so there is nothing to delete: pass other genes, or mode='overexpress'"):
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
    with pytest.raises(InputError, match="0 of 12 start cells hold 2 genes of the vocabulary .human., the cells being human: use a model of that species"):
        perturb(poor, loaded, **AB)
