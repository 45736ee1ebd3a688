"A third species is one more table: what it brings, and what is refused."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import TINY, genes_of, refused, toy

from mix_geneformer.cells.counts import open_counts
from mix_geneformer.cells.genes import SPECIES, gene_table, map_genes, orthologs, register_species
from mix_geneformer.cells.vocabulary import Vocabulary, vocabulary_from_medians
from mix_geneformer.encoder.losses import ortholog_pairs
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.tokenizer import tokenize

COLUMNS = "Gene stable ID", "Gene name", "Human gene stable ID", "Human homology type", "Human orthology confidence [0 low, 1 high]"
N = 40


@pytest.fixture(autouse=True)
def only_the_known():
    "What a test registers is gone after it"
    before = dict(SPECIES)
    yield
    SPECIES.clear(), SPECIES.update(before)
    for f in (gene_table, orthologs): f.cache_clear()


def fish_ids(n=N): return np.array([f"ENSDARG{i:011d}" for i in range(n)], dtype=object)


@pytest.fixture
def table(tmp_path):
    "The first genes of human, each with one zebrafish gene; the last but one has two, the last of the fish has none"
    human = list(genes_of("human", N - 2))
    df = pd.DataFrame(dict(zip(COLUMNS, (fish_ids(), [f"fish{i}" for i in range(N)], human + [human[-1], None],
                                         ["ortholog_one2one"] * (N - 3) + ["ortholog_one2many"] * 2 + [None], [1] * (N - 1) + [None]))))
    path = tmp_path / "zebrafish.csv"
    df.to_csv(path, index=False)
    return path


def fish(path, **changed): return register_species(**{**dict(name="zebrafish", scientific="Danio rerio", prefix="ENSDARG", path=path, columns=COLUMNS), **changed})


def fish_cells(seed=2):
    a = toy("human", genes=N, seed=seed)
    return ad.AnnData(a.X, a.obs.copy(), pd.DataFrame(index=fish_ids()))


def test_names_lead_to_the_new_species(table):
    fish(table)
    assert map_genes(["fish0", "fish1"]).species == "zebrafish" and map_genes(fish_ids(3)).species == "zebrafish"
    assert map_genes(["fish0", "ENSDARG00000000001.4"], "zebrafish").ensembl_ids.tolist() == fish_ids(2).tolist()
    assert open_counts(fish_cells()).species == "zebrafish"
    assert map_genes(["INS", "GCG"]).species == "human" and map_genes(["Ins2", "Gcg"]).species == "mouse"  # the old ones as before


def test_orthologs_are_the_one_to_one_pairs_and_lead_to_mouse_through_human(table):
    fish(table)
    human = genes_of("human", N - 2)
    pairs = orthologs("zebrafish", "human")
    assert dict(zip(pairs.a, pairs.b)) == dict(zip(fish_ids(N - 3), human))
    assert orthologs("human", "zebrafish")[["a", "b"]].values.tolist() == sorted(pairs[["b", "a"]].values.tolist())
    assert len(orthologs("zebrafish", "human", one2one=False)) == N - 1
    via = orthologs("zebrafish", "mouse")
    mouse = dict(zip(human, gene_table("human").loc[human].ortholog))
    assert dict(zip(via.a, via.b)) == {f: mouse[h] for f, h in zip(pairs.a, pairs.b)}


def test_three_species_share_tokens_where_the_table_says_so(table):
    fish(table)
    human, mouse, zebrafish = toy("human", genes=N), toy("mouse", genes=N, seed=1), fish_cells()
    vocab = Vocabulary.build([human, mouse, zebrafish], orthologs="shared")
    assert vocab.species == ("human", "mouse", "zebrafish")
    token = lambda s, ids: vocab.columns(ids, s)[0]
    shared = token("human", genes_of("human", N - 3))
    assert (shared >= 2).all() and np.array_equal(shared, token("zebrafish", fish_ids(N - 3)))
    assert np.array_equal(shared, token("mouse", gene_table("human").loc[genes_of("human", N - 3)].ortholog))
    alone = token("zebrafish", fish_ids()[-3:])
    assert (alone >= 2).all() and not set(alone) & set(vocab.frame.token[~vocab.frame.species.eq("zebrafish")])
    apart = Vocabulary.build([human, mouse, zebrafish])
    assert len(apart) == 2 + len(apart.frame) == apart.frame.token.nunique() + 2


