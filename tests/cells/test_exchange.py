"Corpora of others, and ours for them."

import os
import pickle
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import files_under, genes_of, islet_vocab, refused
from family import FAMILY, config_of, net_of
from ranked import full_replace

from mix_geneformer.cells.exchange import export_corpus, import_corpus
from mix_geneformer.cells.storage import corpus_vocabulary
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.families import family_of
from mix_geneformer.encoder.model import with_marks

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


# --- corpora of the family ------------------------------------------------------------------------------------------

SECOND = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}


def family_vocab(specials, genes, **more):
    tokens = {**specials, **{g: len(specials) + i for i, g in enumerate(genes)}}
    return Vocabulary.from_geneformer(tokens, dict.fromkeys(genes, 1.0), **more), tokens


def test_marks_are_taken_off_and_put_on(tmp_path):
    "From the first series to the second and back; a long sentence keeps both ends"
    genes = list(genes_of("human", 8))
    (v1, t1), (v2, t2) = family_vocab({"<pad>": 0, "<mask>": 1}, genes), family_vocab(SECOND, genes[::-1])
    cells = [[t1[g] for g in genes], [t1[genes[3]]]]
    datasets.Dataset.from_dict(dict(input_ids=cells)).save_to_disk(tmp_path / "one")
    two = import_corpus(tmp_path / "one", t1, v2, tmp_path / "two", context=6)
    assert two["input_ids"][:] == [[2, *(t2[g] for g in genes[:4]), 3], [2, t2[genes[3]], 3]]
    assert two["length"][:] == [6, 3]
    back = import_corpus(tmp_path / "two", t2, v1, tmp_path / "back")
    assert back["input_ids"][:] == [cells[0][:4], cells[1]]
    plain = export_corpus(two, tmp_path / "plain", t1)
    assert plain["input_ids"][:] == [cells[0][:4], cells[1]]
    own = export_corpus(two, tmp_path / "own")
    assert own["input_ids"][:] == two["input_ids"][:]


def test_ids_that_became_one_are_read_once(tmp_path):
    genes = list(genes_of("human", 4))
    _, t1 = family_vocab({"<pad>": 0, "<mask>": 1}, genes)
    v2, t2 = family_vocab(SECOND, genes[:3], mapping={genes[3]: genes[0]})
    datasets.Dataset.from_dict(dict(input_ids=[[t1[g] for g in (genes[3], genes[1], genes[0])]])).save_to_disk(
        tmp_path / "one")
    two = import_corpus(tmp_path / "one", t1, v2, tmp_path / "two")
    assert two["input_ids"][0] == [2, t2[genes[0]], t2[genes[1]], 3]


@pytest.mark.parametrize("how", ["dataset", "parquet", "folder"])
def test_labels_come_along_whatever_they_are(tmp_path, how):
    genes = list(genes_of("human", 4))
    v, tokens = family_vocab({"<pad>": 0, "<mask>": 1}, genes)
    columns = dict(input_ids=[[2, 3], [4]], cell_type=["a", None], batch=[7, 8], healthy=[True, False],
                   n_counts=[1.5, 2.5])
    kind = pd.Categorical(["x", "y"])
    if how == "dataset":
        source = datasets.Dataset.from_dict({**columns, "kind": [0, 1]})
        source = source.cast_column("kind", datasets.ClassLabel(names=["x", "y"]))
        source.save_to_disk(tmp_path / "theirs")
    else:
        frame = pd.DataFrame({**columns, "kind": kind})
        (tmp_path / "theirs").mkdir()
        for i in range(2): frame.iloc[i:i + 1].to_parquet(tmp_path / "theirs" / f"{i}.parquet")
        frame.to_parquet(tmp_path / "theirs.parquet")
    path = tmp_path / ("theirs.parquet" if how == "parquet" else "theirs")
    with pytest.warns(UserWarning, match="1 of 5 columns are no labels and are left out: n_counts"):
        got = import_corpus(path, tokens, v, tmp_path / "ours")
    assert got.to_pandas().drop(columns=["input_ids", "length"]).to_dict("list") == dict(
        species=["human"] * 2, cell_type=["a", None], batch=["7", "8"], healthy=["true", "false"], kind=["x", "y"])


