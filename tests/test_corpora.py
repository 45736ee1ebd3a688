"Real cells: the sentences of the pancreas corpus, and further real files of both species read and tokenise"
import hashlib

import anndata as ad
import numpy as np
import pytest

from conftest import DATA
from mix_geneformer.cells.counts import as_counts
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.tokenizer import tokenize


@pytest.fixture(scope="module")
def read(pancreas_counts): return pancreas_counts


@pytest.fixture(scope="module")
def vocab(pancreas): return Vocabulary.build(pancreas)


@pytest.fixture(scope="module")
def sentences(read, vocab): return {s: encode_cells(a, vocab) for s, a in read.items()}


pytestmark = pytest.mark.filterwarnings("ignore:.*was written without encoding metadata")


def digest(sentences): return hashlib.sha256(sentences.values.astype("<i4").tobytes()).hexdigest()[:16]


# --- the pancreas corpus -----------------------------------------------------------------------------------------

GOLDEN = dict(vocabulary="881d27808dceddc5", human="84f316e632d33dcc", mouse="061896d95ff562f0")


def test_golden_tokens(vocab, sentences):
    "The first hundred sentences of each species, over releases and machines; a change here makes every trained model another"
    assert dict(vocabulary=vocab.hash, **{s: digest(t.take(range(100))) for s, t in sentences.items()}) == GOLDEN
    assert len(vocab) == 29_438 and vocab.frame.species.value_counts().to_dict() == dict(human=15_442, mouse=13_994)


def test_sentences_of_real_cells_are_the_definition(read, vocab, sentences):
    for s, a in read.items():
        f = vocab.frame[vocab.frame.species.eq(s)].set_index("ensembl_id")
        for i in (0, 7, a.n_obs - 1):
            x = a.X[i]
            value = {f.token[g]: (c / a.obs.n_counts.iloc[i] * 10_000) / f["median"][g] for g, c in zip(a.var_names[x.indices], x.data.astype(float)) if g in f.index}
            got = sentences[s][i]
            assert len(got) == min(2048, len(value)) == len(set(got))
            v = np.array([value[t] for t in got])
            assert (v[:-1] >= v[1:] * (1 - 1e-12)).all() and v[-1] >= np.sort(list(value.values()))[-len(got)] * (1 - 1e-12)


def test_every_real_cell_is_ranked_to_the_last_bit(read, vocab, sentences):
    "Of every cell: the float64 quotients sorted by a plain stable sort, ties to the lower token"
    for s, a in read.items():
        tokens, medians = vocab.columns(a.var_names, s)
        for i, (x, y) in enumerate(zip(a.X.indptr, a.X.indptr[1:])):
            t, value = tokens[a.X.indices[x:y]], a.X.data[x:y] / medians[a.X.indices[x:y]]
            t, value = t[t >= 0], value[t >= 0]
            assert (sentences[s][i] == t[np.lexsort((t, -value))][:2048]).all()


def test_real_cells_alone_and_in_blocks(read, vocab, sentences):
    for s, a in read.items():
        pick = np.random.default_rng(0).choice(a.n_obs, 5, replace=False)
        some = encode_cells(a[pick].copy(), vocab)
        assert all((some[k] == sentences[s][i]).all() for k, i in enumerate(pick))


def test_the_corpus_on_disk(pancreas, vocab, sentences, tmp_path):
    ds = tokenize(pancreas, vocab, tmp_path/"corpus", context=256, progress=False)
    assert len(ds) == 4028 and set(ds.column_names) == {"input_ids", "length", "species", "cell_ontology_class", "donor", "organ"}
    back = sentences_of(ds)
    assert (np.asarray(back.species) == np.repeat(["human", "mouse"], [2142, 1886])).all()
    for i in (0, 2141, 2142, 4027):
        s, k = ("human", i) if i < 2142 else ("mouse", i - 2142)
        assert (back[i] == sentences[s][k][:256]).all()


def test_hormones_lead_their_cells(read, vocab, sentences, pancreas):
    "Glucagon ranks far earlier in alpha than in beta cells, in both species; insulin the other way round"
    for species, glucagon, insulin in (("human", "GCG", "INS"), ("mouse", "Gcg", "Ins2")):
        kind, s = read[species].obs[pancreas.label].to_numpy(), sentences[species]
        for gene, mine, other in ((glucagon, "pancreatic A cell", "type B pancreatic cell"), (insulin, "type B pancreatic cell", "pancreatic A cell")):
            t = vocab.lookup(gene, species)[0]
            rank = lambda k: np.median([w[0] if len(w := np.flatnonzero(s[i] == t)) else 2048 for i in np.flatnonzero(kind == k)])
            assert rank(mine) < .5 * rank(other), (species, gene, rank(mine), rank(other))


