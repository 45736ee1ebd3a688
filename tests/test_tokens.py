"The same cell gives the same sentence, and it is the sentence of the definition"
import pickle
from fractions import Fraction

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import example, given, settings, strategies as st

from conftest import ISLET, genes_of, islet_vocab, partners, refused, toy
from mix_geneformer.cells.counts import as_counts, read_counts
from mix_geneformer.cells.genes import gene_table, map_genes
from mix_geneformer.cells.vocabulary import Vocabulary, vocabulary_from_medians
from mix_geneformer.files import InputError
from mix_geneformer.cells import ranking
from mix_geneformer.cells.medians import MedianSketch, gene_medians
from mix_geneformer.cells.ranking import rank_tokens
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.tokenizer import tokenize

GENES = genes_of("human", 12)
# multiples of 1/8: two values count / median of such genes are equal or far apart, so that ties are true ties
MEDIANS = st.lists(st.integers(1, 40).map(lambda i: i / 8), min_size=len(GENES), max_size=len(GENES))
COUNT = st.one_of(st.just(0), st.integers(1, 5), st.integers(1, 3000))
COUNTS = st.lists(st.lists(COUNT, min_size=len(GENES), max_size=len(GENES)).filter(any), min_size=1, max_size=6).map(lambda r: np.array(r, dtype=np.int64))


def by_definition(row, tokens, medians, context):
    "One sentence, in exact arithmetic: normalise, divide by the median, sort, cut"
    total = sum(int(c) for c in row)
    value = [(-Fraction(int(c), total) * 10_000 / Fraction(float(m)), int(t)) for c, t, m in zip(row, tokens, medians) if c > 0 and t >= 0]
    return [t for _, t in sorted(value)][:context]


def cells(x, genes=GENES): return ad.AnnData(sp.csr_matrix(np.asarray(x, dtype=np.float32)), var=pd.DataFrame(index=list(genes)))
def vocabulary(medians): return vocabulary_from_medians({"human": pd.Series(medians, GENES)})
def rows(sentences): return [sentences[i].tolist() for i in range(len(sentences))]


# --- rank-value encoding -----------------------------------------------------------------------------------------

@given(COUNTS, MEDIANS, st.permutations(range(-1, len(GENES) - 1)), st.integers(1, 14))
def test_rank_tokens_is_the_definition(x, medians, numbers, context):
    tokens, medians = np.array([n + 2 if n >= 0 else -1 for n in numbers]), np.array(medians)   # one column without a token
    assert ranked(sp.csr_matrix(x), tokens, medians, context) == [by_definition(r, tokens, medians, context) for r in x]


def in_float64(row, tokens, medians, context):
    "One sentence as the library defines it to the last bit: float64 quotients, ties to the lower token"
    has = (row > 0) & (tokens >= 0)
    return tokens[has][np.lexsort((tokens[has], -(row[has] / medians[has])))][:context].tolist()


def ranked(x, tokens, medians, context):
    "Sentences by `rank_tokens`; those by the order of all pairs, for several numbers of pairs, must be the same"
    order = ranking._gene_order(tokens, medians)
    ways = [rank_tokens(x, tokens, medians, context),
            *(ranking._rank_pairs(ranking._pair_order(order, largest), x, context) for largest in (1, 2, 4, 32))]
    first, *others = [[flat[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])] for flat, offsets in ways]
    assert all(o == first for o in others)
    return first


# counts and medians whose quotients agree exactly, in all bits but the last few, or in none
NEAR = st.builds(lambda i, up: float(np.nextafter(i / 3, up)), st.integers(1, 9), st.sampled_from([0., 99.])) | st.integers(1, 9).map(lambda i: i / 3) | st.floats(1e-4, 1e4)
SCALE = st.sampled_from([1, 2, 3, 7, 1000, 2**20 - 1, 2**30, 3**18])


