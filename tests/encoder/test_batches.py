"Batches hold every cell once, like lengths together, within a budget; what is masked of a cell is its own."
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refused, toy
from programmes import CONTEXT, four_programmes

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import Sentences, sentences_of
from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.encoder.batches import MaskedBatches, MixedBatches, length_batches, prefetched
from mix_geneformer.encoder.masking import mask_tokens

def unpacked(batch, i):
    "What one row of a batch of `MaskedBatches` says: tokens, predicted positions, their tokens"
    used = batch["labels"][i] != -100
    return (
        batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist(),
        batch["masked"][i][used].tolist(),
        batch["labels"][i][used].tolist(),
    )


def test_masking_of_a_cell_does_not_depend_on_its_batch(vocab):
    s = encode_cells(toy(), vocab, 24)
    seen = []
    for size in (1, 4, 24, None):
        b = MaskedBatches(s, vocab, size or 4, 24, seed=3, batch_tokens=None if size else 100)
        seen.append(
            {int(i): unpacked(c, k) for idx in b.plan(2) for c in [b.collate(idx, 2)] for k, i in enumerate(idx)}
        )
    assert seen[0] == seen[1] == seen[2] == {**seen[0], **seen[3]} and len(seen[0]) == 24 and len(seen[3]) > 12
    # the plain way: one cell by itself
    for i, (ids, at, labels) in seen[0].items():
        masked, chosen = mask_tokens(s[i], [len(s[i])], [i], len(vocab), 2, (3, 2))
        assert masked.tolist() == ids and np.flatnonzero(chosen).tolist() == at and s[i][chosen].tolist() == labels
    other = MaskedBatches(s, vocab, 4, 24, seed=4)
    draw = lambda *key: [mask_tokens(s[i], [len(s[i])], [i], len(vocab), 2, key)[0].tolist() for i in range(24)]
    assert draw(3, 2) != draw(3, 1) and draw(3, 2) != draw(4, 2) and other.steps == 6
    # every cell teaches something
    assert all((c["labels"] != -100).any(1).all() for c in other.epoch(0))


def test_batches_hold_every_cell_once():
    n = np.random.default_rng(0).integers(1, 99, 101)
    for seed in (None, 0, 7): assert np.sort(np.concatenate(length_batches(n, 8, seed))).tolist() == list(range(101))
    assert sum(len(b) for b in length_batches(n, 8, 0, drop_last=True)) == 96


def test_token_budget_holds(vocab):
    rng = np.random.default_rng(0)
    n = rng.integers(1, 200, 500)
    for seed in (None, 0, 7):
        for most in (None, 16):
            plan = length_batches(n, most, seed, batch_tokens=1_000)
            assert (
                np.sort(np.concatenate(plan)).tolist() == list(range(500))
                and max(len(b) * n[b].max() for b in plan) <= 1_000
                and max(map(len, plan)) <= (most or 500)
            )
    # a cell above the budget stands alone
    assert [len(b) for b in length_batches([900, 5_000, 100], batch_tokens=1_000)] == [1, 1, 1]
    s = encode_cells(toy(), vocab, 24)
    b = MaskedBatches(s, vocab, 4, 24, batch_tokens=120)
    assert (
        sum(len(c["labels"]) for c in b.epoch(0)) >= 20
        and max(c["input_ids"].numel() for c in b.epoch(0)) <= 120
        and {len(c["labels"]) for c in b.epoch(0)} <= {4, 2}
    )
    # processes step together
    assert [len(c["labels"]) for c in b.epoch(0, rank=0, world=2)] == [
        len(c["labels"]) for c in b.epoch(0, rank=1, world=2)
    ]
    for m in (2, 8):
        assert all(
            len(c) % m == 0 or len(c) in (1, 2, 4)
            for c in length_batches(n, seed=1, batch_tokens=2_000, multiple=m, drop_last=True)
        )


def test_the_window_says_how_like_the_lengths_of_a_batch_are(vocab):
    n = np.random.default_rng(0).integers(1, 2_000, 640)
    spread = {}
    for window in (1, 5, 50):
        plan = length_batches(n, 16, seed=1, window=window, drop_last=True)
        assert np.sort(np.concatenate(plan)).tolist() == list(range(640)) and {len(b) for b in plan} == {16}
        spread[window] = np.mean([np.ptp(n[b]) for b in plan])
    assert spread[50] < spread[5] < spread[1] and spread[1] > 0.8 * np.mean(
        [np.ptp(n[b]) for b in np.split(np.random.default_rng(1).permutation(640), 40)]
    )
    lengths = n[:64] % 23 + 1
    s = Sentences(np.full(lengths.sum(), 5, np.uint16), np.append(0, np.cumsum(lengths)), "human")
    made, like, random = (
        [b.tolist() for b in MaskedBatches(s, vocab, 4, 24, **how).plan(0)]
        for how in ({}, dict(length_window=50), dict(length_window=1))
    )
    assert made == like != random
    refused(lambda: MaskedBatches(s, vocab, 4, 24, length_window=0), "length_window=0")


def test_prefetched_batches_are_the_batches(corpus, vocab):
    batches = MaskedBatches(sentences_of(load_corpus(corpus)), vocab, 8, 24, seed=1)
    for a, b in zip(batches.epoch(1), prefetched(batches.epoch(1)), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)

    def broken(): yield 1; raise RuntimeError("disk gone")
    with pytest.raises(RuntimeError, match="disk gone"): list(prefetched(broken()))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_that_two_processes_cannot_share(corpus, vocab, batch_size):
    batches = MaskedBatches(sentences_of(load_corpus(corpus)), vocab, batch_size, 24)
    refused(lambda: next(batches.epoch(0, rank=1, world=2)), f"batch_size={batch_size}", "2 processes")
    refused(
        lambda: list(
            MaskedBatches(sentences_of(load_corpus(corpus)), vocab, 8, 24, batch_tokens=30).epoch(0, rank=1, world=2)
        ),
        "batch_tokens=30",
        "2 processes",
    )


def test_two_processes_have_equal_shares():
    vocab, s = four_programmes()
    study = np.where(np.arange(240) < 200, "a", "b").astype(object)
    b = MixedBatches(s, vocab, 16, CONTEXT, study, pd.Series(dict(a=0.31, b=0.69)), 160)
    for epoch in range(4):
        one, two = ([x["input_ids"].shape[0] for x in b.epoch(epoch, rank=r, world=2)] for r in (0, 1))
        assert one == two == [8] * b.steps
