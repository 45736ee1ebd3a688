"What the tests share: small hand-made counts, a tiny model, and how a refusal must read."
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch: tests compare numbers, and share their cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, settings

from mix_geneformer.cells.corpora import fetch
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.genes import SPECIES, gene_table, orthologs, register_species
from mix_geneformer.cells.names import map_genes
from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.files import InputError

settings.register_profile("default", max_examples=60, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    obs = pd.DataFrame(dict(cell_type=np.array(["a", "b"])[kind], donor=[f"d{i % 3}" for i in range(n)]),
                       index=[f"{species}{i}" for i in range(n)])
    var = pd.DataFrame(dict(symbol=gene_table(species).symbol[ids].to_numpy()), index=ids)
    return ad.AnnData(sp.csr_matrix(x), obs, var)


def islet_vocab(orthologs="separate"):
    "A vocabulary of twelve islet genes with medians that a reader can divide by"
    medians = [10., 5., 4., 2., .5, 1.]
    of_species = {s: pd.Series(medians, map_genes(g).ensembl_ids) for s, g in ISLET.items()}
    return vocabulary_from_medians(of_species, orthologs)


def refused(call, *parts):
    "The call is refused in one line that holds `parts` and, after a colon, a remedy; returns the line"
    with pytest.raises(InputError) as e: call()
    line = str(e.value)
    assert "\n" not in line and len(line) < 600, line
    assert ": " in line, f"no remedy: {line}"
    for p in parts: assert p in line, f"{p!r} is not in: {line}"
    return line


def pytest_sessionfinish(session):
    import reliability
    reliability.write()


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


# --- real cells -----------------------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parents[2]/"shared"/"data"   # more real cells, where they are
PANCREAS = dict(human="c0fca7f46d5ae82d8b5753ed5ce246cded66e2e870face389bd11084aab17700",
                mouse="5b6a0c474990e2968a9c6bbfb882ccb69e063d9c5386011198f099a25bcc31ed")


@pytest.fixture(scope="session")
def pancreas():
    "The corpus that is fetched where none is named"
    try: return fetch("pancreas")
    except InputError as e: pytest.skip(f"the pancreas corpus is neither cached nor to be had: {e}")


@pytest.fixture(scope="session")
def pancreas_counts(pancreas): return {s: read_counts(p, verbose=False) for s, p in pancreas.files.items()}


# --- a third species ------------------------------------------------------------------------------------------------

FISHES = 40   # genes of it
FISH_COLUMNS = ("Gene stable ID", "Gene name", "Human gene stable ID", "Human homology type",
                "Human orthology confidence [0 low, 1 high]")


@pytest.fixture
def only_the_known():
    "What a test registers is gone after it"
    before = dict(SPECIES)
    yield
    SPECIES.clear(), SPECIES.update(before)
    for f in (gene_table, orthologs): f.cache_clear()


def fish_ids(n=FISHES): return np.array([f"ENSDARG{i:011d}" for i in range(n)], dtype=object)


@pytest.fixture
def fish_table(only_the_known, tmp_path):
    "The first genes of human, each with one zebrafish gene; the last but one has two, the last of the fish has none"
    human = list(genes_of("human", FISHES - 2))
    kind = ["ortholog_one2one"] * (FISHES - 3) + ["ortholog_one2many"] * 2 + [None]
    sure = [1] * (FISHES - 1) + [None]
    rows = fish_ids(), [f"fish{i}" for i in range(FISHES)], [*human, human[-1], None], kind, sure
    pd.DataFrame(dict(zip(FISH_COLUMNS, rows))).to_csv(tmp_path/"zebrafish.csv", index=False)
    return tmp_path/"zebrafish.csv"


def fish(path, **changed):
    "Register zebrafish, or something like it"
    asked = dict(name="zebrafish", scientific="Danio rerio", prefix="ENSDARG", path=path, columns=FISH_COLUMNS)
    return register_species(**{**asked, **changed})


def fish_cells(seed=2):
    a = toy("human", genes=FISHES, seed=seed)
    return ad.AnnData(a.X, a.obs.copy(), pd.DataFrame(index=fish_ids()))
