"The losses are the paper's equations; a cell's loss and vector are its own; a model directory stands alone"
import json, math, shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from conftest import ISLET, TINY, files_under, genes_of, islet_vocab, partners, refused, toy
from mix_geneformer.encoder.batches import MaskedBatches, length_batches, pad
from mix_geneformer.encoder.masking import mask_tokens
from mix_geneformer.embedding import embed
from mix_geneformer.encoder.states import cell_vectors
from mix_geneformer.cells.vocabulary import Vocabulary, vocabulary_from_medians
from mix_geneformer.encoder.checkpoints import load_model, save_model
from mix_geneformer.encoder.losses import (
    Objective, alignment_uniformity, mlm_loss, ortholog_loss, ortholog_pairs, simcse_loss)
from mix_geneformer.encoder.model import build_model, encode, pool_tokens
from mix_geneformer.encoder.classifier import CellClassifier, classifier_from
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import Sentences

KINDS = ["separate", "shared", "tied"]


def two_species(orthologs="separate", n=40):
    a, b = partners(n)
    return vocabulary_from_medians(dict(human=pd.Series(1., a), mouse=pd.Series(1., b)), orthologs)


def tiny(vocab, **kw):
    "A model whose parts all matter: weights far from zero"
    torch.manual_seed(0)
    net = build_model(vocab, **{**TINY, **kw})
    for name, p in net.named_parameters(): torch.nn.init.normal_(p, std=.3, mean=1. if "LayerNorm.weight" in name else 0.)
    with torch.no_grad(): net.bert.embeddings.word_embeddings.weight[0] = 0
    return net.eval()


def batch_of(lengths, vocab, seed=0, types=None):
    rng = np.random.default_rng(seed)
    return pad(np.concatenate([rng.permutation(np.arange(vocab.n_special, len(vocab)))[:n] for n in lengths]), lengths, types)


def row(batch, i):
    "One cell of a batch by itself, without padding"
    n = int(batch["attention_mask"][i].sum())
    return {k: v[i:i + 1, :n] for k, v in batch.items()}


def labels_for(batch, seed=0, p=.3):
    g = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(batch["input_ids"].shape, generator=g) < p) & batch["attention_mask"].bool()
    chosen[:, 0] = True
    return torch.where(chosen, batch["input_ids"], -100)


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)


# --- equations ---------------------------------------------------------------------------------------------------

def cos(a, b): return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def equation_3(h1, h2, tau):
    "View 1 of a cell against view 2 of all, in double precision and plain loops"
    h1, h2, total = h1.double().tolist(), h2.double().tolist(), 0.
    for i, a in enumerate(h1):
        s = [cos(a, b) / tau for b in h2]
        total += -s[i] + max(s) + math.log(sum(math.exp(v - max(s)) for v in s))
    return total / len(h1)


def nt_xent(h1, h2, tau):
    "Both views of a cell against each other among all 2N"
    z, n, total = [*h1.double().tolist(), *h2.double().tolist()], len(h1), 0.
    for i, a in enumerate(z):
        s = {j: cos(a, b) / tau for j, b in enumerate(z) if j != i}
        top = max(s.values())
        total += -s[(i + n) % (2 * n)] + top + math.log(sum(math.exp(v - top) for v in s.values()))
    return total / len(z)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("tau", [.05, .1, 1.])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("near", [False, True], ids=["random views", "near views"])
def test_simcse_is_equation_3(n, tau, symmetric, near):
    g = torch.Generator().manual_seed(n)
    h1, h2 = torch.randn(n, 16, generator=g), torch.randn(n, 16, generator=g)
    if near: h2 = h1 + .1 * h2
    plain = (nt_xent if symmetric else equation_3)(h1, h2, tau)
    assert abs(float(simcse_loss(h1, h2, tau, symmetric)) - plain) < 1e-5 * max(1, plain)
    close(simcse_loss(h1 * 7, h2 * .2, tau, symmetric), simcse_loss(h1, h2, tau, symmetric))                     # cosines do not know lengths


