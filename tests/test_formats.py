"The file a cell comes in does not change its sentence; a corpus on disk is whole, resumable, and one that `datasets` opens"
import concurrent.futures, errno, gzip, multiprocessing, os

import anndata as ad
import datasets
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.io
import scipy.sparse as sp

from conftest import files_under, refused, toy
from mix_geneformer import tokenizer
from mix_geneformer.corpus import open_counts, read_counts
from mix_geneformer.tokenizer import Vocabulary, corpus_vocabulary, encode_cells, gene_medians, load_corpus, sentences_of, tokenize

rows = lambda sentences: [sentences[i].tolist() for i in range(len(sentences))]


# --- one set of cells, in every format ---------------------------------------------------------------------------

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
    "Symbols in the index, IDs in a column"
    b = a.copy()
    b.var = pd.DataFrame(dict(gene_ids=b.var_names), index=b.var.symbol.to_numpy())
    b.write_h5ad(folder/"cells.h5ad")
    return folder/"cells.h5ad"


def loom(gene_attr):
    "As loompy lays it out: genes x cells, row_attrs, col_attrs"
    def write(a, folder):
        with h5py.File(folder/"cells.loom", "w") as f:
            f.attrs["LOOM_SPEC_VERSION"] = "3.0.0"
            f.create_dataset("matrix", data=a.X.toarray().T, chunks=(8, 8), compression="gzip")
            f.create_group("layers"), f.create_group("row_graphs"), f.create_group("col_graphs")
            text = h5py.string_dtype()
            f.create_dataset(f"row_attrs/{gene_attr}", data=a.var_names if gene_attr != "Gene" else a.var.symbol, dtype=text)
            f.create_dataset("col_attrs/CellID", data=a.obs_names, dtype=text)
            for c in a.obs: f.create_dataset(f"col_attrs/{c}", data=a.obs[c].astype(str), dtype=text)
        return folder/"cells.loom"
    return write


def tenx_h5(a, folder):
    "As Cell Ranger 3 lays it out: CSC of genes x cells"
    x = a.X.tocsr().astype(np.int32)
    with h5py.File(folder/"filtered_feature_bc_matrix.h5", "w") as f:
        g = f.create_group("matrix")
        g["barcodes"], g["data"], g["indices"], g["indptr"] = np.array(a.obs_names, "S"), x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64)
        g["shape"] = np.array(x.shape[::-1], np.int32)
        g["features/id"], g["features/name"] = np.array(a.var_names, "S"), np.array(a.var.symbol, "S")
        g["features/feature_type"], g["features/genome"] = np.array(["Gene Expression"] * a.n_vars, "S"), np.array(["GRCh38"] * a.n_vars, "S")
        g["features/_all_tag_keys"] = np.array(["genome"], "S")
    return folder/"filtered_feature_bc_matrix.h5"


def tenx_folder(version):
    "As Cell Ranger lays it out: genes x cells, v3 gzipped with feature types, v2 plain"
    def write(a, folder):
        out = folder/"filtered"
        out.mkdir()
        opened = (lambda n: gzip.open(out/f"{n}.gz", "wb")) if version == 3 else (lambda n: open(out/n, "wb"))
        with opened("matrix.mtx") as f: scipy.io.mmwrite(f, a.X.T.astype(np.int64).tocoo(), field="integer")
        with opened("barcodes.tsv") as f: f.write("".join(f"{o}\n" for o in a.obs_names).encode())
        tail = "\tGene Expression" if version == 3 else ""
        with opened("features.tsv" if version == 3 else "genes.tsv") as f: f.write("".join(f"{i}\t{s}{tail}\n" for i, s in zip(a.var_names, a.var.symbol)).encode())
        return out
    return write


def backed(a, folder): return ad.read_h5ad(h5ad(lambda x: x)(a, folder), backed="r")


FORMATS = dict(h5ad_csr=h5ad(sp.csr_matrix), h5ad_csc=h5ad(sp.csc_matrix), h5ad_dense=h5ad(lambda x: x.toarray()), h5ad_gzip=h5ad(sp.csr_matrix, compression="gzip"),
    h5ad_dense_gzip=h5ad(lambda x: x.toarray(), compression="gzip"), h5ad_int64=h5ad(lambda x: x.astype(np.int64)), h5ad_float64=h5ad(lambda x: x.astype(np.float64)),
    h5ad_layer=h5ad_layer, h5ad_symbols=h5ad_symbols, loom_ids=loom("Accession"), loom_symbols=loom("Gene"), tenx_h5=tenx_h5, tenx_v3=tenx_folder(3), tenx_v2=tenx_folder(2),
    backed=backed, memory=lambda a, folder: a)


