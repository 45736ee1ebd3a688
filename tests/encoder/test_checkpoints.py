"A model directory stands alone, is whole or not there, and a damaged one is refused in a sentence."
import errno
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, files_under, genes_of, refused, toy
from handmade import cut
from tinymodel import KINDS, batch_of, close, tiny, two_species, types_of
from transformers import BertConfig, BertForMaskedLM

from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.embedding import embed
from mix_geneformer.encoder import checkpoints
from mix_geneformer.encoder.checkpoints import load_model, save_model
from mix_geneformer.encoder.classifier import CellClassifier, classifier_from
from mix_geneformer.encoder.model import build_model, encode
from mix_geneformer.files import InputError

QUIET = dict(device="cpu", progress=False)


def full_replace(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    v = two_species(kind)
    net, batch = tiny(v), batch_of([24, 3, 9], v, types=types_of(kind, 3))
    out = save_model(net, v, tmp_path/"model", dict(pool="mean", seed=3), dict(loss=1.5), "A title")
    assert files_under(out) == [
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "training.json",
        "vocabulary.json",
    ]
    # nothing in it knows where it was
    moved = shutil.move(out, tmp_path/"elsewhere")
    assert all(
        str(tmp_path) not in (tmp_path / "elsewhere" / n).read_text(errors="replace")
        for n in files_under(tmp_path / "elsewhere")
    )
    back = load_model(moved, "cpu")
    assert (
        back.vocab == v
        and back.context == 24
        and back.labels is None
        and not back.model.training
        and back.training["seed"] == 3
        and back.training["vocabulary"] == v.hash
    )
    assert json.loads((tmp_path / "elsewhere" / "metrics.json").read_text()) == dict(loss=1.5) and (
        tmp_path / "elsewhere" / "README.md"
    ).read_text().startswith("# A title")
    for k, w in net.state_dict().items(): assert torch.equal(back.model.state_dict()[k], w), k
    plain = BertForMaskedLM.from_pretrained(moved).eval()
    with torch.no_grad():
        (
            close(plain(**batch).logits, net(**batch).logits, 1e-6),
            close(encode(back.model, batch), encode(net, batch), 1e-6),
        )
    assert list(plain.state_dict()) == list(net.state_dict()) and {k.split(".")[0] for k in plain.state_dict()} == {
        "bert",
        "cls",
    }


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_save_and_load_a_classifier(pool, tmp_path):
    v = two_species()
    net, batch = tiny(v), batch_of([24, 3, 9], v)
    clf = classifier_from(net, ["alpha cell", "beta, or B", 3], pool).eval()
    back = load_model(save_model(clf, v, tmp_path/"types", dict(pool=pool)), "cpu")
    assert (
        isinstance(back.model, CellClassifier)
        and back.labels == ["alpha cell", "beta, or B", "3"]
        and back.pool == pool
    )
    with torch.no_grad():
        (
            close(back.model.logits(batch), clf.logits(batch), 1e-6),
            close(encode(back.model, batch), encode(net, batch), 1e-6),
        )
    # a classifier's encoder can be tuned on
    again = classifier_from(back.model, ["x", "y"], pool).eval()
    with torch.no_grad(): close(encode(again, batch), encode(net, batch), 1e-6)


def test_a_checkpoint_of_another_maker(tmp_path):
    "Geneformer-family: BertForMaskedLM without our vocabulary, tokens numbered by its own dictionary"
    ids = genes_of("human", 30)
    tokens = {"<pad>": 0, "<mask>": 1, **{g: int(t) for g, t in zip(ids, np.random.default_rng(0).permutation(30) + 2)}}
    v = Vocabulary.from_geneformer(tokens, dict.fromkeys(ids, 2.))
    torch.manual_seed(0)
    theirs = BertForMaskedLM(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_act="relu",
            max_position_embeddings=40,
        )
    ).eval()
    theirs.save_pretrained(tmp_path/"theirs")
    loaded = load_model(tmp_path/"theirs", "cpu", vocab=v)
    assert (
        loaded.context == 40
        and loaded.vocab == v
        and loaded.model.config.type_vocab_size == 2
        and loaded.pool == "mean"
    )
    a = toy("human", genes=30)
    before_last = embed(a.copy(), loaded, progress=False).obsm["X_mix_geneformer"] # as its authors read it
    got = embed(a.copy(), loaded, emb_layer=2, progress=False).obsm["X_mix_geneformer"]
    assert loaded.family.name == "Geneformer V1" and not np.allclose(got, before_last)
    for i in range(3):
        s = a.X[i].toarray().ravel() / 2.
        mine = sorted((-s[j], tokens[g]) for j, g in enumerate(a.var_names) if s[j] > 0)
        with torch.no_grad(): h = theirs.bert(torch.tensor([[t for _, t in mine]])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(got[i], h, atol=1e-5)


@pytest.fixture
def model(model_dir, tmp_path): return shutil.copytree(model_dir, tmp_path/"model")


@pytest.mark.parametrize("share", [0, .01, .5, .999])
def test_truncated_weights(model, share):
    cut(model/"model.safetensors", share)
    refused(lambda: load_model(model, "cpu"), "model.safetensors",
        f"{(model/'model.safetensors').stat().st_size:,} bytes) cannot be read", "fetch or train it again")
    refused(lambda: embed(toy(), model, **QUIET), "cannot be read")


@pytest.mark.parametrize("share", [0, .01, .5, .999])
def test_truncated_vocabulary(model, share):
    cut(model/"vocabulary.json", share)
    refused(lambda: load_model(model, "cpu"), "vocabulary.json is cut off or damaged at byte", "make or fetch it again")


@pytest.mark.parametrize("name", ["config.json", "training.json"])
@pytest.mark.parametrize("share", [0, .5])
def test_truncated_settings(model, name, share):
    cut(model/name, share)
    refused(lambda: load_model(model, "cpu"), name)


def test_incomplete_model_directories(model, tmp_path):
    (model/"vocabulary.json").rename(tmp_path/"v.json")
    refused(lambda: load_model(model, "cpu"), "has no vocabulary.json, and 0 token dictionaries", "pass vocab=")
    (tmp_path/"v.json").rename(model/"vocabulary.json")
    (model/"model.safetensors").rename(model/"pytorch_model.bin")
    refused(lambda: load_model(model, "cpu"), "pytorch_model.bin", "is cut off, or holds more than weights")
    (model/"pytorch_model.bin").unlink()
    refused(lambda: load_model(model, "cpu"), "holds 0 files of weights", "fetch the model again")
    (model/"config.json").unlink()
    refused(lambda: load_model(model, "cpu"), "is not a model directory", "pretrain() or finetune()")


def test_weights_of_another_shape(model, vocab, tmp_path):
    other = save_model(build_model(vocab, **{**TINY, "hidden_size": 32}), vocab, tmp_path/"other")
    shutil.copy(other/"model.safetensors", model/"model.safetensors")
    refused(lambda: load_model(model, "cpu"), "cannot be read", "of another model")


def test_a_pickle_for_weights_is_not_opened(model, tmp_path):
    "A pickle that calls itself safetensors runs nothing"
    import pickle

    from handmade import Runs
    (model/"model.safetensors").write_bytes(pickle.dumps(Runs(tmp_path/"ran")))
    refused(lambda: load_model(model, "cpu"), "cannot be read")
    assert not (tmp_path/"ran").exists()


def test_a_device_that_is_not_there(model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: load_model(model_dir, "cuda"), "device='cuda' was asked for, but 0 CUDA devices are visible",
        "device='cpu' or 'auto'")


@pytest.mark.parametrize("where", ["weights", "rename"])
def test_full_disk_while_saving_a_model(vocab, model_dir, tmp_path, monkeypatch, where):
    net = load_model(model_dir, "cpu").model
    with monkeypatch.context() as m:
        if where == "rename": m.setattr(os, "replace", full_replace)
        else: m.setattr(type(net), "save_pretrained", full_replace)
        refused(lambda: save_model(net, vocab, tmp_path/"out"/"model"), "No space left on device", "free some space")
    assert not (tmp_path/"out"/"model").exists() and list((tmp_path/"out").iterdir()) == []
    assert load_model(save_model(net, vocab, tmp_path/"out"/"model"), "cpu").vocab == vocab


def test_anothers_directory_is_kept(model_dir, vocab):
    before = {p: p.stat().st_mtime_ns for p in model_dir.iterdir()}
    refused(lambda: save_model(build_model(vocab, **TINY), vocab, model_dir), "exists already", "another out=")
    assert {p: p.stat().st_mtime_ns for p in model_dir.iterdir()} == before


def test_a_directory_that_is_not_there(tmp_path):
    refused(lambda: load_model(tmp_path/"gone"), "is not a model directory")
    assert files_under(tmp_path) == []


def test_a_shipped_model_is_opened_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_model("mini", "cpu").training["held_out"] > 0
    shutil.copytree(checkpoints.shipped_model("mini"), tmp_path/"site"/"models"/"mini_human")
    (tmp_path/"site"/"mix_geneformer").mkdir()
    here = SimpleNamespace(origin=str(tmp_path/"site"/"mix_geneformer"/"__init__.py"))
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: here)
    assert load_model("mini_human", "cpu").path == tmp_path/"site"/"models"/"mini_human" # of the checkout
    with pytest.raises(InputError, match=r"mgf_models --only mini_mouse --out models and pass models/mini_mouse"):
        load_model("mini_mouse")
    (tmp_path/"mini_human").symlink_to(tmp_path/"site"/"models"/"mini_human")
    assert load_model("mini_human", "cpu").path == checkpoints.Path("mini_human") # one's own comes first


def test_nothing_is_written_beside_a_shipped_model():
    assert checkpoints.beside(checkpoints.shipped_model("mini"), "types") == checkpoints.Path("types")
    assert checkpoints.beside(checkpoints.Path("own/mini"), "types") == checkpoints.Path("own/types")
