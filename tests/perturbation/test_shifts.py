"Batched shifts against a plain loop written from the definition, one perturbation and one token at a time."
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from perturbed import CONTEXT, N_GENES, near, reader_of, shifts_of, tiny, told

from mix_geneformer.encoder.states import Reader
from mix_geneformer.files import InputError, Run
from mix_geneformer.perturbation import shifts
from mix_geneformer.perturbation.edits import HOW, MODES, POSITIONS, Change, all_edits, sample_edits
from mix_geneformer.perturbation.shifts import Towards, cosine, perturbed_means

GENES = np.arange(2, 40)


@pytest.fixture(scope="module")
def model(): return tiny(N_GENES + 2)


@pytest.fixture(scope="module")
def reader(model): return reader_of(model)


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(1)   # lengths 2, 3, 4, one as long as the context, and some between
    return told([rng.permutation(np.arange(2, N_GENES + 2))[:n] for n in (9, 2, CONTEXT, 3, 17, 4, CONTEXT)])


@pytest.fixture(scope="module")
def goal(reader): return reader.means(told([[4, 9, 6], [16, 4, 8, 3]])).mean(0)


def watched(monkeypatch, look):
    "Every batch that is read passes through `look`, which returns what the reader makes of it or raises"
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, batch: look(batch, lambda: read(self, batch)))


def test_a_batch_of_one_length_has_no_mask(reader, cells, goal, monkeypatch):
    seen = []
    watched(monkeypatch, lambda batch, read: seen.append(batch) or read())
    shifts_of(reader, cells.take([0]), GENES, goal)
    assert len(seen) == 2 and not any("attention_mask" in b or "position_ids" in b for b in seen)


# --- the definition ---------------------------------------------------------------------------------------------------

