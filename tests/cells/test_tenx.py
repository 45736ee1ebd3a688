"Folders and files as Cell Ranger, STARsolo and those who copied them leave them."
import gzip
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from conftest import refused, toy
from handmade import tenx_folder, tenx_h5
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.containers import open_container
from mix_geneformer.cells.counts import read_counts

def put(path, data): path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def lines(*columns): return "".join("\t".join(row)+"\n" for row in zip(*columns)).encode()


def folder_of(a, out, names=("matrix.mtx", "genes.tsv", "barcodes.tsv"), columns=2, turned=False, tail=b""):
    "A 10x folder whose files are called so"
    out.mkdir(exist_ok=True)
    x = a.X if turned else a.X.T
    scipy.io.mmwrite(out/"m", x.astype(int).tocoo())
    put(out/names[0], (out/"m.mtx").read_bytes())
    (out/"m.mtx").unlink()
    more = [["Gene Expression"]*a.n_vars, ["chr1"]*a.n_vars, ["1"]*a.n_vars, ["2"]*a.n_vars]
    put(out/names[1], lines(*[a.var_names, a.var.symbol, *more][:columns]).rstrip(b"\n")+tail)
    put(out/names[2], lines(a.obs_names)+tail)
    return out


@given(data=st.data())
def test_folders_of_every_age(data, tmp_path_factory):
    packed = [data.draw(st.sampled_from(["", ".gz"])) for _ in range(3)]
    before, after = data.draw(st.sampled_from([("", ""), ("GSM1_s1_", ""), ("s1.", ""), ("", "_s1"), ("GSM1-", "-a")]))
    kind = data.draw(st.sampled_from(["genes", "features"]))
    called = ("matrix", "mtx"), (kind, "tsv"), ("barcodes", "tsv")
    names = [f"{before}{n}{after}.{e}{z}" for (n, e), z in zip(called, packed)]
    out, a = tmp_path_factory.mktemp("tenx")/"cells", toy(n=data.draw(st.integers(1, 30)))
    turned = data.draw(st.booleans()) and a.n_obs != a.n_vars
    folder_of(a, out, names, data.draw(st.integers(1, 6)), turned, data.draw(st.sampled_from([b"", b"\n"])))
    for source in (out, out/names[0]):   # the folder, or its matrix
        found = open_container(source)
        assert (found.matrix != a.X).nnz == 0 and found.obs.index.tolist() == a.obs_names.tolist()
        assert found.var.index.tolist() == a.var_names.tolist()


def test_a_folder_of_starsolo(tmp_path):
    "Beside the matrix lie those of counts that were shared out"
    a = toy()
    out = folder_of(a, tmp_path/"raw", ("matrix.mtx", "features.tsv", "barcodes.tsv"), 3)
    (out/"UniqueAndMult-EM.mtx").write_text("%%MatrixMarket matrix coordinate real general\n1 1 0\n")
    assert (read_counts(out, verbose=False).X != read_counts(a, verbose=False).X).nnz == 0


def test_packed_and_unpacked_side_by_side(tmp_path):
    out = folder_of(toy(), tmp_path/"cells")
    put(out/"matrix.mtx.gz", (out/"matrix.mtx").read_bytes())
    assert open_container(out).matrix.shape == toy().shape


def test_samples_in_one_folder(tmp_path):
    for s in "ab": out = folder_of(toy(), tmp_path/"all", (f"{s}_matrix.mtx.gz", f"{s}_genes.tsv", f"{s}_barcodes.tsv"))
    refused(lambda: open_container(out), "all holds 2 matrices", f"'{out}/a_matrix.mtx.gz'")
    assert open_container(out/"b_matrix.mtx.gz").matrix.shape == toy().shape
    (out/"b_barcodes.tsv").unlink()
    refused(lambda: open_container(out/"b_matrix.mtx.gz"), "no b_barcodes.tsv, plain or gzipped", "put it there")


