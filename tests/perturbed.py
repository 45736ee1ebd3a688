"What the tests of reading and of perturbation share: a tiny model, cells written down, and a reader of both."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from transformers import BertConfig, BertForMaskedLM

from mix_geneformer.cells.sentences import Sentences
from mix_geneformer.encoder.states import Budget, Reader
from mix_geneformer.perturbation.edits import Change, all_edits
from mix_geneformer.perturbation.shifts import Towards

N_GENES, CONTEXT = 60, 24


def tiny(size, context=CONTEXT, types=2, spread=.5):
    "Random weights; with a spread of 0.5 attention is peaked and shifts are large, with BERT's 0.02 a gene is little"
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=context, type_vocab_size=types, initializer_range=spread)).eval()


class Words:
    "What a reader asks of a vocabulary: whether, and how, species are told apart."
    marks = (), ()
    def __init__(self, orthologs="separate"): self.orthologs = orthologs
    def species_index(self, species): return np.array([["human", "mouse"].index(s) for s in species])


def told(cells, species="human"):
    "Sentences, written down."
    return Sentences(np.concatenate(cells), np.cumsum([0, *map(len, cells)]), species)


def reader_of(model, tokens=4096, context=None, orthologs="separate", **how):
    "A reader of a model, with batches of so many tokens."
    context = context or model.config.max_position_embeddings
    return Reader(SimpleNamespace(model=model, vocab=Words(orthologs), context=context), Budget(tokens), **how)


def shifts_of(reader, cells, genes, goal, mode="delete", positions="shift", how="each", run=None):
    "The shift of every change of every cell."
    change = Change(mode, positions, how, reader.loaded.context)
    return Towards(reader, cells, goal).all_shifts(all_edits(cells, np.asarray(genes), change), run)


def near(a, b): pd.testing.assert_frame_equal(a, b, rtol=0, atol=1e-6)
