"How counts become sentences: every format, real cells to the last token, threads and memory."

import hashlib
import threading
import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import FISHES as N
from conftest import ISLET, files_under, fish, fish_ids, genes_of, islet_vocab, toy
from handmade import FORMATS, in_no_order, made_as
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked import COUNTS, GENES, MEDIANS, by_definition, cells, content, rows, vocabulary

from mix_geneformer.cells import encoding, ranking
from mix_geneformer.cells.counts import as_counts, read_counts
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.medians import gene_medians
from mix_geneformer.cells.ranking import rank_tokens
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary, vocabulary_from_medians

@pytest.fixture(scope="module")
def source():
    return in_no_order()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_cells(source, vocab, tmp_path, name):
    made, how = made_as(name, source, tmp_path)
    opened = as_counts(made, **how)
    assert rows(encode_cells(opened, vocab)) == rows(encode_cells(source, vocab))
    pd.testing.assert_series_equal(gene_medians(opened), gene_medians(source))
    assert Vocabulary.build(opened) == Vocabulary.build(source)
    ds = tokenize(opened, vocab, tmp_path / "corpus", keep=[], progress=False)
    assert [list(r) for r in ds["input_ids"]] == rows(encode_cells(source, vocab))


@pytest.mark.parametrize("name", ["h5ad_csr", "h5ad_dense", "loom_ids"])
def test_files_are_read_in_blocks(source, vocab, tmp_path, name):
    whole, opened = encode_cells(source, vocab), as_counts(FORMATS[name](source, tmp_path))
    for size in (1, 7, 33, 100):
        blocks = list(opened.blocks(size))
        assert [s for s, *_ in blocks] == list(range(0, 33, size)) and all(x.shape[0] <= size for _, x, _ in blocks)
        flat = np.concatenate(
            [ranking.rank_tokens(x, *vocab.columns(opened.ensembl_ids, "human"))[0] for _, x, _ in blocks]
        )
        assert flat.tolist() == whole.values.tolist()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "Files of 4 and of 16 blocks of cells"
    folder, x = tmp_path_factory.mktemp("many"), toy(n=1024)
    for n in (4, 16):
        ad.AnnData(
            sp.vstack([x.X] * n, format="csr"), pd.DataFrame(index=[str(i) for i in range(n * 1024)]), x.var
        ).write_h5ad(folder / f"{n}.h5ad", compression="gzip")
    return folder


def test_threads_do_not_change_a_byte(paths, many, vocab, tmp_path):
    for n in (1, 2, 5):
        tokenize([*paths, many / "4.h5ad"], vocab, tmp_path / str(n), keep=[], threads=n, progress=False)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "5") and files_under(
        tmp_path / "1"
    ) == files_under(tmp_path / "5")
    assert rows(encode_cells(many / "4.h5ad", vocab, threads=3)) == rows(
        encode_cells(many / "4.h5ad", vocab, threads=1)
    )


def test_memory_is_flat_in_cells(many, vocab, monkeypatch):
    "However many blocks a file has, a few of them are there at a time"
    opened = {name: as_counts(many / name) for name in ("4.h5ad", "16.h5ad")}

    def blocks(name, use=lambda b: None):
        counts = opened[name]
        for b in encoding.CellEncoder(counts, vocab, 2048).blocks(threads=2):
            use(b)

    real, lock, held, most, peak = encoding.CellEncoder.block, threading.Lock(), [0], [0], {}

    def count(n):
        with lock:
            held[0] += n
            most[0] = max(most[0], held[0])

    with monkeypatch.context() as m:
        m.setattr(encoding.CellEncoder, "block", lambda *a: (count(1), real(*a))[1])
        blocks("16.h5ad", lambda b: count(-1))
    assert held[0] == 0 and most[0] <= 3
    for name in opened:
        tracemalloc.start()
        blocks(name)
        peak[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak["16.h5ad"] < 1.5 * peak["4.h5ad"]


@settings(max_examples=40)
@given(COUNTS, MEDIANS, st.lists(st.integers(1, 1000), min_size=6, max_size=6))
def test_depth_of_a_cell_does_not_matter(x, medians, factors):
    v = vocabulary(medians)
    assert rows(encode_cells(cells(x), v)) == rows(encode_cells(cells(x * np.array(factors)[: len(x), None]), v))


@settings(max_examples=30)
@given(COUNTS, MEDIANS, st.randoms(use_true_random=False))
def test_order_of_genes_and_cells_does_not_matter(x, medians, random):
    v, col, row = vocabulary(medians), list(range(len(GENES))), list(range(len(x)))
    random.shuffle(col), random.shuffle(row)
    plain = rows(encode_cells(cells(x), v))
    assert rows(encode_cells(cells(x[:, col], GENES[col]), v)) == plain
    assert rows(encode_cells(cells(x[row]), v)) == [plain[i] for i in row]


@settings(max_examples=25)
@given(COUNTS, MEDIANS, st.integers(1, 7), st.integers(1, 14))
def test_blocks_and_batches_do_not_matter(x, medians, size, context):
    v, counts = vocabulary(medians), as_counts(cells(x))
    columns = v.columns(counts.ensembl_ids, "human")
    parts = [rank_tokens(block, *columns, context) for _, block, _ in counts.blocks(size)]
    blocked = [f[a:b].tolist() for f, o in parts for a, b in zip(o[:-1], o[1:])]
    alone = [encode_cells(cells(x)[i], v, context)[0].tolist() for i in range(len(x))]
    assert (
        blocked
        == alone
        == rows(encode_cells(cells(x), v, context))
        == [by_definition(r, range(2, 14), medians, context) for r in x[:, np.argsort(GENES)]]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint16])