def test_names_that_look_missing_are_names(tmp_path):
    a = toy()
    a.obs_names = ["NA", "nan", "", "1e5", "None", '"', *a.obs_names[6:]]
    out = folder_of(a, tmp_path/"cells")
    p = out/"barcodes.tsv"
    assert p.read_text().splitlines()[2] == ""
    refused(lambda: open_container(out), "lists 40 genes and barcodes.tsv 23 cells")   # a cell without a name
    p.write_text(p.read_text().replace("\n\n", "\nno\n"))
    assert open_container(out).obs.index.tolist()[:6] == ["NA", "nan", "no", "1e5", "None", '"']


def test_a_header_line(tmp_path):
    out = folder_of(toy(), tmp_path/"cells")
    right = (out/"genes.tsv").read_text()
    (out/"genes.tsv").write_text(f"gene_id\tsymbol\n{right}")
    refused(lambda: open_container(out), "matrix.mtx is 40 x 24, but genes.tsv lists 41 genes", "take header lines out")


def test_the_rows_keep_what_is_said_of_them(tmp_path):
    found = open_container(folder_of(toy(), tmp_path/"cells", columns=6))
    assert list(found.var) == ["gene_symbols", "feature_types", "chromosome", "start", "end"] and not list(found.obs)


# --- one file -------------------------------------------------------------------------------------------------------

def old_h5(path, **genomes):
    "As Cell Ranger 2 laid it out: a group per genome"
    with h5py.File(path, "w") as f:
        for genome, a in genomes.items():
            x = a.X.tocsr().astype(np.int32)
            for k in ("data", "indices", "indptr"): f[f"{genome}/{k}"] = getattr(x, k)
            f[f"{genome}/shape"], f[f"{genome}/barcodes"] = x.shape[::-1], np.array(a.obs_names, "S")
            f[f"{genome}/genes"], f[f"{genome}/gene_names"] = np.array(a.var_names, "S"), np.array(a.var.symbol, "S")
    return path


def test_several_genomes_of_version_2(tmp_path):
    h, m = toy("human"), toy("mouse", seed=1)
    m.obs_names = [*h.obs_names[4:], *[f"only{i}" for i in range(4)]]   # of each genome its own cells
    found = open_container(old_h5(tmp_path/"cells.h5", hg19=h, mm10=m))
    assert found.var.genome.tolist() == ["hg19"]*40+["mm10"]*40
    x = pd.DataFrame(found.matrix[0:28].toarray(), found.obs.index)
    assert (x.loc[h.obs_names, :39].to_numpy() == h.X.toarray()).all() and not x.loc["only0":, :39].to_numpy().any()
    assert (x.loc[m.obs_names, 40:].to_numpy() == m.X.toarray()).all() and len(x) == 28


def test_one_genome_of_version_2(tmp_path):
    got = read_counts(old_h5(tmp_path/"cells.h5", GRCh38=toy()), verbose=False)
    assert (got.X != read_counts(toy(), verbose=False).X).nnz == 0


def test_all_rows_of_version_3_with_their_kinds(tmp_path):
    p = tenx_h5(toy(), tmp_path)
    with h5py.File(p, "r+") as f:
        g = f["matrix/features"]
        g["feature_type"][-2:] = b"Antibody Captur"
        g["genome"][:] = b"mm10"
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # names that stand twice are no news
        found = open_container(p)
    assert found.matrix.shape == (24, 40) and set(found.var.genome) == {"mm10"}
    assert found.var.feature_types.value_counts().tolist() == [38, 2]
    assert found.var.gene_ids.tolist() == toy().var_names.tolist()


@pytest.mark.parametrize("write", [tenx_folder(2), tenx_folder(3), tenx_h5])
def test_layers_are_not_there(tmp_path, write):
    refused(lambda: open_container(write(toy(), tmp_path), "counts"), "no layer 'counts' (10x files have 0 layers)")


def test_counts_are_sparse_whatever_they_were(tmp_path):
    assert sp.issparse(open_container(folder_of(toy(), tmp_path/"cells")).matrix)
