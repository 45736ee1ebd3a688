"The encoder is BERT in every way that it is run; a cell is alone."
import pandas as pd
import pytest
import torch
from conftest import TINY, genes_of, refused
from tinymodel import KINDS, batch_of, close, labels_for, row, tiny, two_species, types_of

from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.encoder.losses import mlm_loss
from mix_geneformer.encoder.model import build_model, encode, pick_device, pool_tokens

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False, None])
@pytest.mark.parametrize("emb_layer", [None, 1, 2])
def test_every_way_to_run_the_encoder_is_bert(kind, packed, emb_layer):
    v = two_species(kind)
    net, batch = tiny(v), batch_of((9, 24, 3, 17), v, types=types_of(kind, 4))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        bert = net.bert(**batch, output_hidden_states=True).hidden_states[-1 if emb_layer is None else emb_layer]
        ours = encode(net, batch, emb_layer, packed=packed)
        close(ours[real], bert[real], 1e-5)
        at = torch.tensor([[0, 2, 1], [23, 0, 0], [2, 2, 2], [5, 16, 3]])
        close(encode(net, batch, emb_layer, at, packed), torch.stack([bert[i, a] for i, a in enumerate(at)]), 1e-5)
        places = {**batch, "position_ids": torch.arange(24).flip(0).expand(4, 24)}
        close(
            encode(net, places, emb_layer, packed=packed)[real],
            net.bert(**places, output_hidden_states=True).hidden_states[-1 if emb_layer is None else emb_layer][real],
            1e-5,
        )
        whole = {k: x[1:2] for k, x in batch.items()}
        # no mask where nothing is padded
        close(encode(net, {k: x for k, x in whole.items() if k != "attention_mask"}), encode(net, whole))


def test_key_bias_is_a_gate_with_gradients(vocab):
    net, batch = tiny(vocab), batch_of((12,), vocab)
    with torch.no_grad():
        out = encode(net, {**batch, "key_bias": torch.zeros(1, 12).index_fill(1, torch.tensor([4]), -1e9)})
        keep = torch.tensor([i for i in range(12) if i != 4])
        gone = {k: x[:, keep] for k, x in batch.items()}
        # a key without weight is a token taken away, positions kept
        close(out[:, keep], encode(net, {**gone, "position_ids": keep[None]}), 1e-5)
    gate = torch.zeros(1, 12, requires_grad=True)
    encode(net, {**batch, "key_bias": gate}).pow(2).mean().backward()
    assert (gate.grad.abs() > 0).all()


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
        close(
            pool_tokens(encode(net, {k: x.flip(0) for k, x in batch.items()}), batch["attention_mask"].flip(0)).flip(0),
            vectors,
        )
        # what stands in the padding
        ids = batch["input_ids"].clone()
        ids[batch["attention_mask"] == 0] = 9
        close(pool_tokens(encode(net, {**batch, "input_ids": ids}), batch["attention_mask"]), vectors)


def test_tied_vocabulary_has_an_offset_per_species(tmp_path):
    v = two_species("tied")
    net, batch = tiny(v), batch_of([9], v)
    assert (
        net.config.type_vocab_size == len(v.species) == 2
        and build_model(two_species(), **TINY).config.type_vocab_size == 1
    )
    assert (
        build_model(
            vocabulary_from_medians(dict(human=pd.Series(1.0, genes_of("human", 5))), "tied"), **TINY
        ).config.type_vocab_size
        == 1
    )
    with torch.no_grad():
        human, mouse = (
            pool_tokens(encode(net, {**batch, "token_type_ids": torch.full((1, 9), t)}), batch["attention_mask"])
            for t in (0, 1)
        )
        assert (human - mouse).abs().max() > 1e-2
        offset = net.bert.embeddings.token_type_embeddings.weight
        offset[1] = offset[0]
        # nothing else differs
        close(
            pool_tokens(
                encode(net, {**batch, "token_type_ids": torch.ones(1, 9, dtype=torch.long)}), batch["attention_mask"]
            ),
            human,
        )


def test_the_papers_size():
    v = two_species()
    torch.manual_seed(0)
    c = build_model(v).config
    assert (
        c.num_hidden_layers,
        c.hidden_size,
        c.num_attention_heads,
        c.intermediate_size,
        c.max_position_embeddings,
        c.hidden_act,
        c.hidden_dropout_prob,
        c.attention_probs_dropout_prob,
    ) == (6, 256, 4, 512, 2048, "silu", 0.1, 0.1)
    assert c.vocab_size == len(v) == 82 and c.pad_token_id == 0


@pytest.mark.parametrize("device, says", [
    ("gpu", "none of 3 kinds of device"), ("", "none of 3 kinds"), ("meta", "none of 3 kinds"),
    ("cuda:99", "CUDA devices are visible: pass device='cpu' or 'auto'")])
def test_a_device_that_is_not_there_is_named(device, says): refused(lambda: pick_device(device), says)
