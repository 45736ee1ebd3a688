"The losses are the paper's equations, lean as they are dense, and reach every parameter."
import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FISHES as N
from conftest import ISLET, TINY, fish, fish_cells, fish_ids, genes_of, islet_vocab, toy
from tinymodel import (
    KINDS,
    batch_of,
    close,
    equation_2,
    equation_3,
    labels_for,
    nt_xent,
    row,
    tiny,
    two_species,
    types_of,
)

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.batches import MaskedBatches
from mix_geneformer.encoder.losses import (
    Objective,
    alignment_uniformity,
    mlm_loss,
    ortholog_loss,
    ortholog_pairs,
    simcse_loss,
)
from mix_geneformer.encoder.model import build_model, compile_parts, encode, pool_tokens

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
    # cosines do not know lengths
    close(simcse_loss(h1 * 7, h2 * .2, tau, symmetric), simcse_loss(h1, h2, tau, symmetric))


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


@pytest.mark.parametrize("seed,lengths", [(0, [5]), (1, [24, 3, 11]), (2, [2, 2, 2, 2]), (3, [24] * 6)])
def test_mlm_is_equation_2(seed, lengths):
    v = two_species()
    net, batch = tiny(v), batch_of(lengths, v, seed)
    labels = labels_for(batch, seed)
    with torch.no_grad():
        assert abs(float(mlm_loss(net, encode(net, batch), labels)) - equation_2(net, batch, labels)) < 1e-5


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


@pytest.mark.parametrize(
    "pool,symmetric,tau,weight",
    [("mean", False, 0.05, 1.0), ("mean", True, 0.1, 0.5), ("first", False, 0.05, 1.0), ("first", True, 0.2, 2.0)],
)
def test_objective_is_equation_1(pool, symmetric, tau, weight):
    v = two_species()
    net, batch = tiny(v), batch_of([7, 24, 2, 9], v)
    labels = labels_for(batch)
    # eval mode: both views are one
    out = {k: x.detach() for k, x in Objective(net, tau, pool, symmetric, weight)(labels=labels, **batch).items()}
    with torch.no_grad():
        h = torch.cat(
            [v_.mean(1) if pool == "mean" else v_[:, 0] for v_ in (encode(net, row(batch, i)) for i in range(4))]
        )
    simcse, mlm = (nt_xent if symmetric else equation_3)(h, h, tau), equation_2(net, batch, labels)
    assert (
        abs(float(out["simcse"]) - simcse) < 1e-5
        and abs(float(out["mlm"]) - mlm) < 1e-5
        and abs(float(out["loss"]) - mlm - weight * simcse) < 1e-5
    )


def test_two_views_differ_by_dropout_and_only_the_first_is_predicted():
    v = two_species()
    net, batch = tiny(v).train(), batch_of([7, 24, 2, 9], v)
    objective = Objective(net)
    torch.manual_seed(5)
    out = objective(labels=labels_for(batch), **batch)
    assert float(out["alignment"]) > 1e-3
    # the same dropout, by hand
    torch.manual_seed(5)
    h = encode(net, {k: torch.cat([x, x]) for k, x in batch.items()})
    close(out["mlm"], mlm_loss(net, h[:4], labels_for(batch)))
    close(
        out["simcse"],
        simcse_loss(pool_tokens(h[:4], batch["attention_mask"]), pool_tokens(h[4:], batch["attention_mask"])),
    )


def test_alignment_and_uniformity():
    g = torch.Generator().manual_seed(0)
    h1, h2 = torch.randn(6, 8, generator=g), torch.randn(6, 8, generator=g)
    a, b = F.normalize(h1, dim=-1), F.normalize(h2, dim=-1)
    align = sum(float((x - y).pow(2).sum()) for x, y in zip(a, b)) / 6
    pairs = [math.exp(-2 * float((a[i] - a[j]).pow(2).sum())) for i in range(6) for j in range(i)]
    got = alignment_uniformity(h1, h2)
    close(got[0], align), close(got[1], math.log(sum(pairs) / len(pairs)))
    assert all(torch.isfinite(x) for x in alignment_uniformity(h1[:1], h2[:1]))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "pool, symmetric, weight", [("mean", False, 1.0), ("first", True, 1.0), ("first", False, 0.5), ("mean", False, 0.0)]
)
def test_losses_and_gradients_of_the_lean_step_are_the_plain_ones(vocab, pool, symmetric, weight, packed, monkeypatch):
    """Vocabulary logits and last layer where they are wanted, padding left out: 1e-6 and 1e-5 from doing everything
    everywhere"""
    import mix_geneformer.encoder.losses as m
    net = tiny(vocab)
    for p in net.parameters(): p.data.mul_(.3)
    s = encode_cells(toy(), vocab, 24)
    lean = next(MaskedBatches(s, vocab, 6, 24, seed=1).epoch(0))
    dense = torch.full_like(lean["input_ids"], -100)
    for i in range(6):
        dense[i, lean["masked"][i][lean["labels"][i] != -100]] = lean["labels"][i][lean["labels"][i] != -100]
    plain = {k: lean[k] for k in ("input_ids", "attention_mask")}
    found, walk = [], m.encode
    for batch, bert in ((dict(plain, labels=dense), True), (lean, False)):
        # the plain way is transformers' own forward pass
        monkeypatch.setattr(
            m,
            "encode",
            (lambda model, b, emb_layer=None, at=None: model.bert(**b).last_hidden_state)
            if bert
            else (lambda *a, **k: walk(*a, packed=packed, **k)),
        )
        net.zero_grad()
        out = Objective(net, pool=pool, symmetric=symmetric, simcse_weight=weight)(**batch)
        out["loss"].backward()
        found.append(
            (
                {k: float(x.detach()) for k, x in out.items()},
                {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None},
            )
        )
    (loss_a, grad_a), (loss_b, grad_b) = found
    for k in loss_a: assert abs(loss_a[k] - loss_b[k]) < 1e-6 * max(1, abs(loss_a[k])), k
    for k in grad_a: assert float((grad_a[k] - grad_b[k]).abs().max()) < 1e-5 * max(1, float(grad_a[k].abs().max())), k


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind):
    v = two_species(kind)
    net, batch = tiny(v).train(), batch_of([7, 24, 2, 9], v, types=types_of(kind, 4))
    Objective(net)(labels=labels_for(batch), **batch)["loss"].backward()
    none = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not none and all(torch.isfinite(p.grad).all() for p in net.parameters())
    # the offset of both species
    if kind == "tied": assert (net.bert.embeddings.token_type_embeddings.weight.grad.abs().sum(1) > 0).all()
    assert (
        net.bert.embeddings.word_embeddings.weight.grad[0].abs().sum()
        == net.cls.predictions.decoder.weight.grad[0].abs().sum()
    )


