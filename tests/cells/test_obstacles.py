"What stood in the way of reading is said truly: cut off is what ends too early, and nothing else."
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import refused, toy
from handmade import cut, h5ad, loom, tenx_folder, tenx_h5
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells import obstacles
from mix_geneformer.cells.containers import open_container
from mix_geneformer.cells.counts import read_counts

WRITERS = dict(h5ad=h5ad(lambda x: x), loom=loom("Accession"), h5=tenx_h5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {k: write(toy(), tmp_path_factory.mktemp(k)) for k, write in WRITERS.items()}


@pytest.mark.parametrize("kind", WRITERS)
@given(share=st.floats(0, .999))
def test_every_beginning_of_a_file_is_cut_off(whole, kind, share):
    p = whole[kind].with_name(f"part{whole[kind].suffix}")
    p.write_bytes(whole[kind].read_bytes()[:int(share*whole[kind].stat().st_size)])
    line = refused(lambda: open_container(p), p.name, "fetch")
    if p.stat().st_size == 0 or p.stat().st_size >= 8: assert "it is cut off" in line   # less has no sign of HDF5


LACKING = dict(h5ad=["obs/_index", "var/_index", "X/indptr", "X/data"], loom=["matrix", "row_attrs"],
               h5=["matrix/barcodes", "matrix/features/id", "matrix/shape"])


@pytest.mark.parametrize("kind,part", [(k, p) for k, parts in LACKING.items() for p in parts])
def test_a_whole_file_that_lacks_a_part_is_never_called_cut_off(tmp_path, kind, part):
    p = WRITERS[kind](toy(), tmp_path)
    with h5py.File(p, "r+") as f: del f[part]
    line = refused(lambda: open_container(p), p.name)
    assert "cut off" not in line and "damaged" not in line
    h5py.File(p, "r+").close()   # what was refused is closed


def test_the_words_of_the_library_below(tmp_path):
    p = h5ad(lambda x: x)(toy(), tmp_path)
    with h5py.File(p, "r+") as f: f["obs"].attrs["encoding-type"] = "of next year"
    line = refused(lambda: open_container(p), "of next year", "pass what anndata.io.read_h5ad(", "write it again")
    assert "cut off" not in line


PARTS = ["matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("share", [0, .2, .6, .95])
def test_a_10x_folder_with_a_file_that_is_cut_off(tmp_path, name, share):
    out = tenx_folder(3)(toy(), tmp_path)
    cut(out/name, share)
    refused(lambda: open_container(out), "cannot be read as 10x folder, it is cut off", "fetch or write it again")


@pytest.mark.parametrize("name", ["matrix.mtx", "barcodes.tsv", "genes.tsv"])
@given(share=st.floats(0, .9))
def test_a_10x_folder_that_is_not_gzipped_and_cut_off(tmp_path, name, share):
    "Text that ends in the middle is refused: as cut off, or as lists that do not fit"
    out = tmp_path/"filtered"
    if not out.exists(): tenx_folder(2)(toy(), tmp_path)
    before = (out/name).read_bytes()
    (out/name).write_bytes(before[:int(share*len(before))])
    line = refused(lambda: open_container(out), "filtered" if name == "matrix.mtx" else "")
    (out/name).write_bytes(before)
    if name == "matrix.mtx": assert "it is cut off" in line


def test_files_of_another_kind(tmp_path):
    for ending in ("h5ad", "h5mu", "loom", "h5"):
        p = tmp_path/f"cells.{ending}"
        p.write_text("these are not counts\n"*99)
        refused(lambda: open_container(p), "it is of another kind (", "file signature not found", "its own ending")


# --- filters --------------------------------------------------------------------------------------------------------

def filtered(folder, name):
    "An .h5ad whose counts are compressed by a filter that HDF5 does not bring"
    hdf5plugin = pytest.importorskip("hdf5plugin")
    toy().write_h5ad(folder/"cells.h5ad")
    with h5py.File(folder/"cells.h5ad", "r+") as f:
        for k in ("X/data", "X/indices", "X/indptr"):
            values = f[k][:]
            del f[k]
            f.create_dataset(k, data=values, chunks=True, **getattr(hdf5plugin, name)())
    return folder/"cells.h5ad"


@pytest.mark.parametrize("name", ["Blosc", "Blosc2", "Zstd", "LZ4", "BZip2", "Bitshuffle"])
def test_filters_of_hdf5plugin(tmp_path, name):
    got, expected = (read_counts(x, verbose=False) for x in (filtered(tmp_path, name), toy()))
    assert (got.X != expected.X).nnz == 0


WITHOUT = """
import sys
sys.modules["hdf5plugin"] = None   # as if it were not installed
from mix_geneformer.cells.counts import read_counts
read_counts(sys.argv[1])
"""


def test_where_a_filter_is_missing_the_package_is_named(tmp_path):
    got = subprocess.run([sys.executable, "-c", WITHOUT, filtered(tmp_path, "Zstd")], capture_output=True, text=True)
    line = got.stderr.strip().splitlines()[-1]
    assert got.returncode == 1 and "InputError: cells.h5ad" in line and "pip install hdf5plugin" in line
    assert "cut off" not in line and "damaged" not in line


def test_a_filter_that_the_package_lacks_too(monkeypatch):
    e = OSError("Can't synchronously read data (required filter 'x' is not registered)")
    monkeypatch.setattr(obstacles, "hdf5plugin", np)   # anything that is there
    assert "compression='gzip'" in str(obstacles.unreadable_rows("cells.h5ad", 0, 9, e))