@pytest.mark.parametrize("symmetric", [False, True])
def test_simcse_in_half_precision_is_computed_in_full(symmetric):
    h = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert simcse_loss(h, h, .05, symmetric).dtype == torch.float32
    close(simcse_loss(h, h, .05, symmetric), simcse_loss(h.float(), h.float(), .05, symmetric))


def test_equation_3_is_not_symmetric_and_one_cell_has_no_candidates():
    g = torch.Generator().manual_seed(0)
    h1, h2 = torch.randn(5, 8, generator=g), torch.randn(5, 8, generator=g)
    assert abs(simcse_loss(h1, h2) - simcse_loss(h2, h1)) > 1e-3
    close(simcse_loss(h1, h2, symmetric=True), simcse_loss(h2, h1, symmetric=True))
    assert float(simcse_loss(h1[:1], h2[:1])) == 0.


def equation_2(net, batch, labels):
    "Minus the log-probability of the true token, position by position, by the dense head"
    logits, terms = net(**batch).logits.double(), []
    for i in range(len(labels)):
        for j in range(labels.shape[1]):
            if labels[i, j] == -100: continue
            z = logits[i, j].tolist()
            terms.append(-z[labels[i, j]] + max(z) + math.log(sum(math.exp(v - max(z)) for v in z)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("seed,lengths", [(0, [5]), (1, [24, 3, 11]), (2, [2, 2, 2, 2]), (3, [24] * 6)])
def test_mlm_is_equation_2(seed, lengths):
    v = two_species()
    net, batch = tiny(v), batch_of(lengths, v, seed)
    labels = labels_for(batch, seed)
    with torch.no_grad(): assert abs(float(mlm_loss(net, encode(net, batch), labels)) - equation_2(net, batch, labels)) < 1e-5


@pytest.mark.parametrize("seed,lengths", [(0, [5]), (1, [24, 3, 11])])
def test_masked_head_is_the_dense_head(seed, lengths):
    "transformers' own loss over every position, and the gradient of every weight"
    v = two_species()
    net, batch = tiny(v), batch_of(lengths, v, seed)
    labels, grads, losses = labels_for(batch, seed), [], []
    for loss in (lambda: net(**batch, labels=labels).loss, lambda: mlm_loss(net, encode(net, batch), labels)):
        net.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters()})
    close(*losses)
    for name in grads[0]: close(grads[0][name], grads[1][name])
    assert all(g.abs().sum() > 0 for n, g in grads[1].items() if not n.endswith("key.bias"))


def test_no_masked_position_gives_no_loss():
    v = two_species()
    net, batch = tiny(v), batch_of([4, 3], v)
    assert mlm_loss(net, encode(net, batch), torch.full((2, 4), -100)).item() == 0.


@pytest.mark.parametrize("pool,symmetric,tau,weight", [("mean", False, .05, 1.), ("mean", True, .1, .5), ("first", False, .05, 1.), ("first", True, .2, 2.)])
def test_objective_is_equation_1(pool, symmetric, tau, weight):
    v = two_species()
    net, batch = tiny(v), batch_of([7, 24, 2, 9], v)
    labels = labels_for(batch)
    out = {k: x.detach() for k, x in Objective(net, tau, pool, symmetric, weight)(labels=labels, **batch).items()}                                   # eval mode: both views are one
    with torch.no_grad():
        h = torch.cat([v_.mean(1) if pool == "mean" else v_[:, 0] for v_ in (encode(net, row(batch, i)) for i in range(4))])
    simcse, mlm = (nt_xent if symmetric else equation_3)(h, h, tau), equation_2(net, batch, labels)
    assert abs(float(out["simcse"]) - simcse) < 1e-5 and abs(float(out["mlm"]) - mlm) < 1e-5 and abs(float(out["loss"]) - mlm - weight * simcse) < 1e-5


