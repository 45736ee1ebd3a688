"Tokens, orthologs, files of vocabularies."

import os
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import DATA, ISLET, files_under, fish, fish_cells, fish_ids, genes_of, islet_vocab, partners, refused, toy
from conftest import FISHES as N
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranked import GENES, MEDIANS, cells, full_replace, vocabulary

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.names import map_genes
from mix_geneformer.cells.vocabulary import Vocabulary, vocabulary_from_medians
from mix_geneformer.files import InputError

def test_full_disk_while_saving_a_vocabulary(vocab, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full_replace)
        refused(lambda: vocab.save(tmp_path), "No space left on device")
    assert files_under(tmp_path) == []


def test_tokens_of_orthologs():
    f = {o: islet_vocab(o).frame.set_index("symbol").token for o in ("separate", "shared", "tied")}
    assert sorted(f["separate"]) == list(range(2, 14))  # each species' gene has its own
    for h, m in zip(ISLET["human"][1:], ISLET["mouse"][1:]):
        assert f["shared"][h] == f["shared"][m] != f["separate"][m]
    assert f["shared"]["INS"] != f["shared"]["Ins2"] and (f["tied"] == f["shared"]).all()
    assert [len(islet_vocab(o)) for o in ("separate", "shared", "tied")] == [14, 9, 9]
    assert islet_vocab("tied").species_index("human") == 0 and islet_vocab("tied").species_index(
        np.array(["mouse", "human"])
    ).tolist() == [1, 0]
    assert len({islet_vocab(o).hash for o in ("separate", "shared", "tied")}) == 3
    a, b = partners(40)
    big = vocabulary_from_medians(dict(human=pd.Series(1.0, a), mouse=pd.Series(1.0, b)), "shared")
    assert (big.lookup(a, "human") == big.lookup(b, "mouse")).all() and len(big) == 42


@settings(max_examples=30)
@given(MEDIANS, st.sampled_from(["separate", "shared", "tied"]))
def test_vocabulary_round_trip(tmp_path, medians, orthologs):
    v = vocabulary_from_medians(
        dict(
            human=pd.Series(medians, GENES),
            mouse=pd.Series(medians[::-1], gene_table("human").ortholog[GENES].to_numpy()),
        ),
        orthologs,
    )
    v.save(tmp_path)
    back = Vocabulary.load(tmp_path)
    pd.testing.assert_frame_equal(back.frame, v.frame, check_exact=True)  # medians to the last bit
    assert (
        back == v
        and back.hash == v.hash
        and back.orthologs == orthologs
        and len(back) == len(v)
        and back.species == v.species
    )
    assert back.lookup(GENES, "human").tolist() == v.lookup(GENES, "human").tolist()


@settings(max_examples=25)
@given(MEDIANS, st.integers(0, len(GENES) - 1))
def test_hash_sees_every_median(medians, i):
    changed = list(medians)
    changed[i] = np.nextafter(medians[i], 99)
    assert vocabulary(changed) != vocabulary(medians) and vocabulary(medians) == vocabulary(list(medians))


def test_order_of_sources_does_not_change_the_vocabulary():
    h1, h2, m = toy("human"), toy("human", seed=5), toy("mouse")
    assert (
        Vocabulary.build([h1, m, h2])
        == Vocabulary.build([m, h2, h1])
        == Vocabulary.build([ad.concat([h1, h2], index_unique="-"), m])
    )


def test_from_geneformer(tmp_path):
    ids = dict(zip(map_genes(ISLET["human"]).ensembl_ids, (9, 4, 7, 2, 3, 11)))
    tokens, medians = {"<pad>": 0, "<mask>": 1, **ids}, {g: np.float64(i + 1) for i, g in enumerate(ids)}
    for name, d in ("t", tokens), ("m", medians):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(d, protocol=4))
    v = Vocabulary.from_geneformer(tmp_path / "t.pkl", tmp_path / "m.pkl")
    assert v == Vocabulary.from_geneformer(tokens, medians) and len(v) == 12
    assert v.lookup(["INS", "PDX1"]).tolist() == [9, 11] and encode_cells(
        cells([[1, 2, 3, 4, 5, 60]], ISLET["human"]), v
    )[0].tolist() == [11, 2, 3, 4, 7, 9]
    refused(lambda: Vocabulary.from_geneformer({**tokens, "<cls>": 12}, medians), "3 special tokens")
    refused(lambda: Vocabulary.from_geneformer(tokens, dict(list(medians.items())[:4])), "2 of 6 genes have no median")
    more = Vocabulary.from_geneformer({**tokens, "gene_1": 12, "ENSGR0000002586": 13}, medians)
    assert len(more) == 14 and more.lookup(["gene_1", "ENSGR0000002586"]).tolist() == [12, 13]
    assert more.species == ("human",) and Vocabulary.load(more.save(tmp_path)) == more
    refused(lambda: Vocabulary.from_geneformer({"<pad>": 0, "<mask>": 1, "gene_1": 2}, {}), "1 of 1 entries", "gene_1")


