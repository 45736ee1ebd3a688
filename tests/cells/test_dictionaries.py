"The family's dictionaries as a table of genes."
import pytest
from conftest import genes_of, refused
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.dictionaries import family_genes, family_synonyms

IDS = [*genes_of("human", 6), *genes_of("mouse", 2)]
SPECIALS = {"<pad>": 0, "<mask>": 1}


@given(st.permutations(IDS), st.lists(st.sampled_from(["gene_1", "ENSGR0000002586", "NM_000207"]), unique=True))
def test_every_token_is_kept_with_its_number_and_its_name(ids, strange):
    tokens = {name: i for i, name in enumerate([*SPECIALS, *ids, *strange])}
    genes, specials = family_genes(tokens, dict.fromkeys(ids, 2.))
    assert specials == list(SPECIALS)
    assert {**SPECIALS, **dict(zip(genes.ensembl_id, genes.token))} == tokens
    whose = dict(zip(genes.ensembl_id, genes.species))
    assert all(whose[g] == ("mouse" if g.startswith("ENSMUSG") else "human") for g in ids)
    assert all(whose[g] == "human" for g in strange)  # as most of the others


@pytest.mark.parametrize("more,says", [({"<cls>": 2, "<sep>": 3}, "4 special tokens"), ({"<cls>": 9}, "<pad> as 0"),
                                       ({"a": 2, "b": 3}, "2 of 2 entries")])
def test_what_is_no_dictionary_of_the_family_is_refused(more, says):
    refused(lambda: family_genes({**SPECIALS, **more}, {}), says)


def test_the_second_series_has_marks():
    _, specials = family_genes({**SPECIALS, "<eos>": 3, "<cls>": 2, IDS[0]: 4}, {IDS[0]: 1.})
    assert specials == ["<pad>", "<mask>", "<cls>", "<eos>"]


@given(st.permutations(IDS))
def test_only_ids_that_lead_to_another_with_a_token_are_synonyms(ids):
    a, b, c, *_ = ids
    assert family_synonyms({a: b, b: b, c: "ENSG_gone", "INS": b}, {b: 5}) == {a: b}


def test_a_gene_without_a_median_is_refused():
    refused(lambda: family_genes({**SPECIALS, IDS[0]: 2, IDS[1]: 3}, {IDS[0]: 1.}), "1 of 2 genes have no median")
