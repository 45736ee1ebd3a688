"What a file from elsewhere may not do: lead to other files, run something, fill the memory."
import json
import os
import pickle
import tarfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import zarr
from conftest import refused, toy
from handmade import Runs, loom, tenx_h5
from reliability import noted_refusal

from mix_geneformer.cells.containers import open_container
from mix_geneformer.cells.counts import read_counts

@pytest.fixture
def secret(tmp_path):
    "Another file of the user's"
    with h5py.File(tmp_path/"secret.h5", "w") as f: f["numbers"] = np.arange(24)
    return tmp_path/"secret.h5"


def h5ad(folder):
    toy().write_h5ad(folder/"cells.h5ad")
    return folder/"cells.h5ad"


WRITERS = dict(h5ad=h5ad, loom=lambda folder: loom("ensembl_id")(toy(), folder),
               tenx=lambda folder: tenx_h5(toy(), folder))
TABLE = dict(h5ad="obs/donor_id", loom="col_attrs/donor_id", tenx="matrix/donor_id")


def external_link(f, at, secret): f[at] = h5py.ExternalLink(str(secret), "/numbers")


def external_numbers(f, at, secret): f.create_dataset(at, (24,), "u1", external=[(str(secret), 0, 24)])


def virtual_table(f, at, secret):
    layout = h5py.VirtualLayout((24,), "i8")
    layout[:] = h5py.VirtualSource(str(secret), "numbers", (24,))
    f.create_virtual_dataset(at, layout)


def bomb(f, at, secret): f.create_dataset(at, (10**12,), "i8", chunks=(1000,), compression="gzip")


SPOILS = dict(
    external_link=(external_link, "leads to"), virtual_table=(virtual_table, "takes its numbers from"),
    external_numbers=(external_numbers, "takes its numbers from"), bomb=(bomb, "declares 8,000,000,000,000 bytes"))


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("kind", WRITERS)
def test_hdf5_that_leads_elsewhere_or_declares_too_much(kind, spoil, tmp_path, secret):
    path, (how, said) = WRITERS[kind](tmp_path), SPOILS[spoil]
    assert read_counts(path, verbose=False).n_obs == 24
    with h5py.File(path, "r+") as f: how(f, TABLE[kind], secret)
    line = refused(lambda: read_counts(path), f"{path.name} is not read", said, "do not trust this file")
    noted_refusal(f"{kind}: {spoil.replace('_', ' ')}", path.stat().st_size, line)
    with h5py.File(path, "r+"): pass   # it was closed


def test_counts_themselves_that_are_elsewhere(tmp_path, secret):
    path = h5ad(tmp_path)
    with h5py.File(path, "r+") as f:
        f.move("X", "was")
        with h5py.File(secret, "r+") as g: f.copy("was", g, "X")
        f["X"] = h5py.ExternalLink(str(secret), "/X")
    line = refused(lambda: open_container(path), "X leads to")
    noted_refusal("h5ad: counts of another file", path.stat().st_size, line)


def test_links_within_a_file_are_followed(tmp_path):
    path = h5ad(tmp_path)
    with h5py.File(path, "r+") as f:
        f.move("X", "kept")
        f["X"] = h5py.SoftLink("/kept")
    assert (read_counts(path, verbose=False).X != read_counts(toy(), verbose=False).X).nnz == 0


@pytest.mark.parametrize("target", ["/nowhere", "/obs/../X", "/X"])
def test_links_that_lead_nowhere_or_to_themselves(tmp_path, target):
    path = h5ad(tmp_path)
    with h5py.File(path, "r+") as f:
        del f["X"]
        f["X"] = h5py.SoftLink(target)
    noted_refusal(f"h5ad: soft link to {target}", path.stat().st_size, refused(lambda: read_counts(path), path.name))