def test_orthologs_of_real_vocabularies(read):
    shared, tied = (Vocabulary.build(list(read.values()), o) for o in ("shared", "tied"))
    f = shared.frame
    n = f.token.duplicated().sum()
    assert n > 11_000 and len(shared) == len(tied) == 29_438 - n and f.token.value_counts().max() == 2           # a pair, never three
    pair = f[f.token.isin(shared.lookup(["GCG", "PDX1", "ARX"], "human"))]
    assert sorted(pair.symbol) == ["ARX", "Arx", "GCG", "Gcg", "PDX1", "Pdx1"]


def test_medians_of_a_file_and_of_what_was_read_from_it_agree(read, vocab): assert Vocabulary.build(list(read.values())) == vocab


# --- more real cells ---------------------------------------------------------------------------------------------

FILES = {   # cells, genes, donors, smallest share of counts matched
    "human_pancreas_baron": (3607, 20125, 4, .95), "human_pbmc_10x3k": (2700, 32738, 1, .99), "human_pbmc_kang_ifnb": (13576, 14053, 9, .8),
    "mouse_bonemarrow_stroma_matsushita": (250, 20243, 1, .9), "mouse_brain_midbrain_lamanno": (243, 18219, 27, .9), "mouse_gut_mca": (219, 14688, 5, .9),
    "mouse_kidney_tabulamuris": (215, 23341, 6, .8), "mouse_pancreas_baron": (1886, 14877, 2, .95), "mouse_skin_joost": (720, 24378, 34, .8), "mouse_spleen_jaitin": (3751, 20107, 14, .7)}


@pytest.fixture
def shared(request):
    path = DATA/f"{request.param}.h5ad"
    if not path.is_file(): pytest.skip(f"{path.name} is not on this machine")
    return path


@pytest.mark.parametrize("shared", FILES, indirect=True)
def test_further_files(shared, record_property):
    cells, genes, donors, share = FILES[shared.stem]
    species = shared.stem.split("_")[0]
    counts = as_counts(shared)
    assert (counts.species, counts.n_obs, counts.n_names) == (species, cells, genes) and counts.obs.donor.nunique() == donors and set(counts.obs.species) == {species}
    x, total = counts.block(0, min(cells, 500))
    matched = float(x.sum(dtype=np.float64) / total.sum())
    record_property("matched", f"{counts.n_matched / genes:.1%} of the genes, {matched:.1%} of the counts")
    assert matched > share and len(set(counts.ensembl_ids)) == len(counts.ensembl_ids) and f"{counts.n_matched:,} of {genes:,} genes matched" in repr(counts)
    assert (total == counts.obs.n_counts.to_numpy()[:500]).all()                     # the file's own totals: duplicates are summed, nothing is lost
    part = ad.read_h5ad(shared)[:200].copy()
    v = Vocabulary.build([part])
    ds = tokenize(part, v, context=512, keep=["cell_type", "donor"], progress=False)
    s = encode_cells(part, v, 512)
    assert set(ds["species"]) == {species} and len(ds) == min(cells, 200) and [list(r) for r in ds["input_ids"]] == [s[i].tolist() for i in range(len(s))]
    assert list(ds["donor"]) == part.obs.donor.astype(str).tolist() and v.species == (species,) and all(len(set(r)) == len(r) for r in ds["input_ids"])


@pytest.mark.parametrize("shared", ["human_pancreas_baron", "mouse_pancreas_baron"], indirect=True)
def test_one_cell_in_two_files_is_one_sentence(shared, read, vocab, sentences):
    "The pancreas cells are in both places, in another order, one with symbols and one with IDs beside them"
    species = shared.stem.split("_")[0]
    other = ad.read_h5ad(shared)
    names = read[species].obs_names[:60]
    other = other[names].copy()
    del other.var["ensembl_id"]
    found = encode_cells(other, vocab)
    assert all((found[i] == sentences[species][i]).all() for i in range(60))