@pytest.fixture(scope="module")
def source():
    "Cells whose genes are listed by ID in no order, as files list them"
    a = toy(n=33)
    return a[:, np.random.default_rng(0).permutation(a.n_vars)].copy()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_cells(source, vocab, tmp_path, name):
    made = FORMATS[name](source, tmp_path)
    made, how = made if isinstance(made, tuple) else (made, {})
    a, b = read_counts(made, verbose=False, **how), read_counts(source, verbose=False)
    assert (a.X != b.X).nnz == 0 and a.X.dtype == np.float32 and a.X.format == "csr" and a.var.equals(b.var)
    assert a.obs_names.tolist() == source.obs_names.tolist() and a.obs.n_counts.tolist() == b.obs.n_counts.tolist() and set(a.obs.species) == {"human"}
    assert a.uns["mix_geneformer"] == dict(species="human", n_cells=33, n_genes=40, n_matched=40, share_of_counts=1.)
    opened = open_counts(made, **how)
    assert rows(encode_cells(opened, vocab)) == rows(encode_cells(source, vocab))
    pd.testing.assert_series_equal(gene_medians(opened), gene_medians(source))
    assert Vocabulary.build(opened) == Vocabulary.build(source)
    ds = tokenize(opened, vocab, tmp_path/"corpus", keep=[], progress=False)
    assert [list(r) for r in ds["input_ids"]] == rows(encode_cells(source, vocab))
    if name.startswith(("h5ad", "loom")): assert a.obs.cell_type.astype(str).tolist() == source.obs.cell_type.tolist()


@pytest.mark.parametrize("name", ["h5ad_csr", "h5ad_dense", "loom_ids"])
def test_files_are_read_in_blocks(source, vocab, tmp_path, name):
    whole, opened = encode_cells(source, vocab), open_counts(FORMATS[name](source, tmp_path))
    for size in (1, 7, 33, 100):
        blocks = list(opened.blocks(size))
        assert [s for s, *_ in blocks] == list(range(0, 33, size)) and all(x.shape[0] <= size for _, x, _ in blocks)
        flat = np.concatenate([tokenizer.rank_tokens(x, *vocab.columns(opened.ensembl_ids, "human"))[0] for _, x, _ in blocks])
        assert flat.tolist() == whole.values.tolist()


# --- the corpus on disk ------------------------------------------------------------------------------------------

@pytest.fixture
def paths(both, tmp_path):
    for a, n in zip(both, ("human", "mouse")): a.write_h5ad(tmp_path/f"{n}.h5ad")
    return [tmp_path/"human.h5ad", tmp_path/"mouse.h5ad"]


def content(folder): return {n: (folder/n).read_bytes() for n in files_under(folder) if n.endswith(".arrow")}


def test_columns_of_a_corpus(both, vocab, corpus):
    ds = load_corpus(corpus)
    assert set(ds.column_names) == {"input_ids", "length", "species", "cell_type", "donor"} and len(ds) == 48
    assert list(ds["species"]) == ["human"] * 24 + ["mouse"] * 24 and list(ds["donor"]) == both[0].obs.donor.tolist() + both[1].obs.donor.tolist()
    assert list(ds["length"]) == [len(r) for r in ds["input_ids"]] and max(ds["length"]) <= 24
    assert ds.features["input_ids"].feature.dtype == "uint16" and corpus_vocabulary(corpus) == corpus_vocabulary(ds) == vocab


def test_datasets_opens_the_folder(corpus, both, vocab):
    ds = datasets.load_from_disk(str(corpus))
    expected = rows(encode_cells(both[0], vocab, 24)) + rows(encode_cells(both[1], vocab, 24))
    assert [list(r) for r in ds["input_ids"]] == expected
    assert [list(r) for r in ds.select([47, 3])["input_ids"]] == [expected[47], expected[3]]
    assert ds.filter(lambda s: s == "mouse", input_columns="species").num_rows == 24


def test_in_memory_and_on_disk_sentences_agree(corpus):
    ds = load_corpus(corpus)
    memory, disk = sentences_of(ds), sentences_of(ds, in_memory_below=0)
    assert rows(memory) == rows(disk) and memory.lengths.tolist() == disk.lengths.tolist() and memory.species.tolist() == disk.species.tolist()
    picked = ds.select([40, 2, 2])
    assert rows(sentences_of(picked)) == rows(sentences_of(picked, in_memory_below=0)) == [rows(memory)[i] for i in (40, 2, 2)]


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_one_process_equals_an_executor(paths, vocab, tmp_path, executor):
    plain = tokenize(paths, vocab, tmp_path/"plain", progress=False)
    make = concurrent.futures.ThreadPoolExecutor if executor == "threads" else lambda n: concurrent.futures.ProcessPoolExecutor(n, multiprocessing.get_context("spawn"))
    with make(2 if executor == "threads" else 1) as client: mapped = tokenize(paths, vocab, tmp_path/"mapped", client=client, progress=False)
    assert content(tmp_path/"plain") == content(tmp_path/"mapped") and len(content(tmp_path/"plain")) == 2
    assert plain.to_pandas().equals(mapped.to_pandas()) and files_under(tmp_path/"plain") == files_under(tmp_path/"mapped")


