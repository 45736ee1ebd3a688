"What the tests of the encoder share: a model whose parts all matter, batches for it, the equations in plain loops."
import math

import numpy as np
import pandas as pd
import torch
from conftest import TINY, partners

from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.encoder.batches import pad
from mix_geneformer.encoder.model import build_model

KINDS = ["separate", "shared", "tied"]


def two_species(orthologs="separate", n=40):
    a, b = partners(n)
    return vocabulary_from_medians(dict(human=pd.Series(1., a), mouse=pd.Series(1., b)), orthologs)


def tiny(vocab, **kw):
    "A model whose parts all matter: weights far from zero"
    torch.manual_seed(0)
    net = build_model(vocab, **{**TINY, **kw})
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, std=0.3, mean=1.0 if "LayerNorm.weight" in name else 0.0)
    with torch.no_grad(): net.bert.embeddings.word_embeddings.weight[0] = 0
    return net.eval()


def batch_of(lengths, vocab, seed=0, types=None):
    rng = np.random.default_rng(seed)
    return pad(
        np.concatenate([rng.permutation(np.arange(vocab.n_special, len(vocab)))[:n] for n in lengths]), lengths, types
    )


def row(batch, i):
    "One cell of a batch by itself, without padding"
    n = int(batch["attention_mask"][i].sum())
    return {k: v[i:i + 1, :n] for k, v in batch.items()}


def labels_for(batch, seed=0, p=.3):
    g = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(batch["input_ids"].shape, generator=g) < p) & batch["attention_mask"].bool()
    chosen[:, 0] = True
    return torch.where(chosen, batch["input_ids"], -100)


def types_of(kind, n): return [i % 2 for i in range(n)] if kind == "tied" else None


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)


def cos(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


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


def equation_2(net, batch, labels):
    "Minus the log-probability of the true token, position by position, by the dense head"
    logits, terms = net(**batch).logits.double(), []
    for i in range(len(labels)):
        for j in range(labels.shape[1]):
            if labels[i, j] == -100: continue
            z = logits[i, j].tolist()
            terms.append(-z[labels[i, j]] + max(z) + math.log(sum(math.exp(v - max(z)) for v in z)))
    return sum(terms) / len(terms)