def test_two_views_differ_by_dropout_and_only_the_first_is_predicted():
    v = two_species()
    net, batch = tiny(v).train(), batch_of([7, 24, 2, 9], v)
    objective = Objective(net)
    torch.manual_seed(5)
    out = objective(labels=labels_for(batch), **batch)
    assert float(out["alignment"]) > 1e-3
    torch.manual_seed(5)                                                                                         # the same dropout, by hand
    h = encode(net, {k: torch.cat([x, x]) for k, x in batch.items()})
    close(out["mlm"], mlm_loss(net, h[:4], labels_for(batch)))
    close(out["simcse"], simcse_loss(pool_tokens(h[:4], batch["attention_mask"]), pool_tokens(h[4:], batch["attention_mask"])))


def test_alignment_and_uniformity():
    g = torch.Generator().manual_seed(0)
    h1, h2 = torch.randn(6, 8, generator=g), torch.randn(6, 8, generator=g)
    a, b = F.normalize(h1, dim=-1), F.normalize(h2, dim=-1)
    align = sum(float((x - y).pow(2).sum()) for x, y in zip(a, b)) / 6
    pairs = [math.exp(-2 * float((a[i] - a[j]).pow(2).sum())) for i in range(6) for j in range(i)]
    got = alignment_uniformity(h1, h2)
    close(got[0], align), close(got[1], math.log(sum(pairs) / len(pairs)))
    assert all(torch.isfinite(x) for x in alignment_uniformity(h1[:1], h2[:1]))


# --- masking -----------------------------------------------------------------------------------------------------

def test_masking_is_80_10_10_of_15_percent():
    ids = np.arange(2, 200_002)
    masked, chosen = mask_tokens(ids, [100_000, 100_000], [3, 4], 200_002)
    assert abs(chosen.mean() - .15) < .004 and (masked[~chosen] == ids[~chosen]).all()
    kinds = [(masked[chosen] == 1).mean(), (masked[chosen] == ids[chosen]).mean()]
    assert abs(kinds[0] - .8) < .01 and abs(kinds[1] - .1) < .01 and masked.min() >= 1
    random = masked[chosen & (masked != 1) & (masked != ids)]
    assert abs(random.mean() / 100_002 - 1) < .03 and random.min() < 1_000 and random.max() > 199_000 and len(np.unique(random)) > .98 * len(random)
    assert abs(np.corrcoef(chosen[:100_000], chosen[100_000:])[0, 1]) < .01 and abs(np.corrcoef(chosen[:-1], chosen[1:])[0, 1]) < .01   # cells and positions are independent


@pytest.mark.parametrize("p", [.05, .15, .5, 1.])
def test_masking_has_the_share_asked_for_at_every_position(p):
    n = np.full(4_000, 50)
    chosen = mask_tokens(np.full(n.sum(), 5), n, np.arange(4_000), 100, mlm_probability=p)[1].reshape(4_000, 50)
    assert np.abs(chosen.mean(0) - p).max() < .035 and chosen.any(1).all()


def unpacked(batch, i):
    "What one row of a batch of `MaskedBatches` says: tokens, predicted positions, their tokens"
    used = batch["labels"][i] != -100
    return batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist(), batch["masked"][i][used].tolist(), batch["labels"][i][used].tolist()


def test_masking_of_a_cell_does_not_depend_on_its_batch(vocab):
    s = encode_cells(toy(), vocab, 24)
    seen = []
    for size in (1, 4, 24, None):
        b = MaskedBatches(s, vocab, size or 4, 24, seed=3, batch_tokens=None if size else 100)
        seen.append({int(i): unpacked(c, k) for idx in b.plan(2) for c in [b.collate(idx, 2)] for k, i in enumerate(idx)})
    assert seen[0] == seen[1] == seen[2] == {**seen[0], **seen[3]} and len(seen[0]) == 24 and len(seen[3]) > 12
    for i, (ids, at, labels) in seen[0].items():                                                                # the plain way: one cell by itself
        masked, chosen = mask_tokens(s[i], [len(s[i])], [i], len(vocab), 2, (3, 2))
        assert masked.tolist() == ids and np.flatnonzero(chosen).tolist() == at and s[i][chosen].tolist() == labels
    other = MaskedBatches(s, vocab, 4, 24, seed=4)
    draw = lambda *key: [mask_tokens(s[i], [len(s[i])], [i], len(vocab), 2, key)[0].tolist() for i in range(24)]
    assert draw(3, 2) != draw(3, 1) and draw(3, 2) != draw(4, 2) and other.steps == 6
    assert all((c["labels"] != -100).any(1).all() for c in other.epoch(0))                                      # every cell teaches something


