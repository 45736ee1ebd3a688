"The family's dictionaries as a table of genes."
import pytest
from conftest import genes_of, refused
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.dictionaries import family_genes

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


@pytest.mark.parametrize("more,says", [({"<cls>": 2, "<eos>": 3}, "4 special tokens"),
                                       ({"a": 2, "b": 3}, "2 of 2 entries")])
def test_what_is_no_first_series_dictionary_is_refused(more, says):
    refused(lambda: family_genes({**SPECIALS, **more}, {}), says)


def test_a_gene_without_a_median_is_refused():
    refused(lambda: family_genes({**SPECIALS, IDS[0]: 2, IDS[1]: 3}, {IDS[0]: 1.}), "1 of 2 genes have no median")
