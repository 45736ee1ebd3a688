"Hand-made files of every kind, and counts that cannot be used; shared by the tests of several rooms."
import gzip
import os

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from conftest import partners, toy

# --- one set of cells, in every format ------------------------------------------------------------------------------

def h5ad(kind, **kw):
    def write(a, folder):
        b = a.copy()
        b.X = kind(b.X)
        b.write_h5ad(folder/"cells.h5ad", **kw)
        return folder/"cells.h5ad"
    return write


def h5ad_layer(a, folder):
    b = a.copy()
    b.layers["counts"], b.X = b.X.copy(), b.X * .37
    b.write_h5ad(folder/"cells.h5ad")
    return folder/"cells.h5ad", dict(layer="counts")


def h5ad_symbols(a, folder):
    "Symbols in the index, IDs in a column."
    b = a.copy()
    b.var = pd.DataFrame(dict(gene_ids=b.var_names), index=b.var.symbol.to_numpy())
    b.write_h5ad(folder/"cells.h5ad")
    return folder/"cells.h5ad"


def loom(gene_attr):
    "As loompy lays it out: genes x cells, row_attrs, col_attrs."
    def write(a, folder):
        names = a.var_names if gene_attr != "Gene" else a.var.symbol
        with h5py.File(folder/"cells.loom", "w") as f:
            f.attrs["LOOM_SPEC_VERSION"] = "3.0.0"
            f.create_dataset("matrix", data=a.X.toarray().T, chunks=(8, 8), compression="gzip")
            f.create_group("layers"), f.create_group("row_graphs"), f.create_group("col_graphs")
            text = h5py.string_dtype()
            f.create_dataset(f"row_attrs/{gene_attr}", data=names, dtype=text)
            f.create_dataset("col_attrs/CellID", data=a.obs_names, dtype=text)
            for c in a.obs: f.create_dataset(f"col_attrs/{c}", data=a.obs[c].astype(str), dtype=text)
        return folder/"cells.loom"
    return write


def tenx_h5(a, folder):
    "As Cell Ranger 3 lays it out: CSC of genes x cells."
    x = a.X.tocsr().astype(np.int32)
    with h5py.File(folder/"filtered_feature_bc_matrix.h5", "w") as f:
        g = f.create_group("matrix")
        g["barcodes"], g["data"] = np.array(a.obs_names, "S"), x.data
        g["indices"], g["indptr"] = x.indices.astype(np.int64), x.indptr.astype(np.int64)
        g["shape"] = np.array(x.shape[::-1], np.int32)
        g["features/id"], g["features/name"] = np.array(a.var_names, "S"), np.array(a.var.symbol, "S")
        g["features/feature_type"] = np.array(["Gene Expression"] * a.n_vars, "S")
        g["features/genome"] = np.array(["GRCh38"] * a.n_vars, "S")
        g["features/_all_tag_keys"] = np.array(["genome"], "S")
    return folder/"filtered_feature_bc_matrix.h5"


def tenx_folder(version):
    "As Cell Ranger lays it out: genes x cells, v3 gzipped with feature types, v2 plain."
    def write(a, folder):
        out = folder/"filtered"
        out.mkdir()
        opened = (lambda n: gzip.open(out/f"{n}.gz", "wb")) if version == 3 else (lambda n: open(out/n, "wb"))
        with opened("matrix.mtx") as f: scipy.io.mmwrite(f, a.X.T.astype(np.int64).tocoo(), field="integer")
        with opened("barcodes.tsv") as f: f.write("".join(f"{o}\n" for o in a.obs_names).encode())
        tail = "\tGene Expression" if version == 3 else ""
        with opened("features.tsv" if version == 3 else "genes.tsv") as f:
            f.write("".join(f"{i}\t{s}{tail}\n" for i, s in zip(a.var_names, a.var.symbol)).encode())
        return out
    return write