def test_token_budget_holds(vocab):
    rng = np.random.default_rng(0)
    n = rng.integers(1, 200, 500)
    for seed in (None, 0, 7):
        for most in (None, 16):
            plan = length_batches(n, most, seed, batch_tokens=1_000)
            assert np.sort(np.concatenate(plan)).tolist() == list(range(500)) and max(len(b) * n[b].max() for b in plan) <= 1_000 and max(map(len, plan)) <= (most or 500)
    assert [len(b) for b in length_batches([900, 5_000, 100], batch_tokens=1_000)] == [1, 1, 1]                 # a cell above the budget stands alone
    s = encode_cells(toy(), vocab, 24)
    b = MaskedBatches(s, vocab, 4, 24, batch_tokens=120)
    assert sum(len(c["labels"]) for c in b.epoch(0)) >= 20 and max(c["input_ids"].numel() for c in b.epoch(0)) <= 120 and {len(c["labels"]) for c in b.epoch(0)} <= {4, 2}
    assert [len(c["labels"]) for c in b.epoch(0, rank=0, world=2)] == [len(c["labels"]) for c in b.epoch(0, rank=1, world=2)]   # processes step together
    for m in (2, 8): assert all(len(c) % m == 0 or len(c) in (1, 2, 4) for c in length_batches(n, seed=1, batch_tokens=2_000, multiple=m, drop_last=True))


def test_the_window_says_how_like_the_lengths_of_a_batch_are(vocab):
    n = np.random.default_rng(0).integers(1, 2_000, 640)
    spread = {}
    for window in (1, 5, 50):
        plan = length_batches(n, 16, seed=1, window=window, drop_last=True)
        assert np.sort(np.concatenate(plan)).tolist() == list(range(640)) and {len(b) for b in plan} == {16}
        spread[window] = np.mean([np.ptp(n[b]) for b in plan])
    assert spread[50] < spread[5] < spread[1] and spread[1] > .8*np.mean([np.ptp(n[b]) for b in np.split(np.random.default_rng(1).permutation(640), 40)])
    lengths = n[:64] % 23 + 1
    s = Sentences(np.full(lengths.sum(), 5, np.uint16), np.append(0, np.cumsum(lengths)), "human")
    made, like, random = ([b.tolist() for b in MaskedBatches(s, vocab, 4, 24, **how).plan(0)] for how in ({}, dict(length_window=50), dict(length_window=1)))
    assert made == like != random
    refused(lambda: MaskedBatches(s, vocab, 4, 24, length_window=0), "length_window=0")


