"What a row of a source is, by its columns and by its name, and all that it is called."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.features import Rows, named_kind
from mix_geneformer.cells.genes import SPECIES, gene_table

@pytest.mark.parametrize("species", list(SPECIES))
def test_no_gene_is_named_like_something_else(species):
    t = gene_table(species)
    assert not [n for n in [*t.symbol.unique(), *t.index] if named_kind(n)]
    assert not Rows(t.symbol.unique()).species  # nor as if a genome stood before it


@pytest.mark.parametrize("name,kind", {
    "ERCC-00130": "ERCC", "ERCC_ERCC-00130": "ERCC", "chr1:9772-10660": "peaks", "chrX-100-200": "peaks",
    "GL000194.1:101-202": "peaks", "CD3_TotalSeqB": "antibodies", "CD3-TotalC": "antibodies",
    "CD45RA_prot": "antibodies", "HTO_7": "antibodies", "Hashtag3": "antibodies",
    "N_unmapped": "tallies", "__no_feature": "tallies"}.items())
def test_names_that_are_no_genes(name, kind): assert named_kind(name).startswith(kind)


@given(st.permutations(range(6)))
def test_columns_permuted_are_rows_permuted(order):
    var = pd.DataFrame(dict(gene_ids=["ENSG00000254647", "", "mm10___ENSMUSG00000000028", "x", "", "CD4"],
                            feature_types=["Gene Expression"] * 5 + ["Antibody Capture"]),
                       index=["INS", "GRCh38_GCG", "Cdc45", "y", "z", "CD4"])
    a, b = Rows(var), Rows(var.iloc[list(order)])
    for field in ("ids", "prefix", "genome", "kind"): assert (getattr(a, field)[list(order)] == getattr(b, field)).all()


def test_names_of_columns_in_any_dialect():
    for column in ("Gene IDs", "GENE_ID", "geneIds", "ensembl.id", "Accession"):
        assert Rows(pd.DataFrame({column: ["ENSG00000254647.3"]}, index=["0"])).ids.tolist() == ["ENSG00000254647"]


def test_what_is_missing_is_no_name():
    var = pd.DataFrame(dict(gene_ids=["", None, np.nan, "NA", " ENSG00000254647 "]), index=["a", "b", "c", "d", "e"])
    assert Rows(var).ids.tolist() == [""] * 4 + ["ENSG00000254647"]
    assert Rows(pd.DataFrame(dict(gene_ids=pd.Categorical(["ENSG00000254647", None])), index=["a", "b"])).ids[1] == ""
    assert len(Rows([])) == 0
