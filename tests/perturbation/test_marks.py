"`<cls>` and `<eos>` stay at both ends of a changed sentence, and no mean is over them."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, genes_of, toy
from tinymodel import tiny

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.states import Budget, Reader
from mix_geneformer.perturbation.edits import Change, all_edits
from mix_geneformer.perturbation.screening import screen_shifts
from mix_geneformer.perturbation.shifts import Towards, perturbed_means
from mix_geneformer.perturbation.verb import perturb

SPECIALS = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}


@pytest.fixture(scope="module")
def second():
    "A tiny model of the second series, and a few cells, one of them longer than its context"
    ids = genes_of("human", 40)
    v = Vocabulary.from_geneformer({**SPECIALS, **{g: 4+i for i, g in enumerate(ids)}}, dict.fromkeys(ids, 1.))
    net = tiny(v)
    return SimpleNamespace(model=net, vocab=v, context=TINY["context"], family=None), toy("human", n=6)


def plain(net, ids, places=None):
    "What plain transformers makes of one sentence"
    places = None if places is None else torch.tensor([places])
    with torch.no_grad(): return net.bert(torch.tensor([ids]), position_ids=places).last_hidden_state[0].double()


def by_hand(net, ids, gene, mode, context):
    "Before and after, over the genes that both sentences hold but the changed one"
    genes = ids[1:-1]
    rest = [g for g in genes if g != gene]
    new = rest if mode == "delete" else [gene, *rest][:context-2]
    both = set(new) & set(genes)-{gene}
    def mean(sentence):
        hidden = plain(net, sentence)
        return hidden[[i for i, t in enumerate(sentence) if t in both]].mean(0)
    return mean(ids), mean([2, *new, 3])


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_shifts_are_those_of_plain_sentences(second, mode):
    loaded, cells = second
    sentences = encode_cells(cells, loaded.vocab, loaded.context)
    assert {s[0] for s in map(list, map(sentences.__getitem__, range(6)))} == {2}
    assert all(sentences[i][-1] == 3 and len(sentences[i]) <= 24 for i in range(6))
    genes = np.arange(4, 44)
    edits = all_edits(sentences, genes, Change(mode, context=24, marks=(1, 1)))
    assert not {2, 3} & {int(t) for e in edits for t in e.genes.ravel()}
    seen = 0
    for m in perturbed_means(Reader(loaded, Budget(4096)), sentences, edits):
        for i, g, before, after in zip(m.cell[:5], m.gene[:5], m.before, m.after):
            a, b = by_hand(loaded.model, sentences[i].tolist(), int(genes[g]), mode, 24)
            torch.testing.assert_close(before, a, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(after, b, rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen >= 30


def test_the_vector_of_cls(second):
    loaded, cells = second
    sentences = encode_cells(cells, loaded.vocab, loaded.context)
    reader = Reader(loaded, Budget(4096), pool="cls")
    edits = all_edits(sentences, np.arange(4, 44), Change("delete", context=24, marks=(1, 1)))
    for m in perturbed_means(reader, sentences, edits):
        ids = sentences[m.cell[0]].tolist()
        torch.testing.assert_close(m.before[0], plain(loaded.model, ids)[0], rtol=1e-5, atol=1e-5)
        ids.remove(4+m.gene[0])
        torch.testing.assert_close(m.after[0], plain(loaded.model, ids)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reader.means(sentences), reader.vectors(sentences), atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("mode", ["delete", "inhibit", "overexpress"])
def test_a_gradient_leads_the_same_way(second, pool, mode):
    loaded, cells = second
    sentences = encode_cells(cells, loaded.vocab, loaded.context)
    reader = Reader(loaded, Budget(4096), pool=pool)
    held = [g for g in range(4, 44) if all(g in sentences[i] for i in range(6))] or [int(sentences[0][1])]
    edits = [e for e in all_edits(sentences, np.array(held), Change(mode, "keep", context=24, marks=(1, 1)))
             if not e.added]
    towards = Towards(reader, sentences, reader.means(sentences)[1])
    exact, screened = towards.shifts(edits), screen_shifts(towards, edits)
    assert np.isfinite(screened["screened"]).all() and len(screened["gene"]) == len(exact["gene"])


def test_the_verb_asks_for_genes_alone(second):
    loaded, _ = second
    loaded = SimpleNamespace(**vars(loaded), path=SimpleNamespace(name="second"), training={})
    table = perturb(toy("human"), loaded, state="cell_type", start="a", goal="b", min_cells=1, n_boot=10,
                    progress=False)
    assert len(table) > 10 and not table.symbol.str.startswith("<").any() and table.ensembl_id.ne("").all()
    assert table.mean_rank.min() >= 1


def test_a_run_knows_its_vector(second, tmp_path):
    "The verb reads <cls> where it is asked to, and does not go on with a run that read the mean"
    from conftest import refused
    loaded, _ = second
    loaded = SimpleNamespace(**vars(loaded), path=SimpleNamespace(name="second"), training={})
    asked = dict(state="cell_type", start="a", goal="b", min_cells=1, n_boot=10, progress=False, out=tmp_path/"run")
    mean, cls = perturb(toy("human"), loaded, **asked), {**asked, "out": None, "pool": "cls"}
    first = perturb(toy("human"), loaded, **cls)
    both = mean.merge(first, on="ensembl_id")
    assert len(both) == len(mean) and not np.allclose(both.cosine_shift_x, both.cosine_shift_y)
    refused(lambda: perturb(toy("human"), loaded, **asked, pool="cls"), "pool", "pass another out=")