# --- ways to run the encoder --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False, None])
@pytest.mark.parametrize("layer", [None, 1, 2])
def test_every_way_to_run_the_encoder_is_bert(kind, packed, layer):
    v = two_species(kind)
    net, batch = tiny(v), batch_of((9, 24, 3, 17), v, types=types_of(kind, 4))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        bert = net.bert(**batch, output_hidden_states=True).hidden_states[-1 if layer is None else layer]
        ours = encode(net, batch, layer, packed=packed)
        close(ours[real], bert[real], 1e-5)
        at = torch.tensor([[0, 2, 1], [23, 0, 0], [2, 2, 2], [5, 16, 3]])
        close(encode(net, batch, layer, at, packed), torch.stack([bert[i, a] for i, a in enumerate(at)]), 1e-5)
        places = {**batch, "position_ids": torch.arange(24).flip(0).expand(4, 24)}
        close(encode(net, places, layer, packed=packed)[real], net.bert(**places, output_hidden_states=True).hidden_states[-1 if layer is None else layer][real], 1e-5)
        whole = {k: x[1:2] for k, x in batch.items()}
        close(encode(net, {k: x for k, x in whole.items() if k != "attention_mask"}), encode(net, whole))      # no mask where nothing is padded


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pool, symmetric, weight", [("mean", False, 1.), ("first", True, 1.), ("first", False, .5), ("mean", False, 0.)])
def test_losses_and_gradients_of_the_lean_step_are_the_plain_ones(vocab, pool, symmetric, weight, packed, monkeypatch):
    "Vocabulary logits and last layer where they are wanted, padding left out: 1e-6 and 1e-5 from doing everything everywhere"
    import mix_geneformer.encoder.losses as m
    net = tiny(vocab)
    for p in net.parameters(): p.data.mul_(.3)
    s = encode_cells(toy(), vocab, 24)
    lean = next(MaskedBatches(s, vocab, 6, 24, seed=1).epoch(0))
    dense = torch.full_like(lean["input_ids"], -100)
    for i in range(6): dense[i, lean["masked"][i][lean["labels"][i] != -100]] = lean["labels"][i][lean["labels"][i] != -100]
    plain = {k: lean[k] for k in ("input_ids", "attention_mask")}
    found, walk = [], m.encode
    for batch, bert in ((dict(plain, labels=dense), True), (lean, False)):
        # the plain way is transformers' own forward pass
        monkeypatch.setattr(m, "encode", (lambda model, b, layer=None, at=None: model.bert(**b).last_hidden_state) if bert else (lambda *a, **k: walk(*a, packed=packed, **k)))
        net.zero_grad()
        out = Objective(net, pool=pool, symmetric=symmetric, simcse_weight=weight)(**batch)
        out["loss"].backward()
        found.append(({k: float(x.detach()) for k, x in out.items()}, {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}))
    (loss_a, grad_a), (loss_b, grad_b) = found
    for k in loss_a: assert abs(loss_a[k] - loss_b[k]) < 1e-6 * max(1, abs(loss_a[k])), k
    for k in grad_a: assert float((grad_a[k] - grad_b[k]).abs().max()) < 1e-5 * max(1, float(grad_a[k].abs().max())), k


def test_key_bias_is_a_gate_with_gradients(vocab):
    net, batch = tiny(vocab), batch_of((12,), vocab)
    with torch.no_grad():
        out = encode(net, {**batch, "key_bias": torch.zeros(1, 12).index_fill(1, torch.tensor([4]), -1e9)})
        keep = torch.tensor([i for i in range(12) if i != 4])
        gone = {k: x[:, keep] for k, x in batch.items()}
        close(out[:, keep], encode(net, {**gone, "position_ids": keep[None]}), 1e-5)                            # a key without weight is a token taken away, positions kept
    gate = torch.zeros(1, 12, requires_grad=True)
    encode(net, {**batch, "key_bias": gate}).pow(2).mean().backward()
    assert (gate.grad.abs() > 0).all()


# --- a cell is alone ---------------------------------------------------------------------------------------------

