"Rank-value encoding against its definition."

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked import COUNTS, GENES, MEDIANS, by_definition

from mix_geneformer.cells import ranking
from mix_geneformer.cells.ranking import rank_tokens

@given(COUNTS, MEDIANS, st.permutations(range(-1, len(GENES) - 1)), st.integers(1, 14))
def test_rank_tokens_is_the_definition(x, medians, numbers, context):
    # one column without a token
    tokens, medians = np.array([n + 2 if n >= 0 else -1 for n in numbers]), np.array(medians)
    assert ranked(sp.csr_matrix(x), tokens, medians, context) == [by_definition(r, tokens, medians, context) for r in x]


def in_float64(row, tokens, medians, context):
    "One sentence as the library defines it to the last bit: float64 quotients, ties to the lower token"
    has = (row > 0) & (tokens >= 0)
    return tokens[has][np.lexsort((tokens[has], -(row[has] / medians[has])))][:context].tolist()


def ranked(x, tokens, medians, context):
    "Sentences by `rank_tokens`; those by the order of all pairs, for several numbers of pairs, must be the same"
    order = ranking._gene_order(tokens, medians)
    ways = [
        rank_tokens(x, tokens, medians, context),
        *(ranking._rank_pairs(ranking._pair_order(order, largest), x, context) for largest in (1, 2, 4, 32)),
    ]
    first, *others = [[flat[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])] for flat, offsets in ways]
    assert all(o == first for o in others)
    return first


NEAR = (
    st.builds(lambda i, up: float(np.nextafter(i / 3, up)), st.integers(1, 9), st.sampled_from([0.0, 99.0]))
    | st.integers(1, 9).map(lambda i: i / 3)
    | st.floats(1e-4, 1e4)
)


SCALE = st.sampled_from([1, 2, 3, 7, 1000, 2**20 - 1, 2**30, 3**18])


@settings(max_examples=150)
@given(
    st.lists(st.tuples(NEAR, SCALE, st.lists(st.integers(0, 4), min_size=5, max_size=5)), min_size=2, max_size=40),
    st.integers(1, 41),
    st.randoms(use_true_random=False),
)
def test_near_ties_are_told_apart(columns, context, random):
    "Values that differ in the last bit only, runs of them, and runs that the context cuts"
    medians = np.array([m for m, *_ in columns])
    x = np.array([[c * k for c in counts] for _, k, counts in columns], dtype=np.int64).T
    tokens = np.arange(len(columns)) - 1
    random.shuffle(tokens)
    for kind in (np.int64, np.float64):
        assert ranked(sp.csr_matrix(x.astype(kind)), tokens, medians, context) == [
            in_float64(r, tokens, medians, context) for r in x
        ]


@pytest.mark.parametrize("seed", range(4))
def test_many_genes_with_few_values(seed):
    """As real cells are: thousands of genes, counts of 1 to 3, medians that are multiples of each other up to
    rounding; empty cells, stored zeros"""
    rng = np.random.default_rng(seed)
    medians = (
        rng.integers(1, 9, 5000)
        / rng.choice([3.0, 7.0, 10.0, 49.0], 5000)
        * 10_000
        / rng.choice([1234.0, 617.0, 4321.0], 5000)
    )
    x = sp.random(30, 5000, 0.4, "csr", random_state=seed, data_rvs=lambda n: rng.integers(0, 4, n).astype(float))
    x.data[::50] = 2.0**33 - rng.integers(0, 3, len(x.data[::50]))
    x.data[x.indptr[3] : x.indptr[4]] = 0
    tokens = rng.permutation(5000) - 5
    quotients = np.unique(np.arange(1, 4)[:, None] / medians)
    assert (np.diff(quotients) / quotients[1:]).min() < 2**-50  # there are near-ties
    for context in (2048, 7):
        assert ranked(x, tokens, medians, context) == [in_float64(r, tokens, medians, context) for r in x.toarray()]


@pytest.mark.parametrize("seed", range(40))
def test_few_large_counts_among_small_ones(seed):
    "Molecules: one count in ten is not in the order of pairs; its value is another's, one bit beside it, or neither"
    rng = np.random.default_rng(seed)
    medians = rng.integers(1, 10, 30) / 3
    medians = np.where(rng.random(30) < 0.2, np.nextafter(medians, 99), medians)
    x = rng.integers(0, 3, (8, 30)) * np.where(rng.random((8, 30)) < 0.1, rng.choice([3, 9, 40, 2**20]), 1)
    tokens = rng.permutation(30) - 1
    for context in (30, 5):
        assert ranked(sp.csr_matrix(x.astype(np.float32)), tokens, medians, context) == [
            in_float64(r, tokens, medians, context) for r in x
        ]


def test_counts_too_large_to_rank():
    x, order = sp.csr_matrix([[2.0**60, *range(1, 10)]]), ranking._gene_order(np.arange(10), np.ones(10))
    refused(
        lambda: ranking._rank_pairs(ranking._pair_order(order), x, 9),
        "The counts hold 1,152,921,504,606,846,976",
        "pass raw counts",
    )
    refused(
        lambda: rank_tokens(sp.csr_matrix([[2.0**60, 1]]), np.array([2, 3]), np.ones(2)),
        "The counts hold 1,152,921,504,606,846,976",
        "pass raw counts",
    )


def test_no_cell_no_gene_no_token():
    for x, tokens in ((np.zeros((0, 2)), [2, 3]), (np.zeros((3, 2)), [2, 3]), (np.ones((3, 2)), [-1, -1])):
        assert ranked(sp.csr_matrix(x), np.array(tokens), np.ones(2), 9) == [[]] * len(x)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "int16", "int64", "float32", "float64"])
def test_the_type_of_counts_changes_no_sentence(kind):
    x = np.random.default_rng(0).poisson(9, (40, len(GENES)))
    x[:, 0] += 100  # above the counts that are in a pair
    tokens, medians = np.arange(len(GENES)) + 2, np.linspace(0.5, 3, len(GENES))
    assert ranked(sp.csr_matrix(x.astype(kind)), tokens, medians, 9) == [in_float64(r, tokens, medians, 9) for r in x]
