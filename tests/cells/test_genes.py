"How symbols are spelled; and a third species is one more table: what it brings, and what is refused."
import pytest
from conftest import FISH_COLUMNS, FISHES, fish, fish_ids, genes_of, refused

from mix_geneformer.cells.genes import SPECIES, gene_table, orthologs
from mix_geneformer.cells.names import map_genes

pytestmark = pytest.mark.usefixtures("only_the_known")


# --- a third species ------------------------------------------------------------------------------------------------

def test_names_lead_to_the_new_species(fish_table):
    fish(fish_table)
    assert map_genes(["fish0", "fish1"]).species == map_genes(fish_ids(3)).species == "zebrafish"
    assert map_genes(["fish0", "ENSDARG00000000001.4"], "zebrafish").ensembl_ids.tolist() == fish_ids(2).tolist()
    assert map_genes(["INS", "GCG"]).species == "human" and map_genes(["Ins2", "Gcg"]).species == "mouse"  # as before


def test_orthologs_are_the_one_to_one_pairs_and_lead_to_mouse_through_human(fish_table):
    fish(fish_table)
    human = genes_of("human", FISHES - 2)
    pairs = orthologs("zebrafish", "human")
    assert dict(zip(pairs.a, pairs.b)) == dict(zip(fish_ids(FISHES - 3), human))
    assert orthologs("human", "zebrafish")[["a", "b"]].values.tolist() == sorted(pairs[["b", "a"]].values.tolist())
    assert len(orthologs("zebrafish", "human", one2one=False)) == FISHES - 1
    via = orthologs("zebrafish", "mouse")
    mouse = dict(zip(human, gene_table("human").loc[human].ortholog))
    assert dict(zip(via.a, via.b)) == {f: mouse[h] for f, h in zip(pairs.a, pairs.b)}


# --- what is refused ------------------------------------------------------------------------------------------------

def test_a_mixture_is_refused(fish_table):
    fish(fish_table)
    mixed = [*fish_ids(2), *genes_of("human", 3)]
    refused(lambda: map_genes(mixed), "more than one species", "3 human", "2 zebrafish")
    refused(lambda: map_genes(fish_ids(2), "mouse"), "species='mouse' was given", "2 of 2", "zebrafish")


def test_no_table_leads_there(fish_table):
    fish(fish_table, name="frog", scientific="Xenopus tropicalis", other="chicken")
    refused(lambda: orthologs("frog", "mouse"), "No ortholog table leads from frog to mouse", "register")
    refused(lambda: gene_table("axolotl"), "Unknown species 'axolotl'", "register_species")


def test_wrong_prefix(fish_table):
    fish(fish_table, prefix="ENSXETG")
    refused(lambda: gene_table("zebrafish"), "0 of 40", "ENSXETG", "ENSDARG00000000000", "prefix=")


def test_missing_column(fish_table):
    fish(fish_table, columns=(*FISH_COLUMNS[:4], "Mouse confidence"))
    refused(lambda: gene_table("zebrafish"), "lacks 1 of 5 columns", "Mouse confidence", "columns=")
    refused(lambda: fish(fish_table, columns=FISH_COLUMNS[:4]), "4 columns", "5")


def test_missing_file(tmp_path):
    fish(tmp_path / "gone.csv")
    refused(lambda: gene_table("zebrafish"), "gone.csv", "0 tables", "path=")


def test_name_or_prefix_taken(fish_table):
    refused(lambda: fish(fish_table, name="mouse"), "'mouse'", "Mus musculus", "another")
    refused(lambda: fish(fish_table, prefix="ENSG"), "'ENSG'", "Homo sapiens", "another")
    assert SPECIES["mouse"].prefix == "ENSMUSG" and "zebrafish" not in SPECIES
    assert fish(fish_table) == fish(fish_table)  # the same again is no conflict
