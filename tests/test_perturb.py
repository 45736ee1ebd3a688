"In silico perturbation: batched against a plain loop written from the definition, the verb, and what it refuses."
import copy, json, os, re, sys
from types import SimpleNamespace

import anndata as ad, numpy as np, pandas as pd, pytest, scipy.sparse as sp, torch
from scipy.stats import false_discovery_control, ranksums, ttest_rel
from transformers import BertConfig, BertForMaskedLM

from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.files import InputError
from mix_geneformer.encoder.checkpoints import load_model, save_model
from mix_geneformer.encoder.model import build_model, encode
from mix_geneformer.encoder.states import out_of_memory
from mix_geneformer.encoder.states import TokenBudget, goal_mean
from mix_geneformer.perturbation.edits import HOW, MODES, POSITIONS, all_parts, permuted, sample_parts
from mix_geneformer.perturbation.screening import constant_keys, cosine_gradient, screen_shifts
from mix_geneformer.perturbation.shifts import all_shifts, cosine, part_shifts, perturbed_means
from mix_geneformer.perturbation.summary import summarise, warn_rank
from mix_geneformer.perturbation.verb import perturb, perturbed_embeddings
from mix_geneformer.statistics import like_genes, matched_p

N_GENES, CONTEXT = 60, 24


def tiny(size, context=CONTEXT, types=2, spread=.5):
    "Random weights; with a spread of 0.5 attention is peaked and shifts are large, with BERT's 0.02 a gene is a small change"
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                      max_position_embeddings=context, type_vocab_size=types, initializer_range=spread)).eval()


@pytest.fixture(scope="module")
def model(): return tiny(N_GENES + 2)


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(1)   # lengths 2, 3, 4, one as long as the context, and some between
    return [rng.permutation(np.arange(2, N_GENES + 2))[:n] for n in (9, 2, CONTEXT, 3, 17, 4, CONTEXT)]


@pytest.fixture(scope="module")
def goal(model): return goal_mean(model, [np.array([4, 9, 6]), np.array([16, 4, 8, 3])]).mean(0)


# the sentences: index arithmetic on the device against the plain definition, which sorts keys in numpy