def backed(a, folder): return ad.read_h5ad(h5ad(lambda x: x)(a, folder), backed="r")


def dense(x): return x.toarray()


FORMATS = dict(
    h5ad_csr=h5ad(sp.csr_matrix),
    h5ad_csc=h5ad(sp.csc_matrix),
    h5ad_dense=h5ad(dense),
    h5ad_gzip=h5ad(sp.csr_matrix, compression="gzip"),
    h5ad_dense_gzip=h5ad(dense, compression="gzip"),
    h5ad_int64=h5ad(lambda x: x.astype(np.int64)),
    h5ad_float64=h5ad(lambda x: x.astype(np.float64)),
    h5ad_layer=h5ad_layer,
    h5ad_symbols=h5ad_symbols,
    loom_ids=loom("Accession"),
    loom_symbols=loom("Gene"),
    tenx_h5=tenx_h5,
    tenx_v3=tenx_folder(3),
    tenx_v2=tenx_folder(2),
    backed=backed,
    memory=lambda a, folder: a)


def in_no_order():
    "Cells whose genes are listed by ID in no order, as files list them."
    a = toy(n=33)
    return a[:, np.random.default_rng(0).permutation(a.n_vars)].copy()


def made_as(name, a, folder):
    "The cells in a format: what is handed in, and with which arguments."
    made = FORMATS[name](a, folder)
    return made if isinstance(made, tuple) else (made, {})


def cut(path, share): path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


# --- counts that cannot be used -------------------------------------------------------------------------------------

def named(names, x=None):
    "Three cells with one count of each name, or those given."
    x = np.ones((3, len(names)), np.float32) if x is None else x
    return ad.AnnData(x, var=pd.DataFrame(index=list(names)))


def changed(value, at=(3, 5)):
    "Good counts but for one value."
    a = toy()
    x = a.X.toarray()
    x[at] = value
    return ad.AnnData(sp.csr_matrix(x), a.obs, a.var)


def normalised():
    a = toy()
    a.X.data = np.log1p(a.X.data / 7)
    return a


def half_human_half_mouse():
    h, m = partners(20)
    return named([*h, *m[:5]])


def without_counts(): return ad.AnnData(obs=pd.DataFrame(index=list("ab")), var=pd.DataFrame(index=["INS", "GCG"]))


def spoilt_late():
    "A value that only the second block of cells shows."
    x = sp.vstack([toy(n=4100).X, changed(.5).X]).tocsr()
    return ad.AnnData(x, obs=pd.DataFrame(index=[f"c{i}" for i in range(x.shape[0])]), var=toy().var)


SOURCES = {   # name: (what is handed in, what the sentence says)
    "normalised": (normalised,
                   ["values that are not whole numbers", "normalised data?", "pass raw counts"]),
    "negative": (lambda: changed(-2), ["1 negative values", "pass raw counts"]),
    "nan": (lambda: changed(np.nan), ["1 values that are NaN or infinite", "pass raw counts"]),
    "infinite": (lambda: changed(np.inf), ["1 values that are NaN or infinite", "pass raw counts"]),
    "no cells": (lambda: toy()[:0].copy(), ["is empty (0 cells x 40 genes)", "pass a matrix of cells x genes"]),
    "no genes": (lambda: toy()[:, :0].copy(), ["is empty (24 cells x 0 genes)", "pass a matrix of cells x genes"]),
    "unknown genes": (lambda: named(["gene_1", "gene_2", "x"]),
                      ["0 of 3 genes matched human or mouse", "'gene_1'", "pass species= and Ensembl IDs or symbols"]),
    "mixed species": (half_human_half_mouse,
                      ["more than one species (20 human, 5 mouse)", "split the file by species"]),
    "no X": (without_counts, ["no X", "layers: none", "pass layer="]),
}


# --- a pickle that does something -----------------------------------------------------------------------------------

class Runs:
    "A pickle of this makes a folder when it is loaded by pickle itself"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)
