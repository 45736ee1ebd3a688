"What the rows of a source are, which genes their names mean, and of which species they are."
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import genes_of, refused
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mix_geneformer.cells.genes import _symbols, gene_table, make_names, symbol_ids
from mix_geneformer.cells.names import listed_ids, map_genes, read_names
from mix_geneformer.files import InputError

GENES = list(genes_of("human", 12))
VERSION = st.one_of(st.just(""), st.integers(1, 99).map(lambda i: f".{i}"))

pytestmark = pytest.mark.usefixtures("only_the_known")


def ids(names, species=None): return read_names(names, species).ensembl_ids.tolist()


# --- names of genes -------------------------------------------------------------------------------------------------

@settings(max_examples=25)
@given(st.lists(st.sampled_from(GENES), min_size=1, max_size=20), st.lists(VERSION, min_size=20, max_size=20))
def test_versions_are_stripped(genes, versions):
    m = map_genes([g + v for g, v in zip(genes, versions)])
    assert m.species == "human" and m.ensembl_ids.tolist() == genes and m.n_matched == len(genes)


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_symbols_lead_to_their_gene(species):
    t = gene_table(species)
    t = t[t.symbol.ne("") & ~t.symbol.duplicated(keep=False)].iloc[::37]
    m = map_genes(t.symbol)
    assert m.species == species and m.ensembl_ids.tolist() == t.index.tolist()
    assert map_genes(t.index).ensembl_ids.tolist() == t.index.tolist()
    assert map_genes(t.symbol, species).ensembl_ids.tolist() == t.index.tolist()


@settings(max_examples=25)
@given(st.lists(st.text(max_size=12), max_size=8))
@example(["ENSG", "ENSG.1", "ENSGX00000001", "ENS"])
@example(["nan", "", "."])
def test_any_text_as_a_gene_name(names):
    "Junk beside true genes is left out; junk alone is refused"
    known = set(gene_table("human").symbol) | set(gene_table("human").index) | set(gene_table("mouse").symbol)
    for n in names:
        assume(n not in known and n.replace(".", "-") not in known)
        assume(not (n.startswith("ENS") and n[-1:].isdigit()))
    m = map_genes([*names, "GCG", "INS"])
    assert m.n_matched == 2 and m.ensembl_ids[-2:].tolist() == ["ENSG00000115263", "ENSG00000254647"]
    with pytest.raises(InputError): map_genes(names)


# --- how names are spelled ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("species", ["human", "mouse"])
def test_every_symbol_as_r_spells_it_is_the_same_gene(species):
    "No two symbols of a species are spelled alike; one is left alone"
    known = _symbols(species)
    names = pd.Series(list(known))
    spelt = names.map(make_names)
    assert spelt.is_unique and not (spelt.ne(names) & spelt.isin(set(names))).any()
    lost = names[np.array(symbol_ids(spelt, species)) != names.map(known)]
    assert lost.tolist() == dict(human=[], mouse=["Gt(ROSA)26Sor"])[species]


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_numbers_that_programs_add(species):
    a, b = gene_table(species).index[:2]
    s, t = gene_table(species).symbol.iloc[:2]
    assert ids([s, t, f"{s}.1", f"{s}-1", f"{t}-2"], species) == [a, b, a, a, b]
    assert ids([t, f"{s}.1"], species) == [b, ""]  # no copy of what is not there


def test_ids_in_company():
    ins = "ENSG00000254647"
    names = [f"{ins}.7", f"INS|{ins}", f"{ins}_INS", f" {ins} ", f"{ins}-1", f"{ins}.7_PAR_Y", ins.lower(), f'"{ins}"']
    assert ids(names) == [ins] * len(names)
    assert ids(["ENSGR0000182378", "ENSG00000182378"]) == ["ENSG00000182378"] * 2


def test_dates_are_told_and_not_guessed():
    m = read_names(["INS", "GCG", "1-Mar", "2-Sep", "Mar-03", "JUN"])
    assert m.n_matched == 3 and "3 names are dates" in m.notes[0] and "'1-Mar'" in m.notes[0]


@settings(max_examples=25)
@given(st.permutations(range(12)), st.data())
def test_the_order_of_names_does_not_matter(order, data):
    names = gene_table("human").symbol[GENES].tolist()
    names = [data.draw(st.sampled_from([n, make_names(n), f" {n}", g, f"{g}.3"])) for n, g in zip(names, GENES)]
    m, p = read_names([*names, "junk", "ERCC-00002"]), read_names([*(names[i] for i in order), "junk", "ERCC-00002"])
    assert m.ensembl_ids[:12].tolist() == GENES
    assert p.ensembl_ids[:12].tolist() == [GENES[i] for i in order] and p.notes == m.notes