FAMILY = DATA.parent / "family"


@pytest.mark.skipif(not FAMILY.is_dir(), reason="the family's dictionaries are not on this machine")
def test_the_published_dictionary_is_as_long_as_its_embedding():
    v = Vocabulary.from_geneformer(*(FAMILY / f"geneformer_v1_{n}_dictionary.pkl" for n in ("token", "gene_median")))
    assert len(v) == 25_426 == len(v.frame) + 2 and v.frame.ensembl_id.is_unique
    of_y = v.frame[v.frame.ensembl_id.str.startswith("ENSGR")]
    assert len(of_y) == 19 and of_y.symbol.eq(of_y.ensembl_id).all()  # by the name that they have


@pytest.mark.parametrize("how", ["{}", " {} ", "{}.7", "{}_PAR_Y"])
def test_genes_of_a_list_are_read_as_those_of_a_file(how):
    v = islet_vocab()
    for s, symbols in ISLET.items():
        ids = map_genes(symbols, s).ensembl_ids
        names = [how.format(g) for g in ids]
        assert v.lookup(names, s).tolist() == v.lookup(symbols, s).tolist() == v.lookup(names).tolist()
        with pytest.warns(UserWarning, match=f"match {s} only if capitals are ignored"):
            assert v.lookup([g.lower() for g in symbols], s).tolist() == v.lookup(symbols, s).tolist()
    refused(lambda: v.lookup(["INS", "ENSG00000000003"]), "1 of 2 genes are not in the vocabulary (ENSG00000000003)")


@given(st.binary(max_size=60), st.integers(0, 10**6), st.sampled_from(b'{}[],:"019a \xff'))
@example(b"[]", 0, 0x7B)
@example(b"{}", 1, 0x7D)
@example(b"3", 2, 0x30)
@example(
    b'{"token":[2],"ensembl_id":[],"symbol":[],"species":[],"median":[],"ortholog":[],'
    b'"orthologs":"separate","specials":["<pad>","<mask>"]}',
    2,
    0x30,
)
@example(b"\xff\xfe", 2, 0x30)
def test_damaged_vocabularies_are_refused(tmp_path, junk, at, byte):
    good = islet_vocab()._json().encode()
    at %= len(good)
    for data in (junk, good[:at] + bytes([byte]) + good[at + 1 :], good[:at]):
        (tmp_path / "vocabulary.json").write_bytes(data)
        try:
            Vocabulary.load(tmp_path)
        except InputError as e:
            assert "\n" not in str(e)


def test_a_changed_vocabulary_is_noticed(tmp_path):
    v = islet_vocab()
    (tmp_path / "vocabulary.json").write_text(v._json().replace("10.0", "11.0"))
    assert Vocabulary.load(tmp_path) != v


def test_orthologs_of_real_vocabularies(read):
    shared, tied = (Vocabulary.build(list(read.values()), o) for o in ("shared", "tied"))
    f = shared.frame
    n = f.token.duplicated().sum()
    # a pair, never three
    assert n > 11_000 and len(shared) == len(tied) == 31_146 - n and f.token.value_counts().max() == 2
    pair = f[f.token.isin(shared.lookup(["GCG", "PDX1", "ARX"], "human"))]
    assert sorted(pair.symbol) == ["ARX", "Arx", "GCG", "Gcg", "PDX1", "Pdx1"]


def test_medians_of_a_file_and_of_what_was_read_from_it_agree(read, pancreas_vocab):
    assert Vocabulary.build(list(read.values())) == pancreas_vocab


def test_three_species_share_tokens_where_the_table_says_so(fish_table):
    fish(fish_table)
    human, mouse, zebrafish = toy("human", genes=N), toy("mouse", genes=N, seed=1), fish_cells()
    vocab = Vocabulary.build([human, mouse, zebrafish], orthologs="shared")
    assert vocab.species == ("human", "mouse", "zebrafish")
    token = lambda s, ids: vocab.columns(ids, s)[0]
    shared = token("human", genes_of("human", N - 3))
    assert (shared >= 2).all() and np.array_equal(shared, token("zebrafish", fish_ids(N - 3)))
    assert np.array_equal(shared, token("mouse", gene_table("human").loc[genes_of("human", N - 3)].ortholog))
    alone = token("zebrafish", fish_ids()[-3:])
    assert (alone >= 2).all() and not set(alone) & set(vocab.frame.token[~vocab.frame.species.eq("zebrafish")])
    apart = Vocabulary.build([human, mouse, zebrafish])
    assert len(apart) == 2 + len(apart.frame) == apart.frame.token.nunique() + 2
