"Corpora of others, and ours for them."

import os
import pickle

import datasets
import pytest
from conftest import files_under, islet_vocab, refused
from ranked import full_replace

from mix_geneformer.cells.exchange import export_corpus, import_corpus
from mix_geneformer.cells.storage import corpus_vocabulary
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary

@pytest.mark.parametrize(
    "vocab_of",
    [lambda paths: Vocabulary.build(paths), lambda paths: Vocabulary.build(paths, "shared")],
    ids=["separate", "shared"],
)
def test_export_and_import(paths, tmp_path, vocab_of):
    v = vocab_of(paths)
    ds = tokenize(paths, v, tmp_path / "corpus", progress=False)
    out = export_corpus(tmp_path / "corpus", tmp_path / "ours.dataset")
    plain = datasets.load_from_disk(str(tmp_path / "ours.dataset"))
    assert plain.features["input_ids"].feature.dtype == plain.features["length"].dtype == "int64" and set(
        plain.column_names
    ) == set(ds.column_names)
    assert out[:] == plain[:] == ds[:]  # our own ids
    ids = pickle.loads((tmp_path / "ours.dataset" / "token_dictionary.pkl").read_bytes())
    assert ids["<pad>"] == 0 and all(ids[g] == t for g, t in zip(v.frame.ensembl_id, v.frame.token))
    theirs = {g: 70_000 + 3 * i for i, g in enumerate(v.frame.ensembl_id.sample(frac=1, random_state=0))}
    export_corpus(ds, tmp_path / "theirs.dataset", theirs)
    name = {t: g for g, t in theirs.items()}
    for i in (0, 30):
        assert [
            name[t] for t in datasets.load_from_disk(str(tmp_path / "theirs.dataset"))[i]["input_ids"]
        ] == v.describe(ds[i]["input_ids"], ds[i]["species"]).ensembl_id.tolist()
    for name, d in (("ours", tmp_path / "ours.dataset" / "token_dictionary.pkl"), ("theirs", theirs)):
        back = import_corpus(tmp_path / f"{name}.dataset", d, v, tmp_path / f"{name}-back")
        assert back[:] == ds[:] and back.features == ds.features and corpus_vocabulary(back) == v
    picked = export_corpus(ds.shuffle(seed=0).select(range(7)), tmp_path / "some.dataset")
    assert picked[:] == ds.shuffle(seed=0).select(range(7))[:]
    some = export_corpus(
        ds,
        tmp_path / "human.dataset",
        {g: i for i, g in enumerate(v.frame.ensembl_id[v.frame.species.eq("human")].iloc[:5])},
    )
    # cells without a gene there fall out
    assert set(some["species"]) == {"human"} and max(some["length"]) <= 5
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".partial")]


def test_species_of_imported_cells(tmp_path):
    v, ids = islet_vocab(), {g: i + 5 for i, g in enumerate(islet_vocab().frame.ensembl_id)}
    human, mouse = (
        {s: g for s, g in v.frame[v.frame.species.eq(s)][["symbol", "ensembl_id"]].to_numpy()} for s in v.species
    )
    cells = dict(input_ids=[[ids[human["INS"]], ids[human["GCG"]]], [ids[mouse["Gcg"]]]], organ=["pancreas", "islet"])

    def put(name, **columns):
        datasets.Dataset.from_dict({**cells, **columns}).save_to_disk(tmp_path / name)
        return tmp_path / name

    got = import_corpus(put("both", species=["human", "mouse"]), ids, v, tmp_path / "a")
    assert list(got["species"]) == ["human", "mouse"] and [
        v.describe(r, s).symbol.tolist() for r, s in zip(got["input_ids"], got["species"])
    ] == [["INS", "GCG"], ["Gcg"]]
    # human, so mouse genes fall out
    assert import_corpus(put("none"), ids, v, tmp_path / "b")[:]["organ"] == ["pancreas"]
    latin = put("latin", species=["Homo sapiens", "Homo sapiens"])
    refused(
        lambda: import_corpus(latin, ids, v, tmp_path / "c"),
        "0 genes of 'Homo sapiens'",
        "human, mouse",
        "pass species=",
    )
    assert list(import_corpus(latin, ids, v, tmp_path / "c", species="human")["species"]) == ["human"]
    refused(
        lambda: import_corpus(put("more"), {g: i for g, i in ids.items() if i < 8}, v, tmp_path / "d"),
        "the dictionary ends at 7",
        "pass the dictionary that it was tokenised with",
    )
    assert not (tmp_path / "d").exists()


def test_export_that_cannot_be(corpus, tmp_path, monkeypatch):
    refused(
        lambda: export_corpus(corpus, tmp_path / "out", {"gene_1": 5}),
        "0 of 1 entries of the dictionary",
        "pass one that lists Ensembl IDs",
    )
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "x").touch()
    refused(lambda: export_corpus(corpus, tmp_path / "full"), "holds 1 files", "pass another out=")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full_replace)
        refused(lambda: export_corpus(corpus, tmp_path / "out"), "No space left on device", "free some space")
    assert files_under(tmp_path) == ["full/x"] and len(list(tmp_path.iterdir())) == 1