@pytest.mark.parametrize(
    "kind", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, np.asarray], ids=["csr", "csc", "csr_array", "dense"]
)
def test_number_type_and_layout_do_not_matter(dtype, kind):
    a = toy(n=30)
    v = Vocabulary.build(a)
    other = ad.AnnData(kind(a.X.toarray().astype(dtype)), a.obs, a.var)
    assert rows(encode_cells(other, v)) == rows(encode_cells(a, v))
    pd.testing.assert_series_equal(gene_medians(other), gene_medians(a))


def test_views_and_unsorted_or_stored_zero_entries_do_not_matter():
    a = toy(n=9)
    v, plain = Vocabulary.build(a), rows(encode_cells(toy(n=9), Vocabulary.build(a)))
    x = a.X.copy()
    for i, j in zip(x.indptr[:-1], x.indptr[1:]):
        x.indices[i:j], x.data[i:j] = x.indices[i:j][::-1].copy(), x.data[i:j][::-1].copy()
    x.has_sorted_indices = False
    assert rows(encode_cells(ad.AnnData(x, var=a.var), v)) == plain
    dense, (i, j) = a.X.toarray(), np.indices(a.shape).reshape(2, -1)
    # zeros are stored
    assert rows(encode_cells(ad.AnnData(sp.csr_matrix((dense.ravel(), (i, j)), a.shape), var=a.var), v)) == plain
    assert rows(encode_cells(a[[7, 2]], v)) == [plain[7], plain[2]]


@settings(max_examples=25)
@given(COUNTS, MEDIANS)
def test_duplicate_genes_are_summed(x, medians):
    v, symbol = vocabulary(medians), gene_table("human").symbol
    half = x // 2
    names = list(GENES) + [f"{g}.{i + 1}" for i, g in enumerate(GENES)]  # the same genes with a version
    assert rows(encode_cells(cells(np.hstack([half, x - half]), names), v)) == rows(encode_cells(cells(x), v))
    assert (
        read_counts(cells(np.hstack([half, x - half]), names), verbose=False).X.toarray() == x[:, np.argsort(GENES)]
    ).all()
    names = [symbol[g] for g in GENES] + list(GENES)  # symbols beside IDs
    assert rows(encode_cells(cells(np.hstack([x - half, half]), names), v)) == rows(encode_cells(cells(x), v))


@settings(max_examples=25)
@given(COUNTS, MEDIANS, st.lists(st.integers(0, 9999), min_size=3, max_size=3))
def test_unmapped_genes_and_genes_outside_the_vocabulary_do_not_matter(x, medians, more):
    v, outside = vocabulary(medians), genes_of("human", 13)[-1]
    wide = np.hstack([x, np.tile(more, (len(x), 1))])
    assert rows(encode_cells(cells(wide, [*GENES, "gene_1", "ERCC-00002", outside]), v)) == rows(
        encode_cells(cells(x), v)
    )


def test_a_sentence_has_no_gene_twice_and_no_special():
    for s in rows(encode_cells(toy(n=50), Vocabulary.build(toy(n=50)))):
        assert len(set(s)) == len(s) and min(s) >= 2


@pytest.mark.parametrize(
    "species,orthologs,symbols,tokens",
    [
        ("human", "separate", ["PDX1", "SST", "ARX", "INS", "GCG"], [5, 6, 2, 7, 4]),
        ("mouse", "separate", ["Sst", "Pdx1", "Ins2", "Arx", "Gcg"], [10, 12, 8, 13, 9]),
        ("human", "shared", ["PDX1", "SST", "ARX", "INS", "GCG"], [5, 6, 2, 7, 4]),
        ("mouse", "shared", ["Pdx1", "Sst", "Arx", "Ins2", "Gcg"], [5, 6, 2, 8, 4]),  # Ins2 has no one-to-one ortholog
        ("mouse", "tied", ["Pdx1", "Sst", "Arx", "Ins2", "Gcg"], [5, 6, 2, 8, 4]),
    ],
)
def test_hand_computed_sentences(species, orthologs, symbols, tokens):
    v = islet_vocab(orthologs)
    s = encode_cells(cells([[20, 5, 12, 0, 1, 3]], ISLET[species]), v)
    assert s[0].tolist() == tokens and s.species.tolist() == [species]
    assert v.describe(s[0], species).symbol.tolist() == symbols
    assert encode_cells(cells([[20, 5, 12, 0, 1, 3]], ISLET[species]), v, context=2)[0].tolist() == tokens[:2]


