"Each family opens in one call, with its own tokens and as its authors read it."
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import genes_of, refused, toy
from family import FAMILY, KINDS, config_of, folder_of, net_of

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.embedding import embed
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.encoder.classifier import classifier_from
from mix_geneformer.encoder.families import FAMILIES, family_of
from mix_geneformer.encoder.states import Reader
from mix_geneformer.perturbation.verb import perturb

QUIET = dict(device="cpu", progress=False)
NAMES = dict(V1="Geneformer V1", V2="Geneformer V2", Mouse="Mouse-Geneformer", Mix="Mix-Geneformer")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "A tiny model of each family"
    return {kind: load_model(folder_of(kind, tmp_path_factory.mktemp(kind)/"model"), "cpu") for kind in KINDS}


def by_hand(loaded, ids, layer, pool):
    "A cell's vector by plain transformers, without our encoder"
    with torch.no_grad():
        states = loaded.model.bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
    if pool == "cls": return states[0]
    return states[[i for i, t in enumerate(ids) if t not in (2, 3) or not loaded.vocab.marks[0]]].mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_opens_and_is_read_as_its_authors_do(opened, kind):
    loaded = opened[kind]
    family = loaded.family
    assert family.name == NAMES[kind] and loaded.context == family.context == KINDS[kind][2]
    assert len(loaded.vocab) == loaded.model.config.vocab_size
    assert loaded.vocab.lookup("ENSGR0000002586")[0] == len(loaded.vocab)-1 # a token of no known gene has its name
    for species in family.species:
        cells = toy(species, n=4)
        got = embed(cells.copy(), loaded, progress=False)
        note = got.uns["mix_geneformer"]
        assert (note["family"], note["emb_layer"]) == (family.name, 2)
        sentences = encode_cells(cells, loaded.vocab, loaded.context)
        for i, vector in enumerate(got.obsm["X_mix_geneformer"]):
            ids = sentences[i].tolist()
            assert ((ids[0], ids[-1]) == (2, 3)) == family.marks
            np.testing.assert_allclose(vector, by_hand(loaded, ids, 2, family.pool), atol=1e-5)
        last = embed(cells.copy(), loaded, pool="mean", emb_layer=3, progress=False).obsm["X_mix_geneformer"]
        np.testing.assert_allclose(last[0], by_hand(loaded, sentences[0].tolist(), 3, "mean"), atol=1e-5)


def test_every_row_of_the_table_fits_one_dictionary(opened):
    assert [family_of(loaded.vocab) for loaded in opened.values()] == [*FAMILIES]


@pytest.mark.parametrize("beside", ["", ".", "geneformer", "geneformer/gene_dictionaries_30m"])
def test_where_dictionaries_lie(tmp_path, beside):
    (tmp_path/"geneformer").mkdir()
    folder = folder_of("V1", tmp_path/"model", beside=beside)
    assert load_model(folder, "cpu").family.name == "Geneformer V1"


def test_a_pickle_is_made_into_safetensors_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MIX_GENEFORMER_CACHE", str(tmp_path/"cache"))
    plain, pickled = folder_of("V1", tmp_path/"a"/"m"), folder_of("V1", tmp_path/"b"/"m", weights="pytorch_model.bin")
    a, b = load_model(plain, "cpu"), load_model(pickled, "cpu")
    for name, w in a.model.state_dict().items(): assert torch.equal(w, b.model.state_dict()[name]), name
    assert b.model.cls.predictions.decoder.weight is b.model.bert.embeddings.word_embeddings.weight
    made, = (tmp_path/"cache"/"weights").glob("*/model.safetensors")
    before = made.stat().st_mtime_ns
    load_model(pickled, "cpu")
    assert made.stat().st_mtime_ns == before and not (pickled/"model.safetensors").exists()


def test_a_pickle_that_runs_something_is_refused(tmp_path, monkeypatch):
    from handmade import Runs
    monkeypatch.setenv("MIX_GENEFORMER_CACHE", str(tmp_path/"cache"))
    folder = folder_of("V1", tmp_path/"m", weights="pytorch_model.bin")
    torch.save({"bert.embeddings.word_embeddings.weight": Runs(tmp_path/"ran")}, folder/"pytorch_model.bin")
    refused(lambda: load_model(folder, "cpu"), "holds more than weights, which is not run", "model.safetensors")
    (folder/"pytorch_model.bin").write_bytes((folder/"pytorch_model.bin").read_bytes()[:100])
    refused(lambda: load_model(folder, "cpu"), "cut off")
    assert not (tmp_path/"ran").exists() and not list((tmp_path/"cache").rglob("*.safetensors"))