@settings(max_examples=150)
@given(st.lists(st.tuples(NEAR, SCALE, st.lists(st.integers(0, 4), min_size=5, max_size=5)), min_size=2, max_size=40), st.integers(1, 41), st.randoms(use_true_random=False))
def test_near_ties_are_told_apart(columns, context, random):
    "Values that differ in the last bit only, runs of them, and runs that the context cuts"
    medians = np.array([m for m, *_ in columns])
    x = np.array([[c * k for c in counts] for _, k, counts in columns], dtype=np.int64).T
    tokens = np.arange(len(columns)) - 1
    random.shuffle(tokens)
    for kind in (np.int64, np.float64): assert ranked(sp.csr_matrix(x.astype(kind)), tokens, medians, context) == [in_float64(r, tokens, medians, context) for r in x]


@pytest.mark.parametrize("seed", range(4))
def test_many_genes_with_few_values(seed):
    "As real cells are: thousands of genes, counts of 1 to 3, medians that are multiples of each other up to rounding; empty cells, stored zeros"
    rng = np.random.default_rng(seed)
    medians = rng.integers(1, 9, 5000) / rng.choice([3., 7., 10., 49.], 5000) * 10_000 / rng.choice([1234., 617., 4321.], 5000)
    x = sp.random(30, 5000, .4, "csr", random_state=seed, data_rvs=lambda n: rng.integers(0, 4, n).astype(float))
    x.data[::50] = 2.**33 - rng.integers(0, 3, len(x.data[::50]))
    x.data[x.indptr[3]:x.indptr[4]] = 0
    tokens = rng.permutation(5000) - 5
    quotients = np.unique(np.arange(1, 4)[:, None] / medians)
    assert (np.diff(quotients) / quotients[1:]).min() < 2**-50                       # there are near-ties
    for context in (2048, 7): assert ranked(x, tokens, medians, context) == [in_float64(r, tokens, medians, context) for r in x.toarray()]


@pytest.mark.parametrize("seed", range(40))
def test_few_large_counts_among_small_ones(seed):
    "Molecules: one count in ten is not in the order of pairs; its value is another's, one bit beside it, or neither"
    rng = np.random.default_rng(seed)
    medians = rng.integers(1, 10, 30) / 3
    medians = np.where(rng.random(30) < .2, np.nextafter(medians, 99), medians)
    x = rng.integers(0, 3, (8, 30)) * np.where(rng.random((8, 30)) < .1, rng.choice([3, 9, 40, 2**20]), 1)
    tokens = rng.permutation(30) - 1
    for context in (30, 5): assert ranked(sp.csr_matrix(x.astype(np.float32)), tokens, medians, context) == [in_float64(r, tokens, medians, context) for r in x]


def test_counts_too_large_to_rank():
    x, order = sp.csr_matrix([[2.**60, *range(1, 10)]]), ranking._gene_order(np.arange(10), np.ones(10))
    refused(lambda: ranking._rank_pairs(ranking._pair_order(order), x, 9), "The counts hold 1,152,921,504,606,846,976", "pass raw counts")
    refused(lambda: rank_tokens(sp.csr_matrix([[2.**60, 1]]), np.array([2, 3]), np.ones(2)), "The counts hold 1,152,921,504,606,846,976", "pass raw counts")


def test_no_cell_no_gene_no_token():
    for x, tokens in ((np.zeros((0, 2)), [2, 3]), (np.zeros((3, 2)), [2, 3]), (np.ones((3, 2)), [-1, -1])):
        assert ranked(sp.csr_matrix(x), np.array(tokens), np.ones(2), 9) == [[]] * len(x)


@settings(max_examples=40)
@given(COUNTS, MEDIANS, st.lists(st.integers(1, 1000), min_size=6, max_size=6))
def test_depth_of_a_cell_does_not_matter(x, medians, factors):
    v = vocabulary(medians)
    assert rows(encode_cells(cells(x), v)) == rows(encode_cells(cells(x * np.array(factors)[:len(x), None]), v))


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
    assert blocked == alone == rows(encode_cells(cells(x), v, context)) == [by_definition(r, range(2, 14), medians, context) for r in x[:, np.argsort(GENES)]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, np.asarray], ids=["csr", "csc", "csr_array", "dense"])
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
    for i, j in zip(x.indptr[:-1], x.indptr[1:]): x.indices[i:j], x.data[i:j] = x.indices[i:j][::-1].copy(), x.data[i:j][::-1].copy()
    x.has_sorted_indices = False
    assert rows(encode_cells(ad.AnnData(x, var=a.var), v)) == plain
    dense, (i, j) = a.X.toarray(), np.indices(a.shape).reshape(2, -1)
    assert rows(encode_cells(ad.AnnData(sp.csr_matrix((dense.ravel(), (i, j)), a.shape), var=a.var), v)) == plain   # zeros are stored
    assert rows(encode_cells(a[[7, 2]], v)) == [plain[7], plain[2]]