def digest(sentences):
    return hashlib.sha256(sentences.values.astype("<i4").tobytes()).hexdigest()[:16]


# with the genes that the files call by an earlier name
GOLDEN = dict(vocabulary="8a83e46fc01b7ea6", human="d3a9915b3fe0323b", mouse="b5d6f42bdebe46b4")


def test_golden_tokens(pancreas_vocab, sentences):
    """The first hundred sentences of each species, over releases and machines; a change here makes every trained
    model another"""
    assert (
        dict(vocabulary=pancreas_vocab.hash, **{s: digest(t.take(range(100))) for s, t in sentences.items()}) == GOLDEN
    )
    assert len(pancreas_vocab) == 31_146 and pancreas_vocab.frame.species.value_counts().to_dict() == dict(
        human=16_366, mouse=14_778
    )


def test_sentences_of_real_cells_are_the_definition(read, pancreas_vocab, sentences):
    for s, a in read.items():
        f = pancreas_vocab.frame[pancreas_vocab.frame.species.eq(s)].set_index("ensembl_id")
        for i in (0, 7, a.n_obs - 1):
            x = a.X[i]
            value = {
                f.token[g]: (c / a.obs.n_counts.iloc[i] * 10_000) / f["median"][g]
                for g, c in zip(a.var_names[x.indices], x.data.astype(float))
                if g in f.index
            }
            got = sentences[s][i]
            assert len(got) == min(2048, len(value)) == len(set(got))
            v = np.array([value[t] for t in got])
            assert (v[:-1] >= v[1:] * (1 - 1e-12)).all() and v[-1] >= np.sort(list(value.values()))[-len(got)] * (
                1 - 1e-12
            )


def test_every_real_cell_is_ranked_to_the_last_bit(read, pancreas_vocab, sentences):
    "Of every cell: the float64 quotients sorted by a plain stable sort, ties to the lower token"
    for s, a in read.items():
        tokens, medians = pancreas_vocab.columns(a.var_names, s)
        for i, (x, y) in enumerate(zip(a.X.indptr, a.X.indptr[1:])):
            t, value = tokens[a.X.indices[x:y]], a.X.data[x:y] / medians[a.X.indices[x:y]]
            t, value = t[t >= 0], value[t >= 0]
            assert (sentences[s][i] == t[np.lexsort((t, -value))][:2048]).all()


def test_real_cells_alone_and_in_blocks(read, pancreas_vocab, sentences):
    for s, a in read.items():
        pick = np.random.default_rng(0).choice(a.n_obs, 5, replace=False)
        some = encode_cells(a[pick].copy(), pancreas_vocab)
        assert all((some[k] == sentences[s][i]).all() for k, i in enumerate(pick))


def test_hormones_lead_their_cells(read, pancreas_vocab, sentences, pancreas):
    "Glucagon ranks far earlier in alpha than in beta cells, in both species; insulin the other way round"
    for species, glucagon, insulin in (("human", "GCG", "INS"), ("mouse", "Gcg", "Ins2")):
        kind, s = read[species].obs[pancreas.label].to_numpy(), sentences[species]
        for gene, mine, other in (
            (glucagon, "pancreatic A cell", "type B pancreatic cell"),
            (insulin, "type B pancreatic cell", "pancreatic A cell"),
        ):
            t = pancreas_vocab.lookup(gene, species)[0]
            rank = lambda k: np.median(
                [w[0] if len(w := np.flatnonzero(s[i] == t)) else 2048 for i in np.flatnonzero(kind == k)]
            )
            assert rank(mine) < 0.5 * rank(other), (species, gene, rank(mine), rank(other))


FILES = {  # cells, genes, donors, smallest share of counts matched
    "human_pancreas_baron": (3607, 20125, 4, 0.95),
    "human_pbmc_10x3k": (2700, 32738, 1, 0.99),
    "human_pbmc_kang_ifnb": (13576, 14053, 9, 0.8),
    "mouse_bonemarrow_stroma_matsushita": (250, 20243, 1, 0.9),
    "mouse_brain_midbrain_lamanno": (243, 18219, 27, 0.9),
    "mouse_gut_mca": (219, 14688, 5, 0.9),
    "mouse_kidney_tabulamuris": (215, 23341, 6, 0.8),
    "mouse_pancreas_baron": (1886, 14877, 2, 0.95),
    "mouse_skin_joost": (720, 24378, 34, 0.8),
    "mouse_spleen_jaitin": (3751, 20107, 14, 0.7),
}


