"The reader: its batches against a plain loop, full memory, and what it makes of cells whatever the batch."
from dataclasses import replace

import numpy as np
import pytest
import torch
from perturbed import reader_of, tiny, told

from mix_geneformer.encoder.batches import length_batches
from mix_geneformer.encoder.states import Budget, Reader, _even, _longest_first, _out_of_memory
from mix_geneformer.files import InputError

def one_by_one(lengths, tokens):
    "Shortest first, a sentence at a time: full batches end, and half full ones where the length changes"
    batches, batch, longest = [], [], 0
    for i in np.argsort(lengths, kind="stable"):
        fit = max(1, tokens // lengths[i])
        if batch and (len(batch) >= fit or lengths[i] > longest and 2 * len(batch) >= fit):
            batches.append(batch)
            batch = []
        batch.append(i)
        longest = lengths[i]
    return batches + [batch]


@pytest.mark.parametrize("tokens", [1, 7, 64, 500, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_even_batches_are_those_of_a_plain_loop(seed, tokens):
    rng = np.random.default_rng(seed)
    lengths = np.repeat(rng.integers(1, 60, 9), rng.integers(1, 40, 9))
    batches = _even(lengths, Budget(tokens))
    assert [b.tolist() for b in batches] == [[int(i) for i in b] for b in one_by_one(lengths.tolist(), tokens)]
    for b in batches: assert len(b) == 1 or lengths[b].max() * len(b) <= tokens


def test_cells_by_the_thousand_go_longest_first():
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    ours, plain = _longest_first(lengths, Budget(300, 9)), length_batches(lengths, 9, batch_tokens=300)
    assert [b.tolist() for b in ours] == [b.tolist() for b in plain] and lengths[ours[0]].max() == lengths.max()


@pytest.fixture(scope="module")
def reader(): return reader_of(tiny(62))


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    return told([rng.permutation(np.arange(2, 62))[:n] for n in rng.integers(2, 25, 300)])


def plain_states(reader, cells, i):
    with torch.inference_mode(): return reader.model.bert(torch.tensor([cells[i].tolist()])).last_hidden_state[0]


def test_states_means_and_vectors_are_berts(reader, cells):
    "Three hundred cells: more than are held in memory together"
    by_hand = [plain_states(reader, cells, i) for i in range(len(cells))]
    for ours, plain in zip(reader.states(cells), by_hand): torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    mean, first = torch.stack([h.mean(0) for h in by_hand]), torch.stack([h[0] for h in by_hand])
    for tokens in (1, 100, 4096):
        other = replace(reader, budget=Budget(tokens, 64))
        np.testing.assert_allclose(other.means(cells), mean, atol=1e-5)
        np.testing.assert_allclose(other.vectors(cells), mean, atol=1e-5)
        np.testing.assert_allclose(other.vectors(cells, "first"), first, atol=1e-5)


def test_results_stand_in_the_order_of_the_cells(reader, cells):
    found = dict(replace(reader, budget=Budget(64)).backward(cells, lambda batch, n: n))
    assert [found[i] for i in range(len(cells))] == cells.lengths.tolist()
    np.testing.assert_array_equal(reader.map(lambda b: b["attention_mask"].sum(1), cells), cells.lengths)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_what_one_use_learns_of_memory_the_next_one_knows(reader, cells, error):
    "A device that holds 100 tokens: the budget is halved a few times, once for all that share it"
    tried = []

    def small(batch):
        tried.append(batch["input_ids"].numel())
        if tried[-1] > 100: raise error
        return batch["attention_mask"].sum(1)
    large = replace(reader, budget=Budget(None, 64))
    shared = replace(large, emb_layer=1)
    np.testing.assert_array_equal(large.map(small, cells), cells.lengths)
    assert 25 < shared.budget.tokens <= 100 and 0 < sum(n > 100 for n in tried) < 6
    tried.clear()
    np.testing.assert_array_equal(shared.map(small, cells), cells.lengths)
    assert max(tried) <= 100


def test_a_cell_that_does_not_fit_is_told(reader, cells):
    def full(batch): raise MemoryError
    told = "1 sentence of 24 tokens does not fit into memory .out of memory.: free memory"
    with pytest.raises(InputError, match=told):
        replace(reader, budget=Budget(64)).map(full, cells)


def test_other_failures_pass(reader, cells):
    def wrong(batch): raise RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="shape mismatch"): reader.map(wrong, cells)
    assert not _out_of_memory(RuntimeError("shape mismatch")) and not _out_of_memory(ValueError("out of memory"))


def test_the_budget_of_gradients_is_its_own(reader, cells):
    seen, whole = [], reader_of(reader.model, 400)
    def call(batch, lengths):
        seen.append(batch["input_ids"].numel())
        return lengths
    list(whole.backward(cells, call))
    assert max(seen) <= 100 and whole.budget == Budget(400)


def test_a_reader_without_a_budget_has_that_of_cells(reader):
    assert Reader(reader.loaded).budget == Budget(2**18 // 32, 64)