@settings(max_examples=25)
@given(COUNTS, MEDIANS)
def test_duplicate_genes_are_summed(x, medians):
    v, symbol = vocabulary(medians), gene_table("human").symbol
    half = x // 2
    names = list(GENES) + [f"{g}.{i + 1}" for i, g in enumerate(GENES)]           # the same genes with a version
    assert rows(encode_cells(cells(np.hstack([half, x - half]), names), v)) == rows(encode_cells(cells(x), v))
    assert (read_counts(cells(np.hstack([half, x - half]), names), verbose=False).X.toarray() == x[:, np.argsort(GENES)]).all()
    names = [symbol[g] for g in GENES] + list(GENES)                              # symbols beside IDs
    assert rows(encode_cells(cells(np.hstack([x - half, half]), names), v)) == rows(encode_cells(cells(x), v))


@settings(max_examples=25)
@given(COUNTS, MEDIANS, st.lists(st.integers(0, 9999), min_size=3, max_size=3))
def test_unmapped_genes_and_genes_outside_the_vocabulary_do_not_matter(x, medians, more):
    v, outside = vocabulary(medians), genes_of("human", 13)[-1]
    wide = np.hstack([x, np.tile(more, (len(x), 1))])
    assert rows(encode_cells(cells(wide, [*GENES, "gene_1", "ERCC-00002", outside]), v)) == rows(encode_cells(cells(x), v))


def test_a_sentence_has_no_gene_twice_and_no_special():
    for s in rows(encode_cells(toy(n=50), Vocabulary.build(toy(n=50)))): assert len(set(s)) == len(s) and min(s) >= 2


# --- hand-computed sentences -------------------------------------------------------------------------------------

# counts  20  5  12  0  1  3 of INS GCG SST PPY ARX PDX1, medians 10 5 4 2 .5 1: values 2 1 3 0 2 3
@pytest.mark.parametrize("species,orthologs,symbols,tokens", [
    ("human", "separate", ["PDX1", "SST", "ARX", "INS", "GCG"], [5, 6, 2, 7, 4]),
    ("mouse", "separate", ["Sst", "Pdx1", "Ins2", "Arx", "Gcg"], [10, 12, 8, 13, 9]),
    ("human", "shared", ["PDX1", "SST", "ARX", "INS", "GCG"], [5, 6, 2, 7, 4]),
    ("mouse", "shared", ["Pdx1", "Sst", "Arx", "Ins2", "Gcg"], [5, 6, 2, 8, 4]),    # Ins2 has no one-to-one ortholog
    ("mouse", "tied", ["Pdx1", "Sst", "Arx", "Ins2", "Gcg"], [5, 6, 2, 8, 4])])
def test_hand_computed_sentences(species, orthologs, symbols, tokens):
    v = islet_vocab(orthologs)
    s = encode_cells(cells([[20, 5, 12, 0, 1, 3]], ISLET[species]), v)
    assert s[0].tolist() == tokens and s.species.tolist() == [species]
    assert v.describe(s[0], species).symbol.tolist() == symbols
    assert encode_cells(cells([[20, 5, 12, 0, 1, 3]], ISLET[species]), v, context=2)[0].tolist() == tokens[:2]


def test_hand_computed_medians():
    # totals 4, 3, 4: GCG 2/4, 3/3; PDX1 2/4, 1/4; ARX 3/4, each times 10,000
    a = cells([[2, 2, 0], [3, 0, 0], [0, 1, 3]], ["GCG", "PDX1", "ARX"])
    m = gene_medians(a)
    assert m[map_genes(["GCG", "PDX1", "ARX"]).ensembl_ids].tolist() == [7500., 3750., 7500.]
    assert m.attrs == dict(species="human", cells=3, values=5, exact=True)
    # a gene without an Ensembl ID still counts towards its cell's total
    assert gene_medians(cells([[2, 2, 4]], ["GCG", "PDX1", "gene_1"]))[map_genes(["GCG"]).ensembl_ids].tolist() == [2500.]


