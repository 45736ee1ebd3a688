"What a source is, is asked of what is in it; what is none gets a sentence that says what to type."
import shutil
import subprocess
import warnings

import anndata as ad
import h5py
import numpy as np
import pytest
import zarr
from conftest import refused, toy
from handmade import h5ad, loom, tenx_folder, tenx_h5

from mix_geneformer.cells.containers import open_container
from mix_geneformer.cells.counts import read_counts

def same(source, **how):
    got = read_counts(source, verbose=False, **how)
    return (got.X != read_counts(toy(), verbose=False).X).nnz == 0


@pytest.mark.parametrize("write", [h5ad(lambda x: x), loom("Accession"), tenx_h5], ids=["h5ad", "loom", "tenx"])
@pytest.mark.parametrize("ending", [".h5", ".h5ad", ".loom", ".hdf5"])
def test_endings_are_given_by_people(tmp_path, write, ending):
    p = write(toy(), tmp_path)
    assert same(p.rename(tmp_path/f"renamed{ending}"))


def test_paths_of_every_kind(tmp_path, monkeypatch):
    toy().write_h5ad(tmp_path/"cells.h5ad")
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.chdir(tmp_path)
    for source in (tmp_path/"cells.h5ad", str(tmp_path/"cells.h5ad"), "cells.h5ad", "~/cells.h5ad"): assert same(source)
    tenx_folder(3)(toy(), tmp_path)
    monkeypatch.chdir(tmp_path/"filtered")
    assert same(".")


def first_quoted(line): return line.split("'")[1]


def test_a_folder_of_h5ad(tmp_path):
    for n in ("a.h5ad", "b.h5ad"): toy().write_h5ad(tmp_path/n)
    line = refused(lambda: open_container(tmp_path), "holds 2 .h5ad files", "pass one of them", "take a list")
    assert same(first_quoted(line))


def test_folders_of_folders(tmp_path):
    (tmp_path/"outs"/"inner").mkdir(parents=True)
    tenx_folder(3)(toy(), tmp_path/"outs"/"inner")
    for above in (tmp_path/"outs"/"inner", tmp_path/"outs"):
        assert same(first_quoted(refused(lambda: open_container(above), "1 folders with a matrix")))


@pytest.mark.parametrize("pack", ["gzip", "bzip2", "xz"])
def test_what_is_compressed_as_a_whole(tmp_path, pack):
    if not shutil.which(pack): pytest.skip(f"{pack} is not on this machine")
    p = tmp_path/"my cells.h5ad"
    toy().write_h5ad(p)
    subprocess.run([pack, p], check=True)
    packed, = tmp_path.iterdir()
    line = refused(lambda: open_container(packed), "is compressed as a whole", "unpack it with")
    subprocess.run(line.split('unpack it with "')[1].split('" and')[0], shell=True, check=True)
    assert same(p)


@pytest.mark.parametrize("name,part", [("a.csv", "scanpy.read"), ("a.tsv.gz", "scanpy.read"), ("a.rds", "writeH5AD"),
                                       ("a.xlsx", "10x folder")])
def test_other_kinds(tmp_path, name, part):
    (tmp_path/name).write_text("x")
    refused(lambda: open_container(tmp_path/name), f"{name} has the unknown ending", "pass .h5ad, .loom", part)


def test_zarr_stores_of_something_else(tmp_path):
    group = zarr.open_group(tmp_path/"cells.zarr", mode="w")
    group.create_group("images")
    refused(lambda: open_container(tmp_path/"cells.zarr"), "no AnnData (it holds images)", "pass a store of AnnData")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ad.io.write_elem(group, "tables/cells", toy())   # as SpatialData keeps them
    assert same(first_quoted(refused(lambda: open_container(tmp_path/"cells.zarr"), "it holds images, tables")))
    (tmp_path/"empty.zarr").mkdir()
    line = refused(lambda: open_container(tmp_path/"empty.zarr"), "cannot be read as .zarr")
    assert "cut off" not in line


def test_sources_that_are_none():
    for source in (toy().to_df(), toy().X, [toy()], 7, None):
        refused(lambda: open_container(source), "is no source of counts")


def test_a_matrix_that_does_not_fit_its_tables(tmp_path):
    toy().write_h5ad(tmp_path/"cells.h5ad")
    with h5py.File(tmp_path/"cells.h5ad", "r+") as f:
        del f["X"]
        f["X"] = np.ones((40, 24))
    refused(lambda: open_container(tmp_path/"cells.h5ad"), "a matrix of 40 x 24, but tables of 24 cells and 40 genes")


def test_what_was_refused_may_be_written(tmp_path):
    p = tmp_path/"cells.h5ad"
    toy().write_h5ad(p)
    with h5py.File(p, "r+") as f: del f["obs"]
    with pytest.raises(Exception) as kept: open_container(p)   # as a notebook keeps the last error
    toy().write_h5ad(p)
    assert kept and same(p)
