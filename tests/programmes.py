"Cells that a model can learn something of: each holds genes of one of four programmes."

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.sentences import Sentences
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.learnt import Apart

GENES, CONTEXT = 120, 24
SMALL = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    context=CONTEXT,
    attention_probs_dropout_prob=0.0,
)
MIXED = dict(
    SMALL,
    batch_size=16,
    simcse_weight=0.0,
    learning_rate=3e-3,
    warmup_steps=1,
    held_out=0.2,
    study_power=0.5,
    epoch_cells=96,
    length_window=1,
    epochs=99,
    progress=False,
)


def a_study(name, n, seed, programmes=4):
    "Cells that each hold 20 of the 30 genes of one of four programmes."
    draw, x = np.random.default_rng(seed), np.zeros((n, GENES), np.float32)
    for i, row in enumerate(x):
        row[30 * (i % programmes) + draw.permutation(30)[:20]] = draw.permutation(20) + 1
    obs = pd.DataFrame(
        dict(
            study=name,
            donor=[f"{name}{i % 5}" for i in range(n)],
            cell_type=[f"type {i % programmes}" for i in range(n)],
        )
    )
    obs.index = [f"{name}-{i}" for i in range(n)]
    return AnnData(csr_matrix(x), obs, pd.DataFrame(index=gene_table("human").index[:GENES]))


def studies_corpus(out):
    "Two tokenised studies, of 160 and 60 cells."
    cells = [a_study("a", 160, 0), a_study("b", 60, 1)]
    tokenize(cells, Vocabulary.build(cells), out, CONTEXT, ["study", "donor", "cell_type"], progress=False)
    return out


def four_programmes():
    "A vocabulary, and 240 sentences of four programmes."
    names = [f"ENSG{i:011d}" for i in range(GENES)]
    vocab = Vocabulary(
        pd.DataFrame(
            dict(token=range(2, GENES + 2), ensembl_id=names, symbol=names, species="human", median=1.0, ortholog="")
        )
    )
    draw = np.random.default_rng(0)
    words = [2 + 30 * (i % 4) + draw.permutation(30)[:20] for i in range(240)]
    return vocab, Sentences(np.concatenate(words), np.arange(241) * 20, "human")


def apart_of(cells):
    vocab, s = cells
    part = np.where(np.arange(240) < 200, "train", "held out")
    return Apart(s, vocab, CONTEXT, part, np.full(240, "a"), types=np.arange(240) % 4)
