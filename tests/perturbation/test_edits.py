"The changed sentences: index arithmetic on the device against the plain definition, which sorts keys in numpy."
import numpy as np
import pytest
import torch
from perturbed import CONTEXT, N_GENES, told

from mix_geneformer.perturbation.edits import MODES, POSITIONS, Change, all_edits, sample_edits

def plain_source(length, at, mode):
    "Each token's key is twice its position; a moved gene has the odd key just past the place it goes to"
    k, G = at.shape
    quarter = max(1, length // 4)
    keys = np.repeat(np.arange(0, 2 * length, 2)[None], k, axis=0)
    first = np.broadcast_to(2 * (np.arange(G) - G), at.shape)
    moved = dict(delete=np.full_like(at, 2 * length), overexpress=first,
                 inhibit=2 * (at + quarter) + 1, activate=2 * (at - quarter) - 1)[mode]
    np.put_along_axis(keys, at, moved, axis=1)
    return np.argsort(keys, axis=1, kind="stable")[:, :length - G if mode == "delete" else length]


def plain_places(length, added, at, source, mode):
    "Position ids where the others keep theirs"
    quarter, own = max(1, length // 4), np.repeat(np.arange(length + added)[None], len(at), axis=0)
    new = dict(overexpress=np.broadcast_to(np.arange(at.shape[1]), at.shape), delete=at,
               inhibit=np.minimum(at + quarter, length - 1), activate=np.maximum(at - quarter, 0))[mode]
    np.put_along_axis(own, at, new, axis=1)
    return np.take_along_axis(own, source, axis=1)


def plain_permuted(tokens, genes, at, change):
    "input_ids, position_ids, tokens compared in the new and in the old sentence"
    k, L, absent = len(at), len(tokens), at < 0
    added = int(absent[0].sum())
    at = np.where(absent, L + np.cumsum(absent, axis=1) - 1, at)
    full = np.hstack([np.repeat(tokens[None], k, axis=0), genes[absent].reshape(k, added)])
    source = plain_source(L + added, at, change.mode)[:, :change.context]
    altered = np.zeros(full.shape, bool)
    np.put_along_axis(altered, at, True, axis=1)
    after, before = ~np.take_along_axis(altered, source, axis=1), np.zeros(full.shape, bool)
    np.put_along_axis(before, source, after, axis=1)
    place = np.repeat(np.arange(source.shape[1])[None], k, axis=0)
    if change.positions == "keep": place = plain_places(L, added, at, source, change.mode)
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
    panels = [("each", panel), *(("together", rng.permutation(panel)[:n]) for n in (2, 3, L, len(panel)))]
    for context in (None, L, L + 1, L + 3):
        for how, genes in panels:
            for e in all_edits(told([tokens]), genes, Change(mode, positions, how, context)):
                ids, place, after, before = plain_permuted(tokens, e.genes, e.at, e.change)
                new = e.changed(torch.from_numpy(tokens))
                counted = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
                np.testing.assert_array_equal(new.input_ids, ids)
                np.testing.assert_array_equal(counted if new.position_ids is None else new.position_ids, place)
                np.testing.assert_array_equal(but(after.shape, new.own.numpy()), after)
                if after.any(): np.testing.assert_array_equal(but(before.shape, new.left.numpy()), before)
                assert (before.sum(1) == ids.shape[1] - new.own.shape[1]).all() or not after.any()
                assert e.new_length == ids.shape[1] and e.leave_others == after.any()


def test_a_sample_is_drawn_evenly():
    rng = np.random.default_rng(1)
    cells = told([rng.permutation(np.arange(2, N_GENES + 2))[:n] for n in (9, 2, CONTEXT, 3, 17, 4, CONTEXT)])
    edits = all_edits(cells, np.arange(2, 40), Change("overexpress", context=CONTEXT))
    whole = [(e.cell, g) for e in edits for g in e.index.tolist()]
    every = [(e.cell, g) for e in sample_edits(edits, 10**9) for g in e.index.tolist()]
    assert every == whole and len(set(whole)) == 7 * 38
    n = np.zeros(7, int)
    for seed in range(200):
        for e in sample_edits(edits, 7, seed): n[e.cell] += len(e)
    assert n.sum() == 1400 and n.min() > 140   # seven cells of as many perturbations


def test_a_sample_keeps_genes_and_places_together():
    cell = np.array([7, 3, 9, 5])
    for e in sample_edits(all_edits(told([cell, cell[:3]]), cell, Change()), 5, seed=2):
        assert (cell[e.at] == e.genes).all() and (cell[e.index][:, None] == e.genes).all()