def test_what_is_missing_is_said_with_where_to_get_it(tmp_path):
    folder = folder_of("V2", tmp_path/"m", beside="")
    (folder/"gene_median_dictionary_V2.pkl").rename(tmp_path/"away")
    refused(lambda: load_model(folder, "cpu"), "0 median dictionaries", "gene_median_dictionary*.pkl")
    (folder/"token_dictionary_V2.pkl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(lambda: load_model(folder, "cpu"), "pointer of Git LFS", "git lfs pull")
    (folder/"token_dictionary_V2.pkl").unlink()
    refused(lambda: load_model(folder, "cpu"), "0 token dictionaries of 45 tokens", "MPRG/Mouse-Genecorpus-20M",
            "vocab=")
    (folder/"model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    vocab = load_model(folder_of("V2", tmp_path/"whole"/"m"), "cpu").vocab
    refused(lambda: load_model(folder, "cpu", vocab), "model.safetensors is a pointer of Git LFS")


def test_an_old_id_is_read_as_its_gene(opened):
    loaded, ids = opened["V2"], genes_of("human", 40)
    assert loaded.vocab.lookup("ENSG00000999999") == loaded.vocab.lookup(ids[0])
    cells = toy()
    old = cells[:, 1:].copy()
    renamed = cells.copy()
    renamed.var_names = ["ENSG00000999999", *cells.var_names[1:]]
    renamed.var = renamed.var.iloc[:, :0]
    a, b = (encode_cells(c, loaded.vocab, 64) for c in (cells, renamed))
    assert [a[i].tolist() for i in range(24)] == [b[i].tolist() for i in range(24)]
    assert encode_cells(old, loaded.vocab, 64).lengths.sum() < a.lengths.sum()


def test_a_fine_tuned_head_is_told(tmp_path):
    from transformers import BertForSequenceClassification
    folder = folder_of("V1", tmp_path/"m")
    theirs = BertForSequenceClassification.from_pretrained(folder)
    theirs.save_pretrained(folder)
    with pytest.warns(UserWarning, match="fine-tuned to something else, and its encoder alone is read"):
        loaded = load_model(folder, "cpu")
    for name, w in theirs.bert.encoder.state_dict().items():
        assert torch.equal(w, loaded.model.bert.encoder.state_dict()[name])


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_perturbing_is_one_call(opened, mode):
    found = perturb(toy("human"), opened["V2"], mode, state="cell_type", start="a", goal="b", min_cells=1, n_boot=10,
                    progress=False)
    assert len(found) > 30 and found.cosine_shift.notna().all()
    assert not set(found.symbol) & {"<cls>", "<eos>", "<pad>", "<mask>"}


def test_a_classifier_leaves_marks_out_too(opened):
    loaded = opened["V2"]
    sentences = encode_cells(toy("human", n=3), loaded.vocab, loaded.context)
    classifier = classifier_from(loaded.model, ["a", "b"]).eval()
    batch = Reader(loaded).batch(sentences, [0, 1, 2])
    with torch.no_grad(): found = classifier.vectors(batch)
    for i in range(3):
        np.testing.assert_allclose(found[i], by_hand(loaded, sentences[i].tolist(), 3, "mean"), atol=1e-5)


@pytest.mark.skipif(not FAMILY.is_dir(), reason=f"{FAMILY} is not here")
@pytest.mark.parametrize("name,layers", [("Geneformer-V1-10M", 6), ("Geneformer-V2-104M", 2),
                                         ("Geneformer-V2-316M", 2)])
def test_the_real_configs(tmp_path, name, layers):
    "The published models' shapes, with fewer tokens and the large ones with fewer layers: padding-free as plain"
    config = config_of(name)
    specials = ["<pad>", "<mask>", "<cls>", "<eos>"][:4 if "V2" in name else 2]
    tokens = {t: i for i, t in enumerate([*specials, *genes_of("human", 300)])}
    net = net_of(config, len(tokens), **{k: config[k] for k in ("hidden_size", "num_attention_heads",
                                                                "intermediate_size")}, num_hidden_layers=layers,
                 initializer_range=.02)
    for p in net.parameters(): p.data.mul_(.1) if p.dim() == 2 else None
    net.save_pretrained(tmp_path/name)
    (tmp_path/name/"token_dictionary.json").write_text(json.dumps(tokens))
    (tmp_path/name/"gene_median_dictionary.json").write_text(json.dumps(dict.fromkeys(genes_of("human", 300), 1.)))
    loaded = load_model(tmp_path/name, "cpu")
    cells = toy("human", n=3, genes=300)
    cells.X = cells.X.multiply(np.random.default_rng(0).random((3, 300)) < [[.9], [.5], [.1]]).tocsr()
    sentences = encode_cells(cells, loaded.vocab, loaded.context)
    for pool in ("mean", "cls")[:1+("V2" in name)]:
        got = Reader(loaded, emb_layer=layers-1, pool=pool).vectors(sentences)
        for i in range(3):
            np.testing.assert_allclose(got[i], by_hand(loaded, sentences[i].tolist(), layers-1, pool), atol=1e-5)
    shutil.rmtree(tmp_path/name)
