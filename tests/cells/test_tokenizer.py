"Corpora on disk: whole, resumed, refused."

import concurrent.futures
import multiprocessing
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import files_under, refused, toy
from hypothesis import given, settings
from ranked import COUNTS, MEDIANS, cells, content, full_replace, rows, vocabulary

from mix_geneformer.cells import encoding, tokenizer
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary

@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_one_process_equals_an_executor(paths, vocab, tmp_path, executor):
    plain = tokenize(paths, vocab, tmp_path / "plain", progress=False)
    make = (
        concurrent.futures.ThreadPoolExecutor
        if executor == "threads"
        else lambda n: concurrent.futures.ProcessPoolExecutor(n, multiprocessing.get_context("spawn"))
    )
    with make(2 if executor == "threads" else 1) as client:
        mapped = tokenize(paths, vocab, tmp_path / "mapped", client=client, progress=False)
    assert content(tmp_path / "plain") == content(tmp_path / "mapped") and len(content(tmp_path / "plain")) == 2
    assert plain.to_pandas().equals(mapped.to_pandas()) and files_under(tmp_path / "plain") == files_under(
        tmp_path / "mapped"
    )


def test_the_same_again_is_reused_and_other_inputs_are_refused(paths, vocab, tmp_path):
    tokenize(paths, vocab, tmp_path / "corpus", progress=False)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").iterdir()}
    tokenize(paths, vocab, tmp_path / "corpus", progress=False)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").iterdir()} == before
    for other in (
        dict(sources=paths[:1]),
        dict(context=9),
        dict(keep=["donor"]),
        dict(vocab=Vocabulary.build(paths, "shared")),
    ):
        refused(
            lambda: tokenize(**{**dict(sources=paths, vocab=vocab, out=tmp_path / "corpus", progress=False), **other}),
            "made from other inputs",
        )
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").iterdir()} == before


class Killed(BaseException):
    "As a kill: nothing catches it"


@pytest.mark.parametrize("where", ["before the second shard", "inside the second shard"])
def test_a_killed_tokenisation_goes_on(paths, vocab, tmp_path, monkeypatch, where):
    before = where.startswith("before")
    place, name, calls = (tokenizer, "_write_shard", []) if before else (encoding.CellEncoder, "block", [])
    real = getattr(place, name)

    def dies(*a, **k):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*a, **k)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(place, name, dies)
        tokenize(paths, vocab, tmp_path / "corpus", progress=False)
    first = tmp_path / "corpus" / "data-00000-of-00002.arrow"
    stamp = first.stat().st_ino, first.stat().st_mtime_ns
    assert (
        not (tmp_path / "corpus" / "corpus.json").exists()
        and not (tmp_path / "corpus" / ("data-00001-of-00002.arrow")).exists()
    )
    refused(lambda: load_corpus(tmp_path / "corpus"))
    refused(
        lambda: tokenize(paths[:1], vocab, tmp_path / "corpus", progress=False), "files of something else"
    )  # another run does not take over
    tokenize(paths, vocab, tmp_path / "corpus", progress=False)
    # the finished shard was not made again
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == stamp
    tokenize(paths, vocab, tmp_path / "whole", progress=False)
    assert content(tmp_path / "corpus") == content(tmp_path / "whole") and files_under(
        tmp_path / "corpus"
    ) == files_under(tmp_path / "whole")


def test_a_file_that_changed_is_tokenised_again(paths, vocab, tmp_path):
    tokenize(paths, vocab, tmp_path / "corpus", progress=False)
    toy("human", seed=9).write_h5ad(paths[0])
    refused(lambda: tokenize(paths, vocab, tmp_path / "corpus", progress=False), "made from other inputs")


def full_file(path, mode, **kw):
    "Opens, but every byte meets a full disk"
    open(path, "wb").close()
    return REAL_FILE("/dev/full", mode, **kw)


REAL_FILE = pa.OSFile


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


@pytest.mark.parametrize("how", [pytest.param("write", marks=needs_full), "rename"])
def test_full_disk_while_tokenising(paths, vocab, tmp_path, monkeypatch, how):
    with monkeypatch.context() as m:
        m.setattr(pa, "OSFile", full_file) if how == "write" else m.setattr(os, "replace", full_replace)
        refused(
            lambda: tokenize(paths, vocab, tmp_path / "corpus", progress=False),
            "No space left on device",
            "free some space",
        )
    assert not [f for f in files_under(tmp_path) if f.endswith(".partial")] and "corpus/corpus.json" not in files_under(
        tmp_path
    )
    refused(lambda: load_corpus(tmp_path / "corpus"))
    # and there is space again
    assert len(tokenize(paths, vocab, tmp_path / "corpus", progress=False)) == 48
    assert not [f for f in files_under(tmp_path) if f.endswith(".partial")]


@settings(max_examples=10)
@given(COUNTS, MEDIANS)
def test_corpus_holds_the_sentences(x, medians):
    v = vocabulary(medians)
    assert rows(sentences_of(tokenize(cells(x), v, progress=False, keep=[]))) == rows(encode_cells(cells(x), v))


def test_the_corpus_on_disk(pancreas, pancreas_vocab, sentences, tmp_path):
    ds = tokenize(pancreas, pancreas_vocab, tmp_path / "corpus", context=256, progress=False)
    assert len(ds) == 4028 and set(ds.column_names) == {
        "input_ids",
        "length",
        "species",
        "cell_ontology_class",
        "donor",
        "organ",
    }
    back = sentences_of(ds)
    assert (np.asarray(back.species) == np.repeat(["human", "mouse"], [2142, 1886])).all()
    for i in (0, 2141, 2142, 4027):
        s, k = ("human", i) if i < 2142 else ("mouse", i - 2142)
        assert (back[i] == sentences[s][k][:256]).all()


@pytest.mark.parametrize("through", ["memory", "h5ad"])
def test_gaps_are_null_in_a_corpus_whatever_they_were(tmp_path, vocab, through):
    a, nothing = toy(n=8), [None, np.nan, "", "nan", "NA", " ", pd.NA]
    a.obs["donor"] = pd.Series(["d1", *nothing], a.obs.index, dtype=object)
    a.obs["kind"] = pd.Categorical(["x", None, "y", "nan", "x", None, "y", "y"])
    a.obs["stage"] = [1, 2, np.nan, 3, np.nan, 5, 6, 7]
    a.obs["empty"] = np.nan
    want = dict(donor=["d1"]+[None]*7, kind=["x", None, "y", None, "x", None, "y", "y"],
                stage=["1", "2", None, "3", None, "5", "6", "7"], empty=[None]*8)
    if through == "h5ad":
        a.obs["donor"] = a.obs.donor.where(a.obs.donor.notna(), None).astype("category")
        a.write_h5ad(tmp_path/"cells.h5ad")
        a = tmp_path/"cells.h5ad"
    tokenize(a, vocab, tmp_path/"corpus", context=8, keep=list(want), progress=False)
    found = load_corpus(tmp_path/"corpus")
    assert {c: found[c][:] for c in want} == want