# --- vocabulary --------------------------------------------------------------------------------------------------

def test_tokens_of_orthologs():
    f = {o: islet_vocab(o).frame.set_index("symbol").token for o in ("separate", "shared", "tied")}
    assert sorted(f["separate"]) == list(range(2, 14))                             # each species' gene has its own
    for h, m in zip(ISLET["human"][1:], ISLET["mouse"][1:]): assert f["shared"][h] == f["shared"][m] != f["separate"][m]
    assert f["shared"]["INS"] != f["shared"]["Ins2"] and (f["tied"] == f["shared"]).all()
    assert [len(islet_vocab(o)) for o in ("separate", "shared", "tied")] == [14, 9, 9]
    assert islet_vocab("tied").species_index("human") == 0 and islet_vocab("tied").species_index(np.array(["mouse", "human"])).tolist() == [1, 0]
    assert len({islet_vocab(o).hash for o in ("separate", "shared", "tied")}) == 3
    a, b = partners(40)
    big = vocabulary_from_medians(dict(human=pd.Series(1., a), mouse=pd.Series(1., b)), "shared")
    assert (big.lookup(a, "human") == big.lookup(b, "mouse")).all() and len(big) == 42


@settings(max_examples=30)
@given(MEDIANS, st.sampled_from(["separate", "shared", "tied"]))
def test_vocabulary_round_trip(tmp_path, medians, orthologs):
    v = vocabulary_from_medians(dict(human=pd.Series(medians, GENES), mouse=pd.Series(medians[::-1], gene_table("human").ortholog[GENES].to_numpy())), orthologs)
    v.save(tmp_path)
    back = Vocabulary.load(tmp_path)
    pd.testing.assert_frame_equal(back.frame, v.frame, check_exact=True)           # medians to the last bit
    assert back == v and back.hash == v.hash and back.orthologs == orthologs and len(back) == len(v) and back.species == v.species
    assert back.lookup(GENES, "human").tolist() == v.lookup(GENES, "human").tolist()


@settings(max_examples=25)
@given(MEDIANS, st.integers(0, len(GENES) - 1))
def test_hash_sees_every_median(medians, i):
    changed = list(medians)
    changed[i] = np.nextafter(medians[i], 99)
    assert vocabulary(changed) != vocabulary(medians) and vocabulary(medians) == vocabulary(list(medians))


def test_order_of_sources_does_not_change_the_vocabulary():
    h1, h2, m = toy("human"), toy("human", seed=5), toy("mouse")
    assert Vocabulary.build([h1, m, h2]) == Vocabulary.build([m, h2, h1]) == Vocabulary.build([ad.concat([h1, h2], index_unique="-"), m])


def test_from_geneformer(tmp_path):
    ids = dict(zip(map_genes(ISLET["human"]).ensembl_ids, (9, 4, 7, 2, 3, 11)))
    tokens, medians = {"<pad>": 0, "<mask>": 1, **ids}, {g: np.float64(i + 1) for i, g in enumerate(ids)}
    for name, d in ("t", tokens), ("m", medians): (tmp_path/f"{name}.pkl").write_bytes(pickle.dumps(d, protocol=4))
    v = Vocabulary.from_geneformer(tmp_path/"t.pkl", tmp_path/"m.pkl")
    assert v == Vocabulary.from_geneformer(tokens, medians) and len(v) == 12
    assert v.lookup(["INS", "PDX1"]).tolist() == [9, 11] and encode_cells(cells([[1, 2, 3, 4, 5, 60]], ISLET["human"]), v)[0].tolist() == [11, 2, 3, 4, 7, 9]
    refused(lambda: Vocabulary.from_geneformer({**tokens, "<cls>": 12}, medians), "3 special tokens")
    refused(lambda: Vocabulary.from_geneformer(tokens, dict(list(medians.items())[:4])), "2 of 6 genes have no median")
    refused(lambda: Vocabulary.from_geneformer({**tokens, "gene_1": 12}, medians), "1 of 7 entries", "gene_1")


# --- medians of large corpora ------------------------------------------------------------------------------------