def test_the_same_again_is_reused_and_other_inputs_are_refused(paths, vocab, tmp_path):
    tokenize(paths, vocab, tmp_path/"corpus", progress=False)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"corpus").iterdir()}
    tokenize(paths, vocab, tmp_path/"corpus", progress=False)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/"corpus").iterdir()} == before
    for other in (dict(sources=paths[:1]), dict(context=9), dict(keep=["donor"]), dict(vocab=Vocabulary.build(paths, "shared"))):
        refused(lambda: tokenize(**{**dict(sources=paths, vocab=vocab, out=tmp_path/"corpus", progress=False), **other}), "made from other inputs")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/"corpus").iterdir()} == before


class Killed(BaseException): "As a kill: nothing catches it"


@pytest.mark.parametrize("where", ["before the second shard", "inside the second shard"])
def test_a_killed_tokenisation_goes_on(paths, vocab, tmp_path, monkeypatch, where):
    calls, name = [], "_write_shard" if where.startswith("before") else "_encode_block"
    real = getattr(tokenizer, name)

    def dies(*a, **k):
        calls.append(1)
        if len(calls) == 2: raise Killed
        return real(*a, **k)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(tokenizer, name, dies)
        tokenize(paths, vocab, tmp_path/"corpus", progress=False)
    first = tmp_path/"corpus"/"data-00000-of-00002.arrow"
    stamp = first.stat().st_ino, first.stat().st_mtime_ns
    assert not (tmp_path/"corpus"/"corpus.json").exists() and not (tmp_path/"corpus"/"data-00001-of-00002.arrow").exists()
    refused(lambda: load_corpus(tmp_path/"corpus"))
    refused(lambda: tokenize(paths[:1], vocab, tmp_path/"corpus", progress=False), "files of something else")    # another run does not take over
    tokenize(paths, vocab, tmp_path/"corpus", progress=False)
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == stamp                                             # the finished shard was not made again
    tokenize(paths, vocab, tmp_path/"whole", progress=False)
    assert content(tmp_path/"corpus") == content(tmp_path/"whole") and files_under(tmp_path/"corpus") == files_under(tmp_path/"whole")


def test_a_file_that_changed_is_tokenised_again(paths, vocab, tmp_path):
    tokenize(paths, vocab, tmp_path/"corpus", progress=False)
    toy("human", seed=9).write_h5ad(paths[0])
    refused(lambda: tokenize(paths, vocab, tmp_path/"corpus", progress=False), "made from other inputs")


# --- a full disk -------------------------------------------------------------------------------------------------

def full_file(path, mode, **kw):
    "Opens, but every byte meets a full disk"
    open(path, "wb").close()
    return REAL_FILE("/dev/full", mode, **kw)


def full_replace(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


REAL_FILE = pa.OSFile
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


@pytest.mark.parametrize("how", [pytest.param("write", marks=needs_full), "rename"])
def test_full_disk_while_tokenising(paths, vocab, tmp_path, monkeypatch, how):
    with monkeypatch.context() as m:
        m.setattr(pa, "OSFile", full_file) if how == "write" else m.setattr(tokenizer.os, "replace", full_replace)
        refused(lambda: tokenize(paths, vocab, tmp_path/"corpus", progress=False), "No space left on device", "free some space")
    assert not [f for f in files_under(tmp_path) if f.endswith(".partial")] and "corpus/corpus.json" not in files_under(tmp_path)
    refused(lambda: load_corpus(tmp_path/"corpus"))
    assert len(tokenize(paths, vocab, tmp_path/"corpus", progress=False)) == 48                                  # and there is space again
    assert not [f for f in files_under(tmp_path) if f.endswith(".partial")]


def test_full_disk_while_saving_a_vocabulary(vocab, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full_replace)
        refused(lambda: vocab.save(tmp_path), "No space left on device")
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("where", ["weights", "rename"])
def test_full_disk_while_saving_a_model(vocab, model_dir, tmp_path, monkeypatch, where):
    from mix_geneformer.model import load_model, save_model
    net = load_model(model_dir, "cpu").model
    with monkeypatch.context() as m:
        if where == "rename": m.setattr(os, "replace", full_replace)
        else: m.setattr(type(net), "save_pretrained", full_replace)
        refused(lambda: save_model(net, vocab, tmp_path/"out"/"model"), "No space left on device", "free some space")
    assert not (tmp_path/"out"/"model").exists() and list((tmp_path/"out").iterdir()) == []
    assert load_model(save_model(net, vocab, tmp_path/"out"/"model"), "cpu").vocab == vocab
