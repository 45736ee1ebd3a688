"What the tests share: small hand-made counts, a tiny model, and how a refusal must read."
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch: tests compare numbers, and share their cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, settings

from mix_geneformer.cells.genes import gene_table, map_genes
from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.files import InputError

settings.register_profile("default", max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("default")

ISLET = dict(human=["INS", "GCG", "SST", "PPY", "ARX", "PDX1"], mouse=["Ins2", "Gcg", "Sst", "Ppy", "Arx", "Pdx1"])
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, context=24)


def genes_of(species, n=40):
    "The first `n` genes of a species that have a symbol and a one-to-one ortholog"
    t = gene_table(species)
    return t.index[t.symbol.ne("") & t.ortholog.ne("")][:n].to_numpy(object)


def partners(n=40):
    "`n` human genes and their mouse orthologs, pair by pair"
    t = gene_table("human").loc[genes_of("human", n)]
    return t.index.to_numpy(object), t.ortholog.to_numpy(object)


def toy(species="human", n=24, genes=40, seed=0, dtype=np.float32):
    "Counts of two kinds of cells, with labels and donors; ortholog pairs stand in the same columns"
    ids = partners(genes)[species == "mouse"]
    rng, kind = np.random.default_rng(seed), np.arange(n) % 2
    x = rng.poisson(.6 + 5 * (np.arange(genes)[None] % 2 == kind[:, None])).astype(dtype)
    obs = pd.DataFrame(dict(cell_type=np.array(["a", "b"])[kind], donor=[f"d{i % 3}" for i in range(n)]), index=[f"{species}{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(x), obs, pd.DataFrame(dict(symbol=gene_table(species).symbol[ids].to_numpy()), index=ids))


def islet_vocab(orthologs="separate"):
    "A vocabulary of twelve islet genes with medians that a reader can divide by"
    m = dict(zip(range(6), (10, 5, 4, 2, .5, 1)))
    return vocabulary_from_medians({s: pd.Series(list(m.values()), map_genes(g).ensembl_ids) for s, g in ISLET.items()}, orthologs)


def refused(call, *parts):
    "The call is refused in one line that holds `parts` and, after a colon, a remedy; returns the line"
    with pytest.raises(InputError) as e: call()
    line = str(e.value)
    assert "\n" not in line and len(line) < 600, line
    assert ": " in line, f"no remedy: {line}"
    for p in parts: assert p in line, f"{p!r} is not in: {line}"
    return line


def files_under(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="session")
def both():
    "Human and mouse cells"
    return toy("human"), toy("mouse", seed=1)


@pytest.fixture(scope="session")
def vocab(both):
    from mix_geneformer.cells.vocabulary import Vocabulary
    return Vocabulary.build(list(both))


@pytest.fixture(scope="session")
def corpus(both, vocab, tmp_path_factory):
    "Folder of a tokenised corpus"
    from mix_geneformer.cells.tokenizer import tokenize
    out = tmp_path_factory.mktemp("shared")/"corpus"
    tokenize(list(both), vocab, out, context=TINY["context"], progress=False)
    return out


@pytest.fixture(scope="session")
def model_dir(vocab, tmp_path_factory):
    "Directory of a tiny model with random weights"
    import torch
    from mix_geneformer.encoder.checkpoints import save_model
    from mix_geneformer.encoder.model import build_model
    torch.manual_seed(0)
    return save_model(build_model(vocab, **TINY), vocab, tmp_path_factory.mktemp("shared")/"model", dict(pool="mean"))