def test_references_in_place_of_numbers(tmp_path):
    path = h5ad(tmp_path)
    with h5py.File(path, "r+") as f:
        data = f["X/data"]
        n, kept = len(data), dict(data.attrs)
        del f["X/data"]
        refs = np.array([f["obs"].ref]*n, dtype=h5py.ref_dtype)
        f["X"].create_dataset("data", data=refs, dtype=h5py.ref_dtype).attrs.update(kept)
    noted_refusal("h5ad: object references", path.stat().st_size, refused(lambda: read_counts(path), path.name))


def size_of(folder): return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def store(folder):
    toy().write_zarr(folder/"cells.zarr")
    return folder/"cells.zarr"


def test_zarr_with_pickles_runs_nothing(tmp_path):
    path = tmp_path/"cells.zarr"
    with ad.settings.override(zarr_write_format=2): toy().write_zarr(path)
    for meta in path.rglob(".zmetadata"): meta.unlink()   # each array is asked for itself
    array = dict(zarr_format=2, shape=[1], chunks=[1], dtype="|u1", fill_value=0, order="C", filters=None)
    (path/"obs"/"donor_id").mkdir()
    (path/"obs"/"donor_id"/".zarray").write_text(json.dumps(dict(array, compressor=dict(id="pickle", protocol=4))))
    (path/"obs"/"donor_id"/"0").write_bytes(pickle.dumps(Runs(tmp_path/"ran")))
    line = refused(lambda: read_counts(path), "donor_id holds pickles, which can run anything")
    noted_refusal("zarr: a pickle for numbers", (path/"obs"/"donor_id"/"0").stat().st_size, line)
    assert not (tmp_path/"ran").exists()
    pickle.loads((path/"obs"/"donor_id"/"0").read_bytes())
    assert (tmp_path/"ran").exists()   # it does run where the codec reads it


def test_zarr_that_declares_too_much(tmp_path):
    path = store(tmp_path)
    zarr.open_group(str(path), mode="r+")["obs"].create_array("donor_id", shape=(10**12,), chunks=(1000,), dtype="i8")
    for meta in path.rglob(".zmetadata"): meta.unlink()
    line = refused(lambda: read_counts(path), "donor_id declares 8,000,000,000,000 bytes")
    noted_refusal("zarr: bomb", size_of(path), line)


def test_zarr_that_leads_elsewhere(tmp_path):
    path = store(tmp_path)
    (tmp_path/"home").mkdir()
    os.symlink(tmp_path/"home", path/"obs"/"more")
    noted_refusal("zarr: link out of the store", size_of(path), refused(lambda: read_counts(path), "more leads to"))


def test_an_archive_is_not_unpacked(tmp_path):
    "A name that leads out of the folder does nothing: archives are refused whole, with the command that unpacks them"
    with tarfile.open(tmp_path/"cells.tar", "w") as t:
        t.add(h5ad(tmp_path), arcname="../../outside.h5ad")
    line = refused(lambda: read_counts(tmp_path/"cells.tar"), "is compressed as a whole", "tar xf")
    noted_refusal("tar: a name out of its folder", (tmp_path/"cells.tar").stat().st_size, line)
    assert not (tmp_path.parent/"outside.h5ad").exists() and not (tmp_path.parents[1]/"outside.h5ad").exists()


@pytest.mark.parametrize("size", ["1000000000000 40 1", "40 1000000000000 1", "40 24 1000000000000"])
def test_a_matrix_in_text_that_declares_too_much(tmp_path, size):
    folder = Path(tmp_path)/"sample"
    folder.mkdir()
    (folder/"matrix.mtx").write_text(f"%%MatrixMarket matrix coordinate integer general\n{size}\n1 1 1\n")
    a = toy()
    (folder/"genes.tsv").write_text("".join(f"{g}\t{g}\n" for g in a.var_names))
    (folder/"barcodes.tsv").write_text("".join(f"{c}\n" for c in a.obs_names))
    line = refused(lambda: read_counts(folder), "1000000000000" if size.endswith("0000") else "1,000,000,000,000")
    noted_refusal(f"10x folder: a matrix of {size}", size_of(folder), line)