def changed(sentence, genes, mode, context):
    "The new sentence as a list, and where each of its genes was meant to stand"
    s, L = list(map(int, sentence)), len(sentence)
    quarter = max(1, L // 4)
    if mode == "delete": return [t for t in s if t not in genes], {}
    if mode == "overexpress":
        return (list(genes) + [t for t in s if t not in genes])[:context], {g: i for i, g in enumerate(genes)}
    (g,) = genes
    old = s.index(g)
    new = min(old + quarter, L - 1) if mode == "inhibit" else max(old - quarter, 0)
    s.remove(g)
    s.insert(new, g)
    return s, {g: new}


def hidden(model, sentence, places):
    with torch.inference_mode():
        out = model.bert(input_ids=torch.tensor([sentence]), position_ids=torch.tensor([places]))
    return out.last_hidden_state[0].numpy()


def plain_shift(model, sentence, genes, mode, positions, context, goal):
    old = list(map(int, sentence))
    new, placed = changed(sentence, genes, mode, context)
    places = list(range(len(new)))
    if positions == "keep": places = [placed[t] if t in placed else old.index(t) for t in new]
    common = [t for t in new if t in old and t not in genes]
    before, after = hidden(model, old, list(range(len(old)))), hidden(model, new, places)
    before = np.mean([before[old.index(t)] for t in common], axis=0)
    after = np.mean([after[new.index(t)] for t in common], axis=0)
    def cos(a, b): return np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    return cos(after, goal) - cos(before, goal)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_batched_equals_the_definition(model, reader, cells, goal, mode, positions):
    genes = np.arange(2, N_GENES + 2)
    found = shifts_of(reader, cells, genes, goal, mode, positions)
    expected = []
    for i in range(len(cells)):
        for j, g in enumerate(genes.tolist()):
            if mode != "overexpress" and g not in cells[i]: continue
            expected.append((i, j, plain_shift(model, cells[i], [g], mode, positions, CONTEXT, goal)))
    assert found[["cell", "gene"]].values.tolist() == [[i, j] for i, j, _ in expected]
    np.testing.assert_allclose(found["shift"], [x for *_, x in expected], atol=1e-6)
    assert np.abs(found["shift"]).max() > 1e-3   # there is something to compare


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_together_equals_the_definition(model, reader, cells, goal, mode, positions):
    genes = np.array([5, 40, 33, 12])
    found = shifts_of(reader, cells, genes, goal, mode, positions, "together")
    for _, row in found.iterrows():
        cell = cells[int(row.cell)]
        held = [int(g) for g in genes if mode == "overexpress" or g in cell]
        assert abs(row["shift"] - plain_shift(model, cell, held, mode, positions, CONTEXT, goal)) < 1e-6
    assert len(found) == sum(mode == "overexpress" or bool(set(genes) & set(cells[i])) for i in range(len(cells)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", MODES)
def test_neighbours_padding_and_batch_size_do_not_matter(model, reader, cells, goal, mode, how):
    whole = shifts_of(reader, cells, GENES, goal, mode, how=how)
    for tokens in (1, 50, 10**6): near(whole, shifts_of(reader_of(model, tokens), cells, GENES, goal, mode, how=how))
    alone = [shifts_of(reader, cells.take([i]), GENES, goal, mode, how=how).assign(cell=i) for i in range(len(cells))]
    near(whole, pd.concat(alone, ignore_index=True))


def test_last_and_first_token(reader, cells, goal):
    for i in range(2, len(cells)):
        cell = cells.take([i])
        first, last = cell[0][:1], cell[0][-1:]
        def shift(gene, mode, positions): return shifts_of(reader, cell, gene, goal, mode, positions)["shift"][0]
        # no later token to move
        assert abs(shift(last, "delete", "keep") - shift(last, "delete", "shift")) < 1e-6
        for positions in POSITIONS:
            for gene, mode in ((last, "inhibit"), (first, "activate"), (first, "overexpress")):
                assert abs(shift(gene, mode, positions)) < 1e-6   # already there


def test_kept_positions_ignore_the_order_of_the_batch_rows(model, reader):
    s = told([[7, 3, 9, 5]])
    m = next(perturbed_means(reader, s, all_edits(s, np.array([9]), Change(positions="keep"))))
    np.testing.assert_allclose(m.after[0], hidden(model, [5, 7, 3], [3, 0, 1]).mean(0), atol=1e-5)


def test_species_of_a_tied_vocabulary_reach_the_encoder(model, reader, cells, goal):
    tied, species = reader_of(model, orthologs="tied"), np.array((["human", "mouse"] * 4)[:len(cells)])
    alike = [cells[i] for i in range(len(cells))]
    both = shifts_of(tied, told(alike, species), GENES, goal)
    for s in ("human", "mouse"):
        rows = np.flatnonzero(species == s)
        part = shifts_of(tied, told([alike[i] for i in rows], s), GENES, goal)
        np.testing.assert_allclose(part["shift"], both[both.cell.isin(rows)]["shift"], atol=1e-6)
    assert np.abs(shifts_of(reader, cells, GENES, goal)["shift"] - both["shift"]).max() > 1e-4


def test_bfloat16_encoder_keeps_float64_means(model, cells, goal):
    m = next(perturbed_means(reader_of(model, bf16=True), cells, all_edits(cells, GENES, Change())))
    assert m.before.dtype == m.after.dtype == cosine(m.after, goal).dtype == torch.float64


def test_killed_run_resumes(reader, cells, goal, tmp_path, monkeypatch):
    cut, calls = shifts._cell_blocks, []
    monkeypatch.setattr(shifts, "_cell_blocks", lambda lengths, rows: cut(lengths, rows, most_cells=2))
    whole = shifts_of(reader, cells, GENES, goal)

    def dies(batch, read):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return read()
    with monkeypatch.context() as m:
        watched(m, dies)
        with pytest.raises(KeyboardInterrupt): shifts_of(reader, cells, GENES, goal, run=Run(tmp_path, "abc", {}))
    parts = tmp_path/"shards"
    assert 0 < len(list(parts.glob("*.npz"))) < 4 and not list(parts.glob("*.partial"))
    near(shifts_of(reader, cells, GENES, goal, run=Run(tmp_path, "abc", {})), whole)
    assert len(list(parts.glob("*.npz"))) == 4


# --- layers, memory and precision -------------------------------------------------------------------------------------

def test_layer_is_the_last_that_is_run(model, cells, goal):
    hooks = []
    def never(*a): raise AssertionError("the layer above was run")
    for block in model.bert.encoder.layer[1:]: hooks.append(block.output.register_forward_hook(never))
    hooks.append(model.cls.register_forward_hook(never))
    try: found = shifts_of(reader_of(model, emb_layer=1), cells, GENES, goal)
    finally:
        for h in hooks: h.remove()
    short = tiny(N_GENES + 2)
    short.load_state_dict(model.state_dict())
    short.bert.encoder.layer = short.bert.encoder.layer[:1]
    near(found, shifts_of(reader_of(short), cells, GENES, goal))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_batches_that_do_not_fit_are_halved(model, reader, cells, goal, monkeypatch, error):
    whole, large, sizes = shifts_of(reader, cells, GENES, goal), reader_of(model, 10**6), []

    def small(batch, read):
        sizes.append(batch["input_ids"].numel())
        if sizes[-1] > 100: raise error
        return read()

    def full(batch, read): raise error
    with monkeypatch.context() as m:
        watched(m, small)
        near(shifts_of(large, cells, GENES, goal), whole)
    assert 25 < large.budget.tokens <= 100 and max(sizes) > 100
    assert sum(n > 100 for n in sizes) < 6   # it is not tried again and again
    watched(monkeypatch, full)
    with pytest.raises(InputError, match="1 sentence of .* tokens does not fit into memory .*: free memory"):
        shifts_of(large, cells, GENES, goal)


def test_other_failures_are_not_taken_for_a_lack_of_memory(reader, cells, goal, monkeypatch):
    def wrong(batch, read): raise RuntimeError("shape mismatch")
    watched(monkeypatch, wrong)
    with pytest.raises(RuntimeError, match="shape mismatch"): shifts_of(reader, cells, GENES, goal)


def test_a_sample_is_computed_exactly(reader, cells, goal):
    edits = all_edits(cells, GENES, Change("overexpress", context=CONTEXT))
    towards = Towards(reader, cells, goal)
    sample = pd.DataFrame(towards.shifts(sample_edits(edits, 50, seed=3)))
    both = sample.merge(towards.all_shifts(edits), on=["cell", "gene"])
    assert len(sample) == len(both) == 50 and not sample.duplicated(["cell", "gene"]).any()
    np.testing.assert_allclose(both.shift_x, both.shift_y, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_same(mode, positions):
    rng, model = np.random.default_rng(2), tiny(202, 128, spread=.02)
    cells = told([rng.permutation(np.arange(2, 202))[:n] for n in rng.integers(60, 120, 12)])
    goal = reader_of(model).means(told([rng.permutation(np.arange(2, 202))[:50] for _ in range(3)])).mean(0)
    def run(reader): return shifts_of(reader, cells, np.arange(2, 202), goal, mode, positions)["shift"]
    np.testing.assert_allclose(run(reader_of(copy.deepcopy(model).cuda(), 10_000)), run(reader_of(model)), atol=1e-6)