def types_of(kind, n): return [i % 2 for i in range(n)] if kind == "tied" else None


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_and_padding_do_not_matter(kind):
    v = two_species(kind)
    net, lengths = tiny(v), [24, 1, 5, 13, 24, 2]
    batch = batch_of(lengths, v, types=types_of(kind, 6))
    assert ("token_type_ids" in batch) == (kind == "tied")
    labels = labels_for(batch)
    with torch.no_grad():
        h = encode(net, batch)
        vectors = pool_tokens(h, batch["attention_mask"])
        for i, n in enumerate(lengths):
            alone = row(batch, i)
            h_i = encode(net, alone)
            close(h[i, :n], h_i[0])
            close(vectors[i], pool_tokens(h_i, alone["attention_mask"])[0])
            close(mlm_loss(net, h[i:i + 1], labels[i:i + 1]), mlm_loss(net, h_i, labels[i:i + 1, :n]))
        close(pool_tokens(encode(net, {k: x.flip(0) for k, x in batch.items()}), batch["attention_mask"].flip(0)).flip(0), vectors)
        ids = batch["input_ids"].clone()                                                                         # what stands in the padding
        ids[batch["attention_mask"] == 0] = 9
        close(pool_tokens(encode(net, {**batch, "input_ids": ids}), batch["attention_mask"]), vectors)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_do_not_depend_on_batch_size_or_company(kind, tmp_path):
    v = Vocabulary.build([toy("human"), toy("mouse", seed=1)], kind)
    loaded = load_model(save_model(tiny(v), v, tmp_path/"model"), "cpu")
    for species in ("human", "mouse"):
        a = toy(species, seed=species == "mouse")
        whole = embed(a.copy(), loaded, batch_size=64, progress=False).obsm["X_mix_geneformer"]
        assert whole.shape == (24, 16) and whole.dtype == np.float32 and np.isfinite(whole).all() and whole.std(0).min() > 1e-3
        for size in (1, 5): np.testing.assert_allclose(embed(a.copy(), loaded, batch_size=size, progress=False).obsm["X_mix_geneformer"], whole, atol=1e-5)
        np.testing.assert_allclose(embed(a[[11, 4]].copy(), loaded, progress=False).obsm["X_mix_geneformer"], whole[[11, 4]], atol=1e-5)
        s = encode_cells(a, v, 24)
        by_hand = [net_mean(loaded, s[i], species) for i in range(24)]
        np.testing.assert_allclose(whole, by_hand, atol=1e-5)                                                    # in the cells' order


def net_mean(loaded, sentence, species):
    batch = dict(input_ids=torch.from_numpy(sentence.astype(np.int64))[None])
    if loaded.vocab.orthologs == "tied": batch["token_type_ids"] = torch.full_like(batch["input_ids"], loaded.vocab.species_index(species))
    with torch.no_grad(): return loaded.model.bert(**batch).last_hidden_state[0].mean(0).numpy()


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_a_classifier_sees_one_cell_at_a_time(pool):
    v = two_species()
    clf, batch = classifier_from(tiny(v), ["a", "b", "c"], pool).eval(), batch_of([24, 3, 9], v)
    with torch.no_grad():
        whole = clf.logits(batch)
        for i in range(3): close(whole[i], clf.logits(row(batch, i))[0])
    labels = torch.tensor([0, 2, 1])
    close(clf(labels=labels, **batch)["loss"], F.cross_entropy(whole, labels))


def test_batches_hold_every_cell_once():
    n = np.random.default_rng(0).integers(1, 99, 101)
    for seed in (None, 0, 7): assert np.sort(np.concatenate(length_batches(n, 8, seed))).tolist() == list(range(101))
    assert sum(len(b) for b in length_batches(n, 8, 0, drop_last=True)) == 96


# --- gradients ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind):
    v = two_species(kind)
    net, batch = tiny(v).train(), batch_of([7, 24, 2, 9], v, types=types_of(kind, 4))
    Objective(net)(labels=labels_for(batch), **batch)["loss"].backward()
    none = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not none and all(torch.isfinite(p.grad).all() for p in net.parameters())
    if kind == "tied": assert (net.bert.embeddings.token_type_embeddings.weight.grad.abs().sum(1) > 0).all()    # the offset of both species
    assert net.bert.embeddings.word_embeddings.weight.grad[0].abs().sum() == net.cls.predictions.decoder.weight.grad[0].abs().sum()