VALUES = st.lists(st.tuples(st.integers(0, 3), st.floats(1e-3, 9e3)), min_size=1, max_size=60)


@given(VALUES, st.sampled_from([.001, .01, .1]), st.integers(0, 60))
def test_sketch_is_accurate_and_merges(pairs, accuracy, cut):
    genes, values = (np.array(c) for c in zip(*pairs))
    whole, one, two = (MedianSketch(4, accuracy) for _ in range(3))
    whole.update(genes, values), one.update(genes[:cut], values[:cut]), two.update(genes[cut:], values[cut:])
    one.merge(two)
    np.testing.assert_array_equal(one.medians(), whole.medians())
    for g, m in enumerate(whole.medians()):
        mine = np.sort(values[genes == g])
        if not len(mine): assert np.isnan(m)
        else: assert abs(m / mine[(len(mine) - 1) // 2] - 1) <= accuracy * (1 + 1e-6)


def test_sketched_medians_are_near_the_exact_ones():
    a = toy(n=201)
    exact, sketched = gene_medians(a), gene_medians(a, exact_below=0)
    parts = gene_medians([a[:50].copy(), a[50:].copy()], exact_below=500)          # turns into a sketch on the way
    assert exact.attrs["exact"] and not sketched.attrs["exact"] and not parts.attrs["exact"] and sketched.attrs["values"] == a.X.nnz
    pd.testing.assert_series_equal(sketched, parts)
    c = as_counts(a)
    (_, x, total), = c.blocks(10_000)
    for j, g in enumerate(c.ensembl_ids):
        v = np.sort((x[:, j].toarray().ravel() / total * 10_000)[x[:, j].toarray().ravel() > 0])
        assert exact[g] == np.median(v) and abs(sketched[g] / v[(len(v) - 1) // 2] - 1) < .0101


def test_medians_of_sources_that_share_some_genes():
    "Exactly the median of all their values, block by block, whatever the blocks"
    a, b = toy(n=30, seed=3)[:, :25].copy(), toy(n=17, seed=4)[:, 10:].copy()
    both, got = ad.concat([a, b], join="outer", fill_value=0, index_unique="-"), gene_medians([a, b])
    x = both.X.toarray().astype(np.float64)
    x = x / x.sum(1, keepdims=True) * 10_000
    assert got.attrs["cells"] == 47 and all(got[g] == np.median(x[:, j][x[:, j] > 0]) for j, g in enumerate(both.var_names))
    big = sp.vstack([toy(n=24).X] * 90, format="csr")                                # more than one block
    pd.testing.assert_series_equal(gene_medians(ad.AnnData(big, var=toy().var)), gene_medians(toy(n=24)), check_exact=True)


# --- damaged vocabularies ---

@given(st.binary(max_size=60), st.integers(0, 10**6), st.sampled_from(b'{}[],:"019a \xff'))
@example(b"[]", 0, 0x7b)
@example(b"{}", 1, 0x7d)
@example(b"3", 2, 0x30)
@example(b'{"token":[2],"ensembl_id":[],"symbol":[],"species":[],"median":[],"ortholog":[],"orthologs":"separate","specials":["<pad>","<mask>"]}', 2, 0x30)
@example(b"\xff\xfe", 2, 0x30)
def test_damaged_vocabularies_are_refused(tmp_path, junk, at, byte):
    good = islet_vocab()._json().encode()
    at %= len(good)
    for data in (junk, good[:at] + bytes([byte]) + good[at + 1:], good[:at]):
        (tmp_path/"vocabulary.json").write_bytes(data)
        try: Vocabulary.load(tmp_path)
        except InputError as e: assert "\n" not in str(e)


def test_a_changed_vocabulary_is_noticed(tmp_path):
    v = islet_vocab()
    (tmp_path/"vocabulary.json").write_text(v._json().replace("10.0", "11.0"))
    assert Vocabulary.load(tmp_path) != v


# --- the corpus on disk holds the same sentences -----------------------------------------------------------------

@settings(max_examples=10)
@given(COUNTS, MEDIANS)
def test_corpus_holds_the_sentences(x, medians):
    v = vocabulary(medians)
    assert rows(sentences_of(tokenize(cells(x), v, progress=False, keep=[]))) == rows(encode_cells(cells(x), v))