# --- several names of a row -----------------------------------------------------------------------------------------

@settings(max_examples=40)
@given(st.data())
def test_the_next_column_where_the_first_says_nothing(data):
    t = gene_table("human").loc[GENES]
    nothing = st.sampled_from(["", None, "nan", "no gene", np.nan])
    ways = [data.draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any)) for _ in GENES]
    columns = dict(Accession=GENES, Gene=t.symbol, symbol=t.symbol)
    var = pd.DataFrame({c: [v if w[i] else data.draw(nothing) for v, w in zip(values, ways)]
                        for i, (c, values) in enumerate(columns.items())}, index=[f"r{i}" for i in range(len(GENES))])
    var = var[data.draw(st.permutations(list(columns)))]
    assert ids(var, "human") == GENES


def test_an_id_goes_before_a_symbol_and_no_symbol_beside_a_foreign_id():
    gene_ids = ["ENSG00000254647", "ENSG00000115263", "ENSRNOG00000000001"]
    var = pd.DataFrame(dict(gene_ids=gene_ids), index=["INS", "SST", "PPY"])
    m = read_names(var)
    assert m.ensembl_ids.tolist() == ["ENSG00000254647", "ENSG00000115263", ""]
    assert m.kinds.tolist() == ["", "", "genes of other species"]


# --- rows that are no genes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("column", ["feature_types", "feature_type", "FeatureType", "modality"])
def test_a_row_of_another_kind_is_no_gene_whatever_its_name(column):
    var = pd.DataFrame({column: ["Gene Expression"] * 2 + ["Antibody Capture"] * 2}, index=["INS", "GCG", "CD4", "SST"])
    m = read_names(var)
    assert m.n_matched == 2 and m.kinds.tolist() == ["", "", "Antibody Capture", "Antibody Capture"]
    assert "2 of 4 rows are no human genes" in m.notes[0] and "2 Antibody Capture" in m.notes[0]
    refused(lambda: read_names(var.iloc[2:]), "0 of 2 rows are genes", "2 Antibody Capture", "gene expression")


def test_biotypes_are_kinds_of_genes():
    var = pd.DataFrame(dict(feature_type=["protein_coding", "lncRNA"], feature_biotype="gene"), index=["INS", "GCG"])
    assert read_names(var).n_matched == 2


@pytest.mark.parametrize("way", ["GRCh38_{}|mm10___{}", "GRCh38______{}|mm10____{}", "GRCh38-2020-A_{}|mm10-2020-A_{}",
                                 "hg19_{}|mm10_{}", "GRCh38-{}|mm10---{}", "HUMAN_{}|MOUSE_{}"])
@pytest.mark.parametrize("ids_too", [False, True])
def test_two_genomes(way, ids_too):
    "What the refusal advises works: the genes of one genome, the others left out and told"
    h, m = way.split("|")
    of = {s: gene_table(s).loc[genes_of(s, 20)] for s in ("human", "mouse")}
    named = {s: list(t.index if ids_too else t.symbol) for s, t in of.items()}
    names = [*(h.format(n) for n in named["human"]), *(m.format(n) for n in named["mouse"][:15])]
    line = refused(lambda: read_names(names), "more than one species (20 human, 15 mouse)")
    for s, n in dict(human=20, mouse=15).items():
        assert f"species={s!r}" in line
        got = read_names(names, s)
        assert got.ensembl_ids[got.ensembl_ids != ""].tolist() == list(of[s].index[:n])
        assert f"{35 - n} of 35 rows are no {s} genes" in got.notes[0]
    assert ids([h.format(n) for n in named["human"]]) == list(of["human"].index)


def test_one_genome_that_is_wrong_loses_nothing():
    symbols = list(_symbols("mouse"))[::60]
    for species in (None, "mouse"):
        m = read_names(pd.DataFrame(dict(genome="GRCh38"), index=symbols), species)
        assert m.species == "mouse" and m.n_matched == len(symbols) and not m.notes
    near = pd.DataFrame(dict(genome="GRCh38"), index=gene_table("mouse").loc[genes_of("mouse", 20)].symbol)
    refused(lambda: read_names(near), "genome says human", "20 names are mouse", "species='human' or species='mouse'")
    assert read_names(near, "mouse").n_matched == 20