def test_gradient_of_each_loss():
    v = two_species()
    net, batch = tiny(v), batch_of([7, 24, 2, 9], v)
    head = lambda: sum(p.grad is not None and float(p.grad.abs().sum()) > 0 for n, p in net.named_parameters() if n.startswith("cls.predictions.transform"))
    encoder = lambda: sum(p.grad is not None and float(p.grad.abs().sum()) > 0 for n, p in net.bert.encoder.named_parameters() if not n.endswith("key.bias"))
    n_encoder = sum(not n.endswith("key.bias") for n, _ in net.bert.encoder.named_parameters())
    Objective(net)(labels=labels_for(batch), **batch)["simcse"].backward()
    assert head() == 0 and encoder() == n_encoder                                                               # SimCSE teaches the encoder alone
    net.zero_grad()
    Objective(net)(labels=labels_for(batch), **batch)["mlm"].backward()
    assert head() == 4 and encoder() == n_encoder
    net.zero_grad()
    Objective(net, cross_species_weight=1., pairs=ortholog_pairs(v))(labels=labels_for(batch), **batch)["cross_species"].backward()
    assert head() == 0 and encoder() == 0 and (net.bert.embeddings.word_embeddings.weight.grad.abs().sum(1) > 0).sum() == 80


# --- across species ----------------------------------------------------------------------------------------------

def test_ortholog_loss_by_hand():
    g = torch.Generator().manual_seed(0)
    e, pairs = torch.randn(20, 8, generator=g), torch.tensor([[2, 9], [3, 11], [4, 10]])
    assert abs(float(ortholog_loss(e, pairs, .1)) - equation_3(e[[2, 3, 4]], e[[9, 11, 10]], .1)) < 1e-5


def test_ortholog_pairs():
    v = islet_vocab()
    names = {tuple(v.describe(p).symbol) for p in ortholog_pairs(v)}
    assert names == {(h, m) for h, m in zip(ISLET["human"][1:], ISLET["mouse"][1:])}                            # INS and Ins2 are not one-to-one
    assert len(ortholog_pairs(islet_vocab("shared"))) == len(ortholog_pairs(islet_vocab("tied"))) == 0


def test_cross_species_loss_pulls_orthologs_together():
    v = two_species()
    net, batch, pairs = build_model(v, **TINY), batch_of([7, 24, 2, 9], v), ortholog_pairs(v)
    torch.manual_seed(0)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.3)
    objective = Objective(net, cross_species_weight=1., pairs=pairs).train()

    def margin():
        e = F.normalize(net.bert.embeddings.word_embeddings.weight.detach(), dim=-1)
        sim = e[pairs[:, 0]] @ e[pairs[:, 1]].T
        return float(sim.diag().mean() - (sim.sum() - sim.trace()) / (sim.numel() - len(sim)))
    before, losses, opt = margin(), [], torch.optim.SGD([net.bert.embeddings.word_embeddings.weight], lr=.5)
    for _ in range(15):
        out = objective(labels=labels_for(batch), **batch)
        opt.zero_grad(), out["cross_species"].backward(), opt.step()
        losses.append(float(out["cross_species"].detach()))
    assert all(b < a for a, b in zip(losses, losses[1:])) and margin() > before + .1


def test_tied_vocabulary_has_an_offset_per_species(tmp_path):
    v = two_species("tied")
    net, batch = tiny(v), batch_of([9], v)
    assert net.config.type_vocab_size == len(v.species) == 2 and build_model(two_species(), **TINY).config.type_vocab_size == 1
    assert build_model(vocabulary_from_medians(dict(human=pd.Series(1., genes_of("human", 5))), "tied"), **TINY).config.type_vocab_size == 1
    with torch.no_grad():
        human, mouse = (pool_tokens(encode(net, {**batch, "token_type_ids": torch.full((1, 9), t)}), batch["attention_mask"]) for t in (0, 1))
        assert (human - mouse).abs().max() > 1e-2
        offset = net.bert.embeddings.token_type_embeddings.weight
        offset[1] = offset[0]
        close(pool_tokens(encode(net, {**batch, "token_type_ids": torch.ones(1, 9, dtype=torch.long)}), batch["attention_mask"]), human)   # nothing else differs


