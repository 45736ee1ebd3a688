"The file a cell comes in does not change its sentence; a corpus on disk is whole, resumable, and one that `datasets` opens"
import concurrent.futures, errno, multiprocessing, os, pickle, threading, tracemalloc

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from conftest import files_under, islet_vocab, refused, toy
from handmade import FORMATS, in_no_order, made_as
from mix_geneformer.cells import encoding, ranking, tokenizer
from mix_geneformer.cells.counts import as_counts
from mix_geneformer.cells.exchange import export_corpus, import_corpus
from mix_geneformer.cells.medians import gene_medians
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import MappedSentences, sentences_of
from mix_geneformer.cells.storage import corpus_vocabulary, load_corpus
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary

rows = lambda sentences: [sentences[i].tolist() for i in range(len(sentences))]


# --- one set of cells, in every format ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(): return in_no_order()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_cells(source, vocab, tmp_path, name):
    made, how = made_as(name, source, tmp_path)
    opened = as_counts(made, **how)
    assert rows(encode_cells(opened, vocab)) == rows(encode_cells(source, vocab))
    pd.testing.assert_series_equal(gene_medians(opened), gene_medians(source))
    assert Vocabulary.build(opened) == Vocabulary.build(source)
    ds = tokenize(opened, vocab, tmp_path/"corpus", keep=[], progress=False)
    assert [list(r) for r in ds["input_ids"]] == rows(encode_cells(source, vocab))


@pytest.mark.parametrize("name", ["h5ad_csr", "h5ad_dense", "loom_ids"])
def test_files_are_read_in_blocks(source, vocab, tmp_path, name):
    whole, opened = encode_cells(source, vocab), as_counts(FORMATS[name](source, tmp_path))
    for size in (1, 7, 33, 100):
        blocks = list(opened.blocks(size))
        assert [s for s, *_ in blocks] == list(range(0, 33, size)) and all(x.shape[0] <= size for _, x, _ in blocks)
        flat = np.concatenate([ranking.rank_tokens(x, *vocab.columns(opened.ensembl_ids, "human"))[0] for _, x, _ in blocks])
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


def test_many_sentences_at_once(corpus):
    "In memory and on disk, from whole, shuffled, filtered, sliced, concatenated and twice selected data sets"
    ds = load_corpus(corpus)
    cut, rng = ds.select(range(5, 31)), np.random.default_rng(0)
    for d in (ds, ds.shuffle(seed=1), ds.filter(lambda s: s == "mouse", input_columns="species"), cut, cut.select([3, 3, 0]), datasets.concatenate_datasets([ds.select(range(40, 48)), cut]), ds.sort("length")):
        plain, names = list(d["input_ids"]), list(d["species"])
        for s in (sentences_of(d), sentences_of(d, in_memory_below=0), pickle.loads(pickle.dumps(MappedSentences(d)))):
            assert rows(s) == plain and s.species.tolist() == names and s.lengths.tolist() == [len(r) for r in plain] and s[0].dtype == np.uint16
            idx = rng.integers(0, len(d), 9)
            for context in (None, 1, 5, 99):
                values, n = s.flat(idx, context)
                assert values.dtype == np.uint16 and n.dtype == np.int64 and np.split(values, np.cumsum(n)[:-1])[4].tolist() == plain[idx[4]][:context]
                assert values.tolist() == sum((plain[i][:context] for i in idx), []) and n.tolist() == [len(plain[i][:context]) for i in idx]
            assert rows(s.take(idx)) == [plain[i] for i in idx] and s.take(idx).species.tolist() == s.species[idx].tolist() == [names[i] for i in idx]
            mask = rng.random(len(d)) < .5
            assert rows(s.take(mask)) == [plain[i] for i in np.flatnonzero(mask)] and type(s.take(mask)) is type(s)
            assert len(s.flat([])[0]) == 0 and len(s.flat([])[1]) == 0


def test_sentences_on_disk_are_views_of_the_file(corpus):
    "No token is copied to open them, to look at one cell, or to send them to another process"
    s = MappedSentences(load_corpus(corpus))
    assert not any(v.flags.owndata or v.flags.writeable for v, _ in s._chunks) and not s[3].flags.owndata and len(pickle.dumps(s)) < len(pickle.dumps(s.flat(range(48)))) + 20_000
    assert s.species.codes.dtype == np.int8                                            # a byte per cell


@pytest.mark.parametrize("vocab_of", [lambda paths: Vocabulary.build(paths), lambda paths: Vocabulary.build(paths, "shared")], ids=["separate", "shared"])
def test_export_and_import(paths, tmp_path, vocab_of):
    v = vocab_of(paths)
    ds = tokenize(paths, v, tmp_path/"corpus", progress=False)
    out = export_corpus(tmp_path/"corpus", tmp_path/"ours.dataset")
    plain = datasets.load_from_disk(str(tmp_path/"ours.dataset"))
    assert plain.features["input_ids"].feature.dtype == plain.features["length"].dtype == "int64" and set(plain.column_names) == set(ds.column_names)
    assert out[:] == plain[:] == ds[:]                                                # our own ids
    ids = pickle.loads((tmp_path/"ours.dataset"/"token_dictionary.pkl").read_bytes())
    assert ids["<pad>"] == 0 and all(ids[g] == t for g, t in zip(v.frame.ensembl_id, v.frame.token))
    theirs = {g: 70_000 + 3 * i for i, g in enumerate(v.frame.ensembl_id.sample(frac=1, random_state=0))}
    export_corpus(ds, tmp_path/"theirs.dataset", theirs)
    name = {t: g for g, t in theirs.items()}
    for i in (0, 30): assert [name[t] for t in datasets.load_from_disk(str(tmp_path/"theirs.dataset"))[i]["input_ids"]] == v.describe(ds[i]["input_ids"], ds[i]["species"]).ensembl_id.tolist()
    for name, d in (("ours", tmp_path/"ours.dataset"/"token_dictionary.pkl"), ("theirs", theirs)):
        back = import_corpus(tmp_path/f"{name}.dataset", d, v, tmp_path/f"{name}-back")
        assert back[:] == ds[:] and back.features == ds.features and corpus_vocabulary(back) == v
    picked = export_corpus(ds.shuffle(seed=0).select(range(7)), tmp_path/"some.dataset")
    assert picked[:] == ds.shuffle(seed=0).select(range(7))[:]
    some = export_corpus(ds, tmp_path/"human.dataset", {g: i for i, g in enumerate(v.frame.ensembl_id[v.frame.species.eq("human")].iloc[:5])})
    assert set(some["species"]) == {"human"} and max(some["length"]) <= 5             # cells without a gene there fall out
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".partial")]