def test_the_column_genome():
    t = {s: gene_table(s).loc[genes_of(s, 20)] for s in ("human", "mouse")}
    var = pd.DataFrame(dict(genome=["GRCh38"] * 20 + ["mm10"] * 20), index=[*t["human"].symbol, *t["mouse"].symbol])
    refused(lambda: read_names(var), "20 human, 20 mouse", "species='mouse'")
    assert ids(var, "mouse") == [""] * 20 + list(t["mouse"].index)
    capitals = pd.DataFrame(dict(genome="mm10"), index=[s.upper() for s in list(_symbols("mouse"))[::60]])
    assert read_names(capitals).species == "mouse" and read_names(capitals).n_matched == len(capitals)


@pytest.mark.parametrize("species,other", [("human", "mouse"), ("mouse", "human")])
@pytest.mark.parametrize("column", ["index", "symbol"])
def test_one_foreign_gene_is_left_out_and_told(species, other, column):
    own = gene_table(species).loc[genes_of(species, 40)]
    m = read_names([*(own[column] if column == "symbol" else own.index), genes_of(other, 1)[0]])
    assert m.species == species and m.ensembl_ids.tolist() == [*own.index, ""]
    assert f"(1 genes of {other})" in m.notes[0]


# --- which species --------------------------------------------------------------------------------------------------

def test_capitals_with_a_species():
    t = gene_table("mouse").loc[genes_of("mouse", 400)]
    names = t.symbol.str.upper().tolist()
    m = read_names(names, "mouse")
    assert m.ensembl_ids.tolist() == t.index.tolist() and "only if capitals are ignored" in m.notes[0]
    h = gene_table("human").loc[genes_of("human", 400)]
    for way in (str.lower, str.capitalize): assert ids(h.symbol.map(way), "human") == h.index.tolist()
    assert not read_names(h.symbol, "human").notes and not read_names(t.symbol).notes


def test_capitals_here_and_there_with_a_species():
    "A name in capitals that is another species' gene is that gene where the species' own stands beside it"
    t = gene_table("mouse").loc[genes_of("mouse", 40)]
    some = [n.upper() if i % 3 == 0 else n for i, n in enumerate(t.symbol)]
    assert ids(some, "mouse") == t.index.tolist()
    m = read_names([*t.symbol, t.symbol.iloc[0].upper()], "mouse")  # a humanised mouse
    assert m.ensembl_ids.tolist() == [*t.index, ""] and not m.notes


def test_capitals_without_a_species_are_no_guess():
    "Names that fit another species better without capitals: what the refusal advises works"
    t = gene_table("mouse").loc[lambda t: t.symbol.ne("")].iloc[:600]
    names = t.symbol.str.upper().tolist()
    line = refused(lambda: read_names(names), "mouse symbols where capitals are ignored", "species='mouse'")
    assert "species='human'" in line and read_names(names, "human").species == "human"
    assert read_names(names, "mouse").n_matched == 600
    lower = gene_table("human").loc[genes_of("human", 40)].symbol.str.lower().tolist()
    refused(lambda: read_names(lower), "0 of 40 genes match as they are written", "species='human'")
    refused(lambda: read_names(["C3", "H19"]), "symbols of human and of mouse", "species='human' or species='mouse'")
    assert read_names(["C3", "H19"], "mouse").n_matched == 2


def test_names_that_fit_two_species_about_equally_are_told():
    pairs = gene_table("human").loc[genes_of("human", 400)]
    same = pairs[pairs.symbol.str.upper() == gene_table("mouse").symbol[pairs.ortholog].str.upper().to_numpy()]
    (note,) = read_names(same.symbol).notes
    assert "read as human" in note and "species='mouse'" in note
    with pytest.warns(UserWarning, match="read as human"): map_genes(same.symbol)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        map_genes(same.symbol, "human")


def test_scientific_names():
    assert read_names(["Ins2", "Gcg"], "Mus musculus").species == "mouse"


# --- lists of genes -------------------------------------------------------------------------------------------------

def test_lists_are_read_as_files_are():
    names = [" INS", "ENSG00000254647.7", "ins", "INS|3630ENSG", "NKX6.1", "NKX6-1"]
    ins, nkx = "ENSG00000254647", symbol_ids(["NKX6-1"], "human")[0]
    assert listed_ids(names, "human").tolist() == [ins, ins, ins, "", nkx, nkx]