# --- directories -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    v = two_species(kind)
    net, batch = tiny(v), batch_of([24, 3, 9], v, types=types_of(kind, 3))
    out = save_model(net, v, tmp_path/"model", dict(pool="mean", seed=3), dict(loss=1.5), "A title")
    assert files_under(out) == ["README.md", "config.json", "metrics.json", "model.safetensors", "training.json", "vocabulary.json"]
    moved = shutil.move(out, tmp_path/"elsewhere")                                                               # nothing in it knows where it was
    assert all(str(tmp_path) not in (tmp_path/"elsewhere"/n).read_text(errors="replace") for n in files_under(tmp_path/"elsewhere"))
    back = load_model(moved, "cpu")
    assert back.vocab == v and back.context == 24 and back.labels is None and not back.model.training and back.training["seed"] == 3 and back.training["vocabulary"] == v.hash
    assert json.loads((tmp_path/"elsewhere"/"metrics.json").read_text()) == dict(loss=1.5) and (tmp_path/"elsewhere"/"README.md").read_text().startswith("# A title")
    for k, w in net.state_dict().items(): assert torch.equal(back.model.state_dict()[k], w), k
    plain = BertForMaskedLM.from_pretrained(moved).eval()
    with torch.no_grad(): close(plain(**batch).logits, net(**batch).logits, 1e-6), close(encode(back.model, batch), encode(net, batch), 1e-6)
    assert list(plain.state_dict()) == list(net.state_dict()) and {k.split(".")[0] for k in plain.state_dict()} == {"bert", "cls"}


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_save_and_load_a_classifier(pool, tmp_path):
    v = two_species()
    net, batch = tiny(v), batch_of([24, 3, 9], v)
    clf = classifier_from(net, ["alpha cell", "beta, or B", 3], pool).eval()
    back = load_model(save_model(clf, v, tmp_path/"types", dict(pool=pool)), "cpu")
    assert isinstance(back.model, CellClassifier) and back.labels == ["alpha cell", "beta, or B", "3"] and back.pool == pool
    with torch.no_grad(): close(back.model.logits(batch), clf.logits(batch), 1e-6), close(encode(back.model, batch), encode(net, batch), 1e-6)
    again = classifier_from(back.model, ["x", "y"], pool).eval()                                                # a classifier's encoder can be tuned on
    with torch.no_grad(): close(encode(again, batch), encode(net, batch), 1e-6)


def test_a_checkpoint_of_another_maker(tmp_path):
    "Geneformer-family: BertForMaskedLM without our vocabulary, tokens numbered by its own dictionary"
    ids = genes_of("human", 30)
    tokens = {"<pad>": 0, "<mask>": 1, **{g: int(t) for g, t in zip(ids, np.random.default_rng(0).permutation(30) + 2)}}
    v = Vocabulary.from_geneformer(tokens, dict.fromkeys(ids, 2.))
    torch.manual_seed(0)
    theirs = BertForMaskedLM(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, hidden_act="relu", max_position_embeddings=40)).eval()
    theirs.save_pretrained(tmp_path/"theirs")
    loaded = load_model(tmp_path/"theirs", "cpu", vocab=v)
    assert loaded.context == 40 and loaded.vocab == v and loaded.model.config.type_vocab_size == 2 and loaded.pool == "mean"
    a = toy("human", genes=30)
    got = embed(a.copy(), loaded, progress=False).obsm["X_mix_geneformer"]
    for i in range(3):
        s = a.X[i].toarray().ravel() / 2.
        mine = sorted((-s[j], tokens[g]) for j, g in enumerate(a.var_names) if s[j] > 0)
        with torch.no_grad(): h = theirs.bert(torch.tensor([[t for _, t in mine]])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(got[i], h, atol=1e-5)


def test_the_papers_size():
    v = two_species()
    torch.manual_seed(0)
    c = build_model(v).config
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.intermediate_size, c.max_position_embeddings, c.hidden_act, c.hidden_dropout_prob, c.attention_probs_dropout_prob) == (6, 256, 4, 512, 2048, "silu", .1, .1)
    assert c.vocab_size == len(v) == 82 and c.pad_token_id == 0