def test_species_of_imported_cells(tmp_path):
    v, ids = islet_vocab(), {g: i + 5 for i, g in enumerate(islet_vocab().frame.ensembl_id)}
    human, mouse = ({s: g for s, g in v.frame[v.frame.species.eq(s)][["symbol", "ensembl_id"]].to_numpy()} for s in v.species)
    cells = dict(input_ids=[[ids[human["INS"]], ids[human["GCG"]]], [ids[mouse["Gcg"]]]], organ=["pancreas", "islet"])
    def put(name, **columns):
        datasets.Dataset.from_dict({**cells, **columns}).save_to_disk(tmp_path/name)
        return tmp_path/name
    got = import_corpus(put("both", species=["human", "mouse"]), ids, v, tmp_path/"a")
    assert list(got["species"]) == ["human", "mouse"] and [v.describe(r, s).symbol.tolist() for r, s in zip(got["input_ids"], got["species"])] == [["INS", "GCG"], ["Gcg"]]
    assert import_corpus(put("none"), ids, v, tmp_path/"b")[:]["organ"] == ["pancreas"]              # human, so mouse genes fall out
    latin = put("latin", species=["Homo sapiens", "Homo sapiens"])
    refused(lambda: import_corpus(latin, ids, v, tmp_path/"c"), "0 genes of 'Homo sapiens'", "human, mouse", "pass species=")
    assert list(import_corpus(latin, ids, v, tmp_path/"c", species="human")["species"]) == ["human"]
    refused(lambda: import_corpus(put("more"), {g: i for g, i in ids.items() if i < 8}, v, tmp_path/"d"), "the dictionary ends at 7", "pass the dictionary that it was tokenised with")
    assert not (tmp_path/"d").exists()


def test_export_that_cannot_be(corpus, tmp_path, monkeypatch):
    refused(lambda: export_corpus(corpus, tmp_path/"out", {"gene_1": 5}), "0 of 1 entries of the dictionary", "pass one that lists Ensembl IDs")
    (tmp_path/"full").mkdir(), (tmp_path/"full"/"x").touch()
    refused(lambda: export_corpus(corpus, tmp_path/"full"), "holds 1 files", "pass another out=")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full_replace)
        refused(lambda: export_corpus(corpus, tmp_path/"out"), "No space left on device", "free some space")
    assert files_under(tmp_path) == ["full/x"] and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "Files of 4 and of 16 blocks of cells"
    folder, x = tmp_path_factory.mktemp("many"), toy(n=1024)
    for n in (4, 16): ad.AnnData(sp.vstack([x.X] * n, format="csr"), pd.DataFrame(index=[str(i) for i in range(n * 1024)]), x.var).write_h5ad(folder/f"{n}.h5ad", compression="gzip")
    return folder


def test_threads_do_not_change_a_byte(paths, many, vocab, tmp_path):
    for n in (1, 2, 5): tokenize([*paths, many/"4.h5ad"], vocab, tmp_path/str(n), keep=[], threads=n, progress=False)
    assert content(tmp_path/"1") == content(tmp_path/"2") == content(tmp_path/"5") and files_under(tmp_path/"1") == files_under(tmp_path/"5")
    assert rows(encode_cells(many/"4.h5ad", vocab, threads=3)) == rows(encode_cells(many/"4.h5ad", vocab, threads=1))


def test_memory_is_flat_in_cells(many, vocab, monkeypatch):
    "However many blocks a file has, a few of them are there at a time"
    opened = {name: as_counts(many/name) for name in ("4.h5ad", "16.h5ad")}
    def blocks(name, use=lambda b: None):
        counts = opened[name]
        for b in encoding.CellEncoder(counts, vocab, 2048).blocks(threads=2): use(b)
    real, lock, held, most, peak = encoding.CellEncoder.block, threading.Lock(), [0], [0], {}
    def count(n):
        with lock: held[0] += n; most[0] = max(most[0], held[0])
    with monkeypatch.context() as m:
        m.setattr(encoding.CellEncoder, "block", lambda *a: (count(1), real(*a))[1])
        blocks("16.h5ad", lambda b: count(-1))
    assert held[0] == 0 and most[0] <= 3
    for name in opened:
        tracemalloc.start()
        blocks(name)
        peak[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak["16.h5ad"] < 1.5 * peak["4.h5ad"]


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
    before = where.startswith("before")
    place, name, calls = (tokenizer, "_write_shard", []) if before else (encoding.CellEncoder, "block", [])
    real = getattr(place, name)

    def dies(*a, **k):
        calls.append(1)
        if len(calls) == 2: raise Killed
        return real(*a, **k)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(place, name, dies)
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
        m.setattr(pa, "OSFile", full_file) if how == "write" else m.setattr(os, "replace", full_replace)
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