def test_gradient_of_each_loss():
    v = two_species()
    net, batch = tiny(v), batch_of([7, 24, 2, 9], v)
    head = lambda: sum(
        p.grad is not None and float(p.grad.abs().sum()) > 0
        for n, p in net.named_parameters()
        if n.startswith("cls.predictions.transform")
    )
    encoder = lambda: sum(
        p.grad is not None and float(p.grad.abs().sum()) > 0
        for n, p in net.bert.encoder.named_parameters()
        if not n.endswith("key.bias")
    )
    n_encoder = sum(not n.endswith("key.bias") for n, _ in net.bert.encoder.named_parameters())
    Objective(net)(labels=labels_for(batch), **batch)["simcse"].backward()
    # SimCSE teaches the encoder alone
    assert head() == 0 and encoder() == n_encoder
    net.zero_grad()
    Objective(net)(labels=labels_for(batch), **batch)["mlm"].backward()
    assert head() == 4 and encoder() == n_encoder
    net.zero_grad()
    Objective(net, cross_species_weight=1.0, pairs=ortholog_pairs(v))(labels=labels_for(batch), **batch)[
        "cross_species"
    ].backward()
    assert (
        head() == 0
        and encoder() == 0
        and (net.bert.embeddings.word_embeddings.weight.grad.abs().sum(1) > 0).sum() == 80
    )


def test_ortholog_loss_by_hand():
    g = torch.Generator().manual_seed(0)
    e, pairs = torch.randn(20, 8, generator=g), torch.tensor([[2, 9], [3, 11], [4, 10]])
    assert abs(float(ortholog_loss(e, pairs, .1)) - equation_3(e[[2, 3, 4]], e[[9, 11, 10]], .1)) < 1e-5


def test_ortholog_pairs():
    v = islet_vocab()
    names = {tuple(v.describe(p).symbol) for p in ortholog_pairs(v)}
    # INS and Ins2 are not one-to-one
    assert names == {(h, m) for h, m in zip(ISLET["human"][1:], ISLET["mouse"][1:])}
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


def test_the_ortholog_loss_draws_every_species_to_the_first(fish_table):
    fish(fish_table)
    of = dict(human=toy("human", genes=N), mouse=toy("mouse", genes=N, seed=1), zebrafish=fish_cells())
    named = lambda *species: {
        tuple(v.describe(p).ensembl_id) for v in [Vocabulary.build([of[s] for s in species])] for p in ortholog_pairs(v)
    }
    fishes = set(zip(genes_of("human", N - 3), fish_ids()))
    assert (
        named("human", "zebrafish") == fishes
        and named("human", "mouse", "zebrafish") == named("human", "mouse") | fishes
    )
    # the fish's table knows human alone
    assert named("mouse", "zebrafish") == {(gene_table("human").ortholog[h], f) for h, f in fishes}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_parts_give_the_same_step(vocab):
    torch.manual_seed(0)
    net = build_model(
        vocab, **{**TINY, "num_hidden_layers": 1}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    twin = copy.deepcopy(net)
    compile_parts(twin)
    batch = next(MaskedBatches(encode_cells(toy(), vocab, 24), vocab, 6, 24).epoch(0))
    found = []
    for n in (net, twin):
        out = Objective(n)(**batch)
        out["loss"].backward()
        found.append((float(out["loss"].detach()), [p.grad for p in n.parameters() if p.grad is not None]))
    assert abs(found[0][0] - found[1][0]) < 1e-5 and all(
        float((a - b).abs().max()) < 1e-5 for a, b in zip(found[0][1], found[1][1])
    )
    # compiled or not, a checkpoint has the same names
    assert set(net.state_dict()) == set(twin.state_dict())
