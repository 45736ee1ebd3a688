"Sentences in memory and on disk are the same."

import pickle

import datasets
import numpy as np

from mix_geneformer.cells.sentences import MappedSentences, sentences_of
from mix_geneformer.cells.storage import load_corpus

rows = lambda sentences: [sentences[i].tolist() for i in range(len(sentences))]


def test_in_memory_and_on_disk_sentences_agree(corpus):
    ds = load_corpus(corpus)
    memory, disk = sentences_of(ds), sentences_of(ds, in_memory_below=0)
    assert (
        rows(memory) == rows(disk)
        and memory.lengths.tolist() == disk.lengths.tolist()
        and memory.species.tolist() == disk.species.tolist()
    )
    picked = ds.select([40, 2, 2])
    assert (
        rows(sentences_of(picked))
        == rows(sentences_of(picked, in_memory_below=0))
        == [rows(memory)[i] for i in (40, 2, 2)]
    )


def test_many_sentences_at_once(corpus):
    "In memory and on disk, from whole, shuffled, filtered, sliced, concatenated and twice selected data sets"
    ds = load_corpus(corpus)
    cut, rng = ds.select(range(5, 31)), np.random.default_rng(0)
    for d in (
        ds,
        ds.shuffle(seed=1),
        ds.filter(lambda s: s == "mouse", input_columns="species"),
        cut,
        cut.select([3, 3, 0]),
        datasets.concatenate_datasets([ds.select(range(40, 48)), cut]),
        ds.sort("length"),
    ):
        plain, names = list(d["input_ids"]), list(d["species"])
        for s in (sentences_of(d), sentences_of(d, in_memory_below=0), pickle.loads(pickle.dumps(MappedSentences(d)))):
            assert (
                rows(s) == plain
                and s.species.tolist() == names
                and s.lengths.tolist() == [len(r) for r in plain]
                and s[0].dtype == np.uint16
            )
            idx = rng.integers(0, len(d), 9)
            for context in (None, 1, 5, 99):
                values, n = s.flat(idx, context)
                assert (
                    values.dtype == np.uint16
                    and n.dtype == np.int64
                    and np.split(values, np.cumsum(n)[:-1])[4].tolist() == plain[idx[4]][:context]
                )
                assert values.tolist() == sum((plain[i][:context] for i in idx), []) and n.tolist() == [
                    len(plain[i][:context]) for i in idx
                ]
            assert rows(s.take(idx)) == [plain[i] for i in idx] and s.take(idx).species.tolist() == s.species[
                idx
            ].tolist() == [names[i] for i in idx]
            mask = rng.random(len(d)) < 0.5
            assert rows(s.take(mask)) == [plain[i] for i in np.flatnonzero(mask)] and type(s.take(mask)) is type(s)
            assert len(s.flat([])[0]) == 0 and len(s.flat([])[1]) == 0


def test_sentences_on_disk_are_views_of_the_file(corpus):
    "No token is copied to open them, to look at one cell, or to send them to another process"
    s = MappedSentences(load_corpus(corpus))
    assert (
        not any(v.flags.owndata or v.flags.writeable for v, _ in s._chunks)
        and not s[3].flags.owndata
        and len(pickle.dumps(s)) < len(pickle.dumps(s.flat(range(48)))) + 20_000
    )
    assert s.species.codes.dtype == np.int8  # a byte per cell