def plain_source(length, at, mode):
    "Each token's key is twice its position; a moved gene has the odd key just past the place it goes to"
    k, G = at.shape
    quarter = max(1, length // 4)
    keys = np.repeat(np.arange(0, 2 * length, 2)[None], k, axis=0)
    moved = {"delete": np.full_like(at, 2 * length), "overexpress": np.broadcast_to(2 * (np.arange(G) - G), at.shape),
             "inhibit": 2 * (at + quarter) + 1, "activate": 2 * (at - quarter) - 1}[mode]
    np.put_along_axis(keys, at, moved, axis=1)
    return np.argsort(keys, axis=1, kind="stable")[:, :length - G if mode == "delete" else length]


def plain_permuted(tokens, genes, at, mode, positions, context):
    "input_ids, position_ids, tokens compared in the new and in the old sentence"
    k, L, absent = len(at), len(tokens), at < 0
    added = int(absent[0].sum())
    at = np.where(absent, L + np.cumsum(absent, axis=1) - 1, at)
    full = np.hstack([np.repeat(tokens[None], k, axis=0), genes[absent].reshape(k, added)])
    source = plain_source(L + added, at, mode)[:, :context]
    changed = np.zeros(full.shape, bool)
    np.put_along_axis(changed, at, True, axis=1)
    after, before = ~np.take_along_axis(changed, source, axis=1), np.zeros(full.shape, bool)
    np.put_along_axis(before, source, after, axis=1)
    place = np.repeat(np.arange(source.shape[1])[None], k, axis=0)
    if positions == "keep":
        quarter, own = max(1, L // 4), np.repeat(np.arange(L + added)[None], k, axis=0)
        new = {"overexpress": np.broadcast_to(np.arange(at.shape[1]), at.shape), "inhibit": np.minimum(at + quarter, L - 1),
               "activate": np.maximum(at - quarter, 0), "delete": at}[mode]
        np.put_along_axis(own, at, new, axis=1)
        place = np.take_along_axis(own, source, axis=1)
    return np.take_along_axis(full, source, axis=1), place, after, before[:, :L]


def but(shape, out):
    "True everywhere but at `out`, of which those beyond the end are not meant"
    m = np.ones((shape[0], max(shape[1], out.max(initial=0) + 1)), bool)
    np.put_along_axis(m, out, False, axis=1)
    return m[:, :shape[1]]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("L", [2, 3, 5, 16, 41])
def test_sentences_are_the_plain_ones(L, mode, positions):
    rng = np.random.default_rng(L)
    tokens = rng.permutation(np.arange(2, 200))[:L]
    panel = np.r_[tokens, 300:305]
    for context in (None, L, L + 1, L + 3):
        for how, genes in [("each", panel), *(("together", rng.permutation(panel)[:n]) for n in (2, 3, L, len(panel)))]:
            for _, _, g, at in all_parts([tokens], genes, mode, how):
                ids, place, after, before = plain_permuted(tokens, g, at, mode, positions, context)
                new = {k: None if v is None else v.numpy() for k, v in permuted(torch.from_numpy(tokens), g, at, mode, positions, context).items()}
                np.testing.assert_array_equal(new["input_ids"], ids)
                np.testing.assert_array_equal(np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if new["position_ids"] is None else new["position_ids"], place)
                np.testing.assert_array_equal(but(after.shape, new["own"]), after)
                if after.any(): np.testing.assert_array_equal(but(before.shape, new["left"]), before)
                assert (before.sum(1) == ids.shape[1] - new["own"].shape[1]).all() or not after.any()


def test_a_batch_of_one_length_has_no_mask(model, cells, goal, monkeypatch):
    module, seen = sys.modules[perturbed_means.__module__], []
    encode = module.encode_tokens
    monkeypatch.setattr(module, "encode_tokens", lambda m, batch, *a: seen.append(batch) or encode(m, batch, *a))
    all_shifts(model, cells[:1], np.arange(2, 40), goal)
    assert len(seen) == 2 and not any("attention_mask" in b or "position_ids" in b for b in seen)


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
    s = np.array([7, 3, 9, 5])
    m = next(perturbed_means(model, [s], all_parts([s], np.array([9]), "delete"), "delete", "keep", CONTEXT))
    np.testing.assert_allclose(m["after"][0], hidden(model, [5, 7, 3], [3, 0, 1]).mean(0), atol=1e-5)


def test_species_of_a_tied_vocabulary_reach_the_encoder(model, cells, goal):
    genes, types = np.arange(2, 40), np.array([0, 1] * 4)[:len(cells)]
    both = all_shifts(model, cells, genes, goal, types=types)
    for t in (0, 1):
        rows = np.flatnonzero(types == t)
        part = all_shifts(model, [cells[i] for i in rows], genes, goal, types=np.full(len(rows), t))
        np.testing.assert_allclose(part["shift"], both[both.cell.isin(rows)]["shift"], atol=1e-6)
    assert np.abs(all_shifts(model, cells, genes, goal)["shift"] - both["shift"]).max() > 1e-4


def test_bfloat16_encoder_keeps_float64_means(model, cells, goal):
    m = next(perturbed_means(model, cells, all_parts(cells, np.arange(2, 40), "delete"), "delete", bf16=True))
    assert m["before"].dtype == m["after"].dtype == cosine(m["after"], goal).dtype == torch.float64


def test_killed_run_resumes(model, cells, goal, tmp_path, monkeypatch):
    module = sys.modules[all_shifts.__module__]
    cut, calls = module.cell_blocks, []
    monkeypatch.setattr(module, "cell_blocks", lambda lengths, rows: cut(lengths, rows, most_cells=2))
    encode = module.encode_tokens

    def dies(*a, **k):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return encode(*a, **k)
    genes = np.arange(2, 40)
    whole = all_shifts(model, cells, genes, goal)
    monkeypatch.setattr(module, "encode_tokens", dies)
    with pytest.raises(KeyboardInterrupt): all_shifts(model, cells, genes, goal, shards=tmp_path)
    left = len(list(tmp_path.glob("*.npz")))
    assert 0 < left < 4 and not list(tmp_path.glob("*.partial"))
    pd.testing.assert_frame_equal(all_shifts(model, cells, genes, goal, shards=tmp_path), whole, rtol=0, atol=1e-6)


# layers, memory and precision

def test_layer_is_the_last_that_is_run(model, cells, goal):
    genes, hooks = np.arange(2, 40), []
    def never(*a): raise AssertionError("the layer above was run")
    for block in model.bert.encoder.layer[1:]: hooks.append(block.output.register_forward_hook(never))
    hooks.append(model.cls.register_forward_hook(never))
    try: found = all_shifts(model, cells, genes, goal, layer=1)
    finally:
        for h in hooks: h.remove()
    short = tiny(N_GENES + 2)
    short.load_state_dict(model.state_dict())
    short.bert.encoder.layer = short.bert.encoder.layer[:1]
    pd.testing.assert_frame_equal(found, all_shifts(short, cells, genes, goal), rtol=0, atol=1e-6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_batches_that_do_not_fit_are_halved(model, cells, goal, monkeypatch, error):
    module, genes, sizes = sys.modules[all_shifts.__module__], np.arange(2, 40), []
    whole, encode, budget = all_shifts(model, cells, genes, goal), module.encode_tokens, TokenBudget(10**6)
    def small(m, batch, *a):
        sizes.append(batch["input_ids"].numel())
        if sizes[-1] > 100: raise error
        return encode(m, batch, *a)
    monkeypatch.setattr(module, "encode_tokens", small)
    pd.testing.assert_frame_equal(all_shifts(model, cells, genes, goal, budget=budget), whole, rtol=0, atol=1e-6)
    assert 25 < budget.tokens <= 100 and max(sizes) > 100 and sum(n > 100 for n in sizes) < 6   # it is not tried again and again
    monkeypatch.setattr(module, "encode_tokens", lambda *a: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match="1 sentence of .* tokens does not fit into memory .*: free memory"): all_shifts(model, cells, genes, goal)


def test_other_failures_are_not_taken_for_a_lack_of_memory(model, cells, goal, monkeypatch):
    assert not out_of_memory(RuntimeError("shape mismatch")) and not out_of_memory(ValueError("out of memory"))
    monkeypatch.setattr(sys.modules[all_shifts.__module__], "encode_tokens", lambda *a: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"): all_shifts(model, cells, np.arange(2, 40), goal)


def test_sample_is_drawn_evenly_and_computed_exactly(model, cells, goal):
    genes = np.arange(2, 40)
    parts, whole = all_parts(cells, genes, "overexpress"), all_shifts(model, cells, genes, goal, "overexpress", context=CONTEXT)
    sample = pd.DataFrame(part_shifts(model, cells, sample_parts(parts, 50, seed=3), goal, "overexpress", context=CONTEXT))
    both = sample.merge(whole, on=["cell", "gene"])
    assert len(sample) == len(both) == 50 and not sample.duplicated(["cell", "gene"]).any()
    np.testing.assert_allclose(both.shift_x, both.shift_y, atol=1e-6)
    assert sum(len(p[1]) for p in sample_parts(parts, 10**9)) == len(whole)
    n = np.bincount(np.concatenate([np.repeat(p[0], len(p[1])) for seed in range(200) for p in sample_parts(parts, 7, seed)]), minlength=len(cells))
    assert n.sum() == 1400 and n.min() > 140   # seven cells of as many perturbations


# screening

@pytest.fixture(scope="module")
def wider():
    "Longer sentences"
    rng, model = np.random.default_rng(2), tiny(202, 128, spread=.02)
    cells = [rng.permutation(np.arange(2, 202))[:n] for n in rng.integers(60, 120, 12)]
    return model, cells, goal_mean(model, [rng.permutation(np.arange(2, 202))[:50] for _ in range(3)]).mean(0)


def both_ways(model, cells, goal, mode, positions):
    genes = np.arange(2, 202)
    parts = [p for p in all_parts(cells, genes, mode) if (p[3] >= 0).all()]
    exact = pd.DataFrame(part_shifts(model, cells, parts, goal, mode, positions, 128))
    return pd.DataFrame(screen_shifts(model, cells, parts, goal, mode)).merge(exact, on=["cell", "gene"])


@pytest.mark.parametrize("mode, least", [("delete", .97), ("overexpress", .8), ("inhibit", .85), ("activate", .85)])   # the others change a whole position embedding
def test_screened_shifts_follow_the_exact_ones(wider, mode, least):
    assert both_ways(*wider, mode, "keep")[["screened", "shift"]].corr("spearman").iloc[0, 1] > least


def test_gate_gradient_is_the_finite_difference(wider):
    model, cells, goal = wider
    model, ids, goal = copy.deepcopy(model).double(), torch.from_numpy(cells[0])[None], torch.from_numpy(goal).double()
    def cos(i, gate):
        bias = torch.zeros(ids.shape, dtype=torch.float64)
        bias[0, i] = np.log(gate)
        with torch.no_grad(): return cosine(encode(model, dict(input_ids=ids, key_bias=bias)).mean(1), goal).item()
    slope = cosine_gradient(model, dict(input_ids=ids), "key_bias", torch.zeros(ids.shape, dtype=torch.float64), goal)[0]
    for i in (0, 7, ids.shape[1] - 1): assert slope[i].item() == pytest.approx((cos(i, 1.001) - cos(i, .999)) / .002, rel=1e-4)


def test_own_state_is_left_out_of_the_gradient(wider):
    "The gradient through the own state alone is that of a sentence whose other tokens do not see the change"
    model, cells, goal = wider
    model, ids, goal = copy.deepcopy(model).double(), torch.from_numpy(cells[0][:20])[None], torch.from_numpy(goal).double()
    words = model.bert.embeddings.word_embeddings(ids).detach()
    def hidden(x): return encode(model, dict(inputs_embeds=x))
    base = hidden(words).mean(1)
    with constant_keys(model): own = cosine_gradient(model, dict(input_ids=ids), "inputs_embeds", words, goal)
    step = torch.zeros_like(words)
    step[0, 4] = torch.randn(words.shape[-1], generator=torch.manual_seed(0)) * 1e-4
    with torch.no_grad(): change = hidden(words + step) - hidden(words)
    moved = cosine(base + change[:, 4] / 20, goal) - cosine(base, goal)
    assert (own * step).sum().item() == pytest.approx(moved.item(), rel=.1)   # its own key is one of twenty
    with torch.no_grad(): assert torch.equal(hidden(words), hidden(words))
    assert not any(m._forward_hooks for m in model.modules())


def test_screening_misses_few_genes(wider):
    gene = both_ways(*wider, "delete", "keep").groupby("gene")[["screened", "shift"]].mean()
    assert len(set(gene["shift"].nlargest(10).index) & set(gene["screened"].nlargest(20).index)) >= 9


def test_screening_of_shifted_positions_is_no_use(wider):
    assert both_ways(*wider, "delete", "shift")[["screened", "shift"]].corr("spearman").iloc[0, 1] < .6


def test_screened_shifts_do_not_depend_on_the_batch(wider):
    model, cells, goal = wider
    parts = all_parts(cells, np.arange(2, 202), "inhibit")
    whole = pd.DataFrame(screen_shifts(model, cells, parts, goal, "inhibit"))
    pd.testing.assert_frame_equal(whole, pd.DataFrame(screen_shifts(model, cells, parts, goal, "inhibit", budget=1)), rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_same(wider, mode, positions):
    model, cells, goal = wider
    run = lambda m, **kw: all_shifts(m, cells, np.arange(2, 202), goal, mode, "each", positions, 128, **kw)
    np.testing.assert_allclose(run(copy.deepcopy(model).cuda(), budget=10_000)["shift"], run(model)["shift"], atol=1e-6)


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


def test_the_donor_test_is_a_paired_t_test_and_copies_of_cells_do_not_sharpen_it():
    shifts, about = simulated()
    donors = np.array(["a", "b", "c"] * 4)
    table = summarise(shifts, about, donors=donors).set_index("symbol")
    mean, usual = shifts.groupby(["gene", donors[shifts.cell]])["shift"].mean().unstack(), shifts.groupby(donors[shifts.cell])["shift"].mean()
    np.testing.assert_allclose(table.p_donor, [ttest_rel(mean.loc[int(g[1:])], usual).pvalue for g in table.index], rtol=1e-9)
    many = pd.concat([shifts.assign(cell=shifts.cell + 12 * i) for i in range(20)], ignore_index=True)
    copied = summarise(many, about, donors=np.tile(donors, 20)).set_index("symbol").loc[table.index]
    np.testing.assert_allclose(copied.p_donor, table.p_donor, rtol=1e-6)
    assert (copied.p_value < table.p_value).mean() > .9
    assert "p_donor" not in summarise(shifts, about, donors=["a", "b"] * 6)


def test_like_genes_are_the_nearest_others():
    rng = np.random.default_rng(0)
    rank, seen = rng.uniform(1, 99, 40), rng.uniform(.1, 1, 40)
    xy = np.column_stack([rank, np.log(seen)])
    far = np.linalg.norm(((xy - xy.mean(0)) / xy.std(0))[:, None] - ((xy - xy.mean(0)) / xy.std(0))[None], axis=-1)
    np.fill_diagonal(far, np.inf)
    np.testing.assert_array_equal(like_genes(rank, seen, 5), np.argsort(far, 1)[:, :5])
    same = like_genes(np.ones(9), np.ones(9), 4)   # all alike: any others will do
    assert same.shape == (9, 4) and not (same == np.arange(9)[:, None]).any()


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
                                      "mean_rank", "detection", "rank", "p_donor", "shift_d0", "shift_d1", "shift_d2"]
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


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_screened_table_holds_exact_numbers(adata, loaded, tmp_path, capsys):
    kw, loaded = dict(AB, positions="keep", screen_sample=60), SimpleNamespace(model=tiny(len(loaded.vocab), spread=.02), vocab=loaded.vocab, context=CONTEXT)
    exact, table = perturb(adata, loaded, **{**AB, "positions": "keep"}), perturb(adata, loaded, screen=.2, **kw)
    assert table.columns.tolist() == [*exact.columns, "screened"] and len(table) == len(exact) and table.screened.notna().all()
    done, rest = table[table.n_cells > 0], table[table.n_cells == 0]
    assert len(done) == table.attrs["n_rechecked"] == np.ceil(.2 * len(exact)) and rest.index.min() == len(done)
    assert done["rank"].tolist() == list(range(1, len(done) + 1)) and rest[["rank", "cosine_shift", "p_value", "fdr", "ci_low"]].isna().all(None)
    same = exact.set_index("ensembl_id").loc[done.ensembl_id]
    np.testing.assert_allclose(done.cosine_shift, same.cosine_shift, atol=1e-6)
    np.testing.assert_array_equal(done.n_cells, same.n_cells)
    assert done.p_value.between(0, 1).all() and (done.fdr >= done.p_value).all() and table.p_empirical.isna().all()
    assert table.attrs["n_sample"] == 60 and .9 < table.attrs["screen_correlation"] <= 1
    json.dumps(table.attrs)
    whole = perturb(adata, loaded, screen=1, **kw).set_index("ensembl_id")
    np.testing.assert_allclose(whole.cosine_shift[exact.ensembl_id], exact.cosine_shift, atol=1e-6)
    out = dict(kw, out=tmp_path / "run", screen=.2)
    pd.testing.assert_frame_equal(perturb(adata, loaded, **out), table)
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "run" / "shards").iterdir()}
    assert {"sample.npz", "screened.npz"} < {f.name for f in stamps}
    pd.testing.assert_frame_equal(perturb(adata, loaded, **{**out, "progress": True}), table)   # resumed, nothing is computed again
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    assert "60 random ones agree with exact shifts to a correlation of" in capsys.readouterr().out


@pytest.mark.parametrize("given, message", [
    (dict(screen=2), "screen=2 is not a share of the genes between 0 and 1: pass screen=0.1"),
    (dict(screen=.1, how="together"), "screen=0.1 ranks genes one by one, and how='together' makes 1 perturbation per cell: pass how='each' or screen=None"),
    (dict(screen=.1, mode="overexpress"), "overexpressions put a gene into a cell that lacks it, which has no gradient to screen by: pass screen=None, or genes="),
    (dict(screen=.1), "random perturbations correlate only by .* .screen_min_correlation=0.8.: pass screen=None, or positions='keep'"),
    (dict(screen=.1, positions="keep", screen_min_correlation=2), "random perturbations correlate only by .*: pass screen=None$"),
    (dict(layer=3), "layer=3 is none of the 2 layers of this model: pass 1 to 2"),
])
def test_refuses_to_screen(adata, loaded, given, message, tmp_path):
    with pytest.raises(InputError, match=message): perturb(adata, loaded, **{**AB, **given})
    with pytest.raises(InputError, match=message): perturb(adata, loaded, **{**AB, **given}, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())   # so that the remedy can use the folder


def test_overexpression_is_screened_where_every_cell_holds_the_genes(adata, loaded):
    table = perturb(adata, loaded, "overexpress", genes=[loaded.vocab.frame.symbol[0]], positions="keep", screen=1, screen_min_correlation=-1, **AB)
    assert table.n_cells.tolist() == [12] and table.screened.notna().all()


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_bf16_agreement_is_noted(adata, loaded, monkeypatch):
    kw, module = dict(AB, positions="keep", screen_sample=80), sys.modules[all_shifts.__module__]
    table = perturb(adata, loaded, bf16=True, **kw)
    found = table.attrs["bf16_agreement"]
    assert found["n"] == 80 and 0 < found["max_difference"] < .1 and .9 < found["spearman"] < 1
    assert np.abs(table.set_index("symbol").cosine_shift - perturb(adata, loaded, **kw).set_index("symbol").cosine_shift).max() < .01
    assert "bf16_agreement" not in perturb(adata, loaded, **kw).attrs
    monkeypatch.setattr(module, "encode", lambda *a: encode(*a).flip(0) if torch.is_autocast_enabled("cpu") else encode(*a))   # a device that confuses cells
    with pytest.warns(UserWarning, match="bf16_agreement is .*: the shifts of 80 random perturbations in bfloat16 differ from float32 by up to .*; pass bf16=False"):
        perturb(adata, loaded, bf16=True, **kw)


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_time_is_told_before_it_starts(adata, loaded, capsys):
    table = perturb(adata, loaded, batch_tokens=24, **{**AB, "progress": True})
    n, rate, time = re.search(r"about ([\d,]+) perturbations, ([\d,]+)/s, about (\d\d:\d\d)", capsys.readouterr().out).groups()
    assert int(n.replace(",", "")) == table.attrs["n_perturbations"]


@pytest.mark.filterwarnings("ignore:rank_correlation")
def test_genes_that_leave_nothing_to_compare(adata, loaded):
    poor = adata.copy()
    poor.X = sp.csr_matrix(np.eye(2, N_GENES, dtype=np.float32).sum(0, keepdims=True).repeat(24, 0) * 5)
    with pytest.raises(InputError, match="0 of 12 perturbations leave a cell another gene to look at: pass fewer genes"):
        perturb(poor, loaded, genes=loaded.vocab.frame.symbol[:2].tolist(), how="together", **AB)