@pytest.mark.parametrize("shared", FILES, indirect=True)
def test_further_files(shared, record_property):
    cells, genes, donors, share = FILES[shared.stem]
    species = shared.stem.split("_")[0]
    counts = as_counts(shared)
    assert (
        (counts.species, counts.n_obs, counts.n_names) == (species, cells, genes)
        and counts.obs.donor.nunique() == donors
        and set(counts.obs.species) == {species}
    )
    x, total = counts.block(0, min(cells, 500))
    matched = float(x.sum(dtype=np.float64) / total.sum())
    record_property("matched", f"{counts.n_matched / genes:.1%} of the genes, {matched:.1%} of the counts")
    assert (
        matched > share
        and len(set(counts.ensembl_ids)) == len(counts.ensembl_ids)
        and (f"{counts.n_matched:,} of {genes:,} genes matched") in repr(counts)
    )
    # the file's own totals: duplicates are summed, nothing is lost
    assert (total == counts.obs.n_counts.to_numpy()[:500]).all()
    part = ad.read_h5ad(shared)[:200].copy()
    v = Vocabulary.build([part])
    ds = tokenize(part, v, context=512, keep=["cell_type", "donor"], progress=False)
    s = encode_cells(part, v, 512)
    assert (
        set(ds["species"]) == {species}
        and len(ds) == min(cells, 200)
        and [list(r) for r in ds["input_ids"]] == [s[i].tolist() for i in range(len(s))]
    )
    assert (
        list(ds["donor"]) == part.obs.donor.astype(str).tolist()
        and v.species == (species,)
        and all(len(set(r)) == len(r) for r in ds["input_ids"])
    )


@pytest.mark.parametrize("shared", ["human_pancreas_baron", "mouse_pancreas_baron"], indirect=True)
def test_one_cell_in_two_files_is_one_sentence(shared, read, pancreas_vocab, sentences):
    "The pancreas cells are in both places, in another order, one with symbols and one with IDs beside them"
    species = shared.stem.split("_")[0]
    other = ad.read_h5ad(shared)
    names = read[species].obs_names[:60]
    other = other[names].copy()
    del other.var["ensembl_id"]
    found = encode_cells(other, pancreas_vocab)
    assert all((found[i] == sentences[species][i]).all() for i in range(60))


def test_a_renamed_cell_is_the_same_sentence(fish_table):
    fish(fish_table)
    n = N - 3
    ids = {"human": genes_of("human", n), "zebrafish": fish_ids(n)}
    vocab = vocabulary_from_medians({s: pd.Series(np.arange(1.0, n + 1), g) for s, g in ids.items()}, "shared")
    x = toy("human", genes=N).X[:, :n]
    a, b = (encode_cells(ad.AnnData(sp.csr_matrix(x), var=pd.DataFrame(index=g)), vocab, 24) for g in ids.values())
    assert np.array_equal(a.values, b.values) and np.array_equal(a.offsets, b.offsets)


def test_ids_that_are_read_as_one_gene_are_summed():
    "As if the file had the counts under the gene's own ID"
    ids = genes_of("human", 4)
    tokens = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, **{g: 4+i for i, g in enumerate(ids[:3])}}
    v = Vocabulary.from_geneformer(tokens, dict.fromkeys(ids[:3], 1.), {ids[3]: ids[0], "ENSG00000999999": ids[1]})
    def cells(x, names): return ad.AnnData(np.array(x, np.float32), var=pd.DataFrame(index=names))
    old = encode_cells(cells([[1, 2, 3, 4, 0], [0, 1, 2, 0, 5]], [*ids, "ENSG00000999999"]), v)
    new = encode_cells(cells([[5, 2, 3], [0, 6, 2]], ids[:3]), v)
    assert [old[i].tolist() for i in (0, 1)] == [new[i].tolist() for i in (0, 1)] == [[2, 4, 6, 5, 3], [2, 5, 6, 3]]


@pytest.mark.parametrize("context", [3, 4, 24])
def test_marks_are_in_the_context(context):
    ids = genes_of("human", 40)
    tokens = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, **{g: 4+i for i, g in enumerate(ids)}}
    v, plain = (Vocabulary.from_geneformer(t, dict.fromkeys(ids, 1.)) for t in (
        tokens, {k: t for k, t in tokens.items() if t < 2 or t > 3} | {g: 2+i for i, g in enumerate(ids)}))
    marked, bare = encode_cells(toy(), v, context), encode_cells(toy(), plain, context-2)
    for i in range(len(marked)): assert marked[i].tolist() == [2, *(bare[i]+2).tolist(), 3]