def test_the_ortholog_loss_draws_every_species_to_the_first(table):
    fish(table)
    of = dict(human=toy("human", genes=N), mouse=toy("mouse", genes=N, seed=1), zebrafish=fish_cells())
    named = lambda *species: {tuple(v.describe(p).ensembl_id) for v in [Vocabulary.build([of[s] for s in species])] for p in ortholog_pairs(v)}
    fishes = set(zip(genes_of("human", N - 3), fish_ids()))
    assert named("human", "zebrafish") == fishes and named("human", "mouse", "zebrafish") == named("human", "mouse") | fishes
    assert named("mouse", "zebrafish") == {(gene_table("human").ortholog[h], f) for h, f in fishes}             # the fish's table knows human alone




@pytest.mark.parametrize("orthologs", ["separate", "shared", "tied"])
def test_a_model_reads_all_three(table, tmp_path, orthologs):
    "From counts to vectors; with shared tokens and equal medians a renamed cell is the same sentence"
    import torch
    from mix_geneformer.encoder.states import cell_vectors
    from mix_geneformer.encoder.checkpoints import load_model
    from mix_geneformer.pretraining import pretrain
    fish(table)
    cells = [toy("human", genes=N), toy("mouse", genes=N, seed=1), fish_cells()]
    vocab = Vocabulary.build(cells, orthologs)
    corpus = tokenize(cells, vocab, tmp_path / "corpus", TINY["context"], progress=False)
    assert sorted(set(corpus["species"][:])) == ["human", "mouse", "zebrafish"]
    loaded = load_model(pretrain(corpus, tmp_path / "model", batch_size=8, max_steps=2, device="cpu", progress=False, **TINY), device="cpu")
    assert Vocabulary.load(tmp_path / "model") == vocab
    x = cell_vectors(loaded, encode_cells(fish_cells(), vocab, TINY["context"]))
    assert x.shape == (24, TINY["hidden_size"]) and np.isfinite(x).all()


def test_a_renamed_cell_is_the_same_sentence(table):
    fish(table)
    n = N - 3
    ids = {"human": genes_of("human", n), "zebrafish": fish_ids(n)}
    vocab = vocabulary_from_medians({s: pd.Series(np.arange(1., n + 1), g) for s, g in ids.items()}, "shared")
    x = toy("human", genes=N).X[:, :n]
    a, b = (encode_cells(ad.AnnData(sp.csr_matrix(x), var=pd.DataFrame(index=g)), vocab, 24) for g in ids.values())
    assert np.array_equal(a.values, b.values) and np.array_equal(a.offsets, b.offsets)


# --- what is refused ---------------------------------------------------------------------------------------------

def test_a_mixture_is_refused(table):
    fish(table)
    refused(lambda: map_genes([*fish_ids(2), *genes_of("human", 3)]), "more than one species", "3 human", "2 zebrafish")
    refused(lambda: map_genes(fish_ids(2), "mouse"), "species='mouse' was given", "2 of 2", "zebrafish")


def test_no_table_leads_there(table):
    fish(table, name="frog", scientific="Xenopus tropicalis", other="chicken")
    refused(lambda: orthologs("frog", "mouse"), "No ortholog table leads from frog to mouse", "register")
    refused(lambda: gene_table("axolotl"), "Unknown species 'axolotl'", "register_species")


def test_wrong_prefix(table):
    fish(table, prefix="ENSXETG")
    refused(lambda: gene_table("zebrafish"), "0 of 40", "ENSXETG", "ENSDARG00000000000", "prefix=")


def test_missing_column(table):
    fish(table, columns=(*COLUMNS[:4], "Mouse confidence"))
    refused(lambda: gene_table("zebrafish"), "lacks 1 of 5 columns", "Mouse confidence", "columns=")
    refused(lambda: fish(table, columns=COLUMNS[:4]), "4 columns", "5")


def test_missing_file(tmp_path):
    fish(tmp_path / "gone.csv")
    refused(lambda: gene_table("zebrafish"), "gone.csv", "0 tables", "path=")


def test_name_or_prefix_taken(table):
    refused(lambda: fish(table, name="mouse"), "'mouse'", "Mus musculus", "another")
    refused(lambda: fish(table, prefix="ENSG"), "'ENSG'", "Homo sapiens", "another")
    assert SPECIES["mouse"].prefix == "ENSMUSG" and "zebrafish" not in SPECIES
    assert fish(table) == fish(table)  # the same again is no conflict
