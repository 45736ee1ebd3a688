"A species token leads, and is never predicted"
import numpy as np

from conftest import TINY, refused, toy
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.masking import mask_tokens
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.perturbation.verb import perturb
from mix_geneformer.pretraining import pretrain


def sides(n=80, genes=40):
    "Both species' cells, as `read_counts` gives them"
    return [read_counts(toy(s, n, genes, seed), verbose=False) for seed, s in enumerate(("human", "mouse"))]


def test_a_species_token_leads_and_is_never_predicted(tmp_path):
    human, mouse = sides()
    vocab, plain = (Vocabulary.build([human, mouse], species_token=t) for t in (True, False))
    assert vocab.specials == ("<pad>", "<mask>", "<human>", "<mouse>") and Vocabulary.load(vocab.save(tmp_path).parent) == vocab
    for a, first in ((human, 2), (mouse, 3)):
        with_, without = encode_cells(a, vocab, 24), encode_cells(a, plain, 23)
        assert (with_.values[with_.offsets[:-1]] == first).all()
        assert [with_[i][1:].tolist() for i in range(a.n_obs)] == [(without[i] + 2).tolist() for i in range(a.n_obs)]
    corpus = tokenize([human, mouse], vocab, tmp_path/"corpus", 24, progress=False)
    ids, n = sentences_of(corpus).flat(np.arange(len(corpus)))
    chosen = mask_tokens(ids, n, np.arange(len(corpus)), len(vocab), vocab.n_special, mlm_probability=.9)[1]
    assert chosen.any() and not chosen[ids < vocab.n_special].any()
    model = pretrain(corpus, tmp_path/"model", **TINY, max_steps=1, progress=False)
    refused(lambda: perturb(human, model, state="cell_type", start="a", goal="b", progress=False), "<human>, <mouse>", "species_token")
    assert load_model(model).vocab == vocab