def test_what_is_no_corpus_is_refused(tmp_path):
    v, tokens = family_vocab({"<pad>": 0, "<mask>": 1}, list(genes_of("human", 4)))
    datasets.DatasetDict(train=datasets.Dataset.from_dict(dict(input_ids=[[2]]))).save_to_disk(tmp_path / "parts")
    datasets.Dataset.from_dict(dict(a=[1])).save_to_disk(tmp_path / "other")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for name, says in (("parts", "holds 1 parts (train)"), ("other", "0 columns input_ids"),
                       ("cut.parquet", "0 data sets that can be read"), ("gone", "0 data sets that can be read")):
        refused(lambda: import_corpus(tmp_path / name, tokens, v, tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not FAMILY.is_dir(), reason=f"{FAMILY} is not here")
def test_real_cells_of_genecorpus(tmp_path):
    "500 cells as Geneformer tokenised them: the same tokens here, and vectors as plain transformers gives them"
    import torch

    from mix_geneformer.cells.sentences import sentences_of
    from mix_geneformer.encoder.checkpoints import load_model
    from mix_geneformer.encoder.states import Reader
    cells = FAMILY / "genecorpus30m_500_cells.parquet"
    net = net_of(config_of("Geneformer-V1-10M"), num_hidden_layers=2)
    net.save_pretrained(tmp_path / "V1")
    for name in ("token", "gene_median"):
        real = FAMILY / f"geneformer_v1_{name}_dictionary.pkl"
        (tmp_path / f"{name}_dictionary.pkl").write_bytes(real.read_bytes())
    loaded = load_model(tmp_path / "V1", "cpu")
    assert len(loaded.vocab) == 25_426 and loaded.vocab.frame.ensembl_id.str.startswith("ENSGR").sum() == 19
    corpus = import_corpus(cells, tmp_path / "token_dictionary.pkl", loaded.vocab, tmp_path / "corpus")
    theirs = pd.read_parquet(cells)
    assert [list(a) for a in corpus["input_ids"]] == [a.tolist() for a in theirs.input_ids]
    short = np.argsort(theirs.length.to_numpy(), kind="stable")[:3]
    some = sentences_of(corpus.select(short))
    for packed_alone in (some, some.take([0])):
        got = Reader(loaded).vectors(packed_alone)
        for i, vector in enumerate(got):
            ids = torch.from_numpy(theirs.input_ids[short[i]].astype(int))[None]
            with torch.no_grad(): h = net.bert(ids, output_hidden_states=True).hidden_states[1][0]
            np.testing.assert_allclose(vector, h.mean(0), atol=1e-5)
    genes = loaded.vocab.frame.ensembl_id[~loaded.vocab.frame.ensembl_id.str.startswith("ENSGR")]
    second, _ = family_vocab(SECOND, list(genes[:20_271]))
    two = import_corpus(cells, tmp_path / "token_dictionary.pkl", second, tmp_path / "two", context=4096)
    kept = second.columns(loaded.vocab.describe(corpus[0]["input_ids"]).ensembl_id, "human")[0]
    assert list(two[0]["input_ids"]) == [2, *kept[kept >= 0], 3]
    wide = net_of(config_of("Geneformer-V2-104M"), num_hidden_layers=2)
    loaded = SimpleNamespace(model=wide, vocab=second, context=4096, family=family_of(second))
    with_marks(wide.config, second)
    some = sentences_of(two.select(short))
    for pool in ("cls", "mean"):
        got = Reader(loaded, pool=pool).vectors(some)
        for i, vector in enumerate(got):
            ids = torch.from_numpy(some[i].astype(int))[None]
            with torch.no_grad(): h = wide.bert(ids, output_hidden_states=True).hidden_states[1][0]
            np.testing.assert_allclose(vector, h[0] if pool == "cls" else h[1:-1].mean(0), atol=1e-5)
