"What comes from elsewhere runs nothing and ends in one sentence: dictionaries, weights, checkpoints, parts, downloads."
import http.server
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_under, refused, toy
from handmade import Runs
from reliability import noted_refusal
from trained import RUN, Killed, die_at, same

from mix_geneformer.cells.downloads import download, unpack_members
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.files import InputError, check_sha256, kept_arrays, sha256
from mix_geneformer.perturbation.verb import perturb
from mix_geneformer.pretraining import pretrain

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def trap(tmp_path):
    "Bytes of a pickle that makes a folder where it is loaded; the folder"
    ran = tmp_path/"ran"
    yield pickle.dumps(Runs(ran)), ran
    assert not ran.exists()


@pytest.fixture
def model(model_dir, tmp_path): return Path(shutil.copytree(model_dir, tmp_path/"model"))


# --- dictionaries and weights ----------------------------------------------------------------------------------------

def test_dictionaries(trap, tmp_path):
    (tmp_path/"token.pkl").write_bytes(trap[0])
    line = refused(lambda: Vocabulary.from_geneformer(tmp_path/"token.pkl", tmp_path/"token.pkl"), "not plain data")
    noted_refusal("dictionary: a pickle that runs something", len(trap[0]), line)


@pytest.mark.parametrize("name, said", [
    ("pytorch_model.bin", "holds more than weights, which is not run"), ("model.bin", "0 files of weights"),
    ("model.pt", "0 files of weights"), ("training_args.bin", "0 files of weights")])
@pytest.mark.parametrize("by", ["pickle", "torch"])
def test_pickled_weights(model, trap, name, said, by):
    (model/"model.safetensors").unlink()
    if by == "pickle": (model/name).write_bytes(trap[0])
    else: torch.save({"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2), "x": Runs(trap[1])}, model/name)
    line = refused(lambda: load_model(model, "cpu"), said)
    noted_refusal(f"weights: {name}, written by {by}", (model/name).stat().st_size, line)


def test_pickles_beside_the_weights_are_not_opened(model, trap):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (model/name).write_bytes(trap[0])
    assert load_model(model, "cpu").context


def test_a_pickle_under_the_name_of_weights(model, trap):
    (model/"model.safetensors").write_bytes(trap[0])
    line = refused(lambda: load_model(model, "cpu"), "model.safetensors", "cannot be read")
    noted_refusal("weights: a pickle called model.safetensors", len(trap[0]), line)


def test_code_of_a_model_is_not_run(model, tmp_path, trap):
    "What a hub calls remote code: named in the config, shipped beside it"
    (model/"modeling_mine.py").write_text(f"import os\nos.mkdir({str(trap[1])!r})\nclass M: pass\nclass C: pass\n")
    config = json.loads((model/"config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_mine.C", "AutoModelForMaskedLM": "modeling_mine.M"}
    (model/"config.json").write_text(json.dumps(config))
    assert load_model(model, "cpu").context


def test_no_module_asks_for_remote_code_or_loads_pickles():
    "Every place that could: none passes trust_remote_code, weights_only=False or allow_pickle=True"
    for path in sorted((ROOT/"mix_geneformer").rglob("*.py")):
        text = path.read_text()
        for word in ("trust_remote_code", "weights_only=False", "allow_pickle=True", "pickle.load(", "pickle.loads("):
            assert word not in text, f"{word} in {path}"


# --- what a run leaves for itself, in a folder that others may write to ----------------------------------------------

def test_checkpoints_of_a_killed_run(corpus, tmp_path, monkeypatch, trap):
    with monkeypatch.context() as m:
        die_at(m, [7])
        with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=3, **RUN)
    step, = tmp_path.glob(".model.*.work/step-6")
    pickles = [p for p in step.iterdir() if p.suffix in (".bin", ".pkl", ".pt")]
    assert len(pickles) >= 3   # optimiser, schedule, random states
    for path in pickles:
        kept = path.read_bytes()
        path.write_bytes(trap[0])
        line = refused(lambda: pretrain(corpus, tmp_path/"model", checkpoint_every=3, **RUN), "step-6", "remove it")
        noted_refusal(f"checkpoint: {path.name}", len(trap[0]), line)
        data = io.BytesIO()
        torch.save(dict(a=Runs(trap[1])), data)   # as torch writes them
        path.write_bytes(data.getvalue())
        refused(lambda: pretrain(corpus, tmp_path/"model", checkpoint_every=3, **RUN), "step-6", "remove it")
        path.write_bytes(kept)
    assert same(pretrain(corpus, tmp_path/"model", checkpoint_every=3, **RUN), pretrain(corpus, tmp_path/"b", **RUN))


def test_parts_of_a_killed_perturbation(model_dir, tmp_path, trap):
    ask = dict(state="cell_type", start="a", goal="b", device="cpu", progress=False, out=tmp_path/"out")
    perturb(toy(), model_dir, **ask)
    part = sorted((tmp_path/"out"/"shards").glob("*.npz"))[0]
    np.savez(part, cell=np.array([Runs(trap[1])], dtype=object))
    (tmp_path/"out"/"perturb.csv").unlink(missing_ok=True)
    line = refused(lambda: perturb(toy(), model_dir, **ask), part.name, "holds no plain arrays")
    noted_refusal("perturbation: a part of objects", part.stat().st_size, line)
    part.write_bytes(b"PK")
    refused(lambda: perturb(toy(), model_dir, **ask), part.name, "cut off")
    refused(lambda: kept_arrays(part, dict), "remove it and call again")


# --- archives and downloads ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", ["../out.h5ad", "/out.h5ad", "a/../../out.h5ad", ""])
def test_an_archive_writes_into_its_folder_alone(tmp_path, target):
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z: z.writestr("../../x.h5ad", "1")
    (tmp_path/"in").mkdir()
    members = {"../../x.h5ad": target}
    line = refused(lambda: unpack_members(tmp_path/"a.zip", members, tmp_path/"in"), "outside its folder")
    noted_refusal(f"zip: unpacked as {target!r}", (tmp_path/"a.zip").stat().st_size, line)
    unpack_members(tmp_path/"a.zip", {"../../x.h5ad": "x.h5ad"}, tmp_path/"in")
    assert files_under(tmp_path) == ["a.zip", "in/x.h5ad"]


class Cuts(http.server.BaseHTTPRequestHandler):
    "Serves `body` from where it is asked for, and hangs up half-way the first times"
    body, cuts, asked = bytes(range(256))*8192, 0, []

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].rstrip("-"))
        self.asked.append(start)
        rest = self.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if type(self).cuts: type(self).cuts, rest = self.cuts-1, rest[:len(rest)//2]
        self.wfile.write(rest)

    def log_message(self, *a): pass


@pytest.fixture
def served():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cuts) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Cuts.asked.clear()
        yield f"http://127.0.0.1:{server.server_port}/cells.h5ad"
        server.shutdown()


def test_a_cut_download_goes_on_and_is_the_file(served, tmp_path):
    Cuts.cuts = 2
    for _ in range(2):
        line = refused(lambda: download(served, tmp_path/"c.h5ad", progress=False), "cut off", "goes on from")
        noted_refusal("download: the server hangs up", len(Cuts.body), re.sub("127.0.0.1:[0-9]+", "server", line))
    path = download(served, tmp_path/"c.h5ad", progress=False)
    n = len(Cuts.body)
    assert path.read_bytes() == Cuts.body and Cuts.asked == [0, n//2, n//2+n//4]
    check_sha256(path, sha256(path))


def test_a_changed_file_is_refused_and_removed(served, tmp_path):
    Cuts.cuts = 0
    path = download(served, tmp_path/"c.h5ad", progress=False)
    path.write_bytes(path.read_bytes()[:-1]+b"x")
    line = refused(lambda: download(served, path, progress=False), "SHA-256", "fetch it again")
    noted_refusal("download: changed by a byte", len(Cuts.body), line)
    assert not path.exists() and download(served, path, progress=False).read_bytes() == Cuts.body


def test_every_corpus_is_pinned_by_its_hash():
    from mix_geneformer.cells import corpora
    text = Path(corpora.__file__).read_text()
    assert text.count("http") and "sha256" in text
    for name, c in corpora.CORPORA.items():
        assert c, name


# --- nothing of the user's leaves ------------------------------------------------------------------------------------

SILENT = """
import sys
asked = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"): asked.append((event, args[1:]))
sys.addaudithook(hook)
import mix_geneformer as mgf
from conftest import TINY, toy
human, out = toy(), sys.argv[1]
vocab = mgf.Vocabulary.build([human, toy("mouse", seed=1)])
quiet = dict(device="cpu", progress=False)
corpus = mgf.tokenize(human, vocab, f"{out}/corpus", 24, progress=False)
model = mgf.pretrain(f"{out}/corpus", f"{out}/model", max_steps=2, **TINY, **quiet)
types = mgf.finetune(f"{out}/corpus", model, out=f"{out}/types", epochs=1, min_share=0, **quiet).path
mgf.embed(human, model, **quiet); mgf.predict(human, types, **quiet)
mgf.transfer(human, toy("mouse", seed=1), genes="all", progress=False)
mgf.perturb(human, model, state="cell_type", start="a", goal="b", **quiet)
assert not asked, asked
"""


def test_nothing_leaves_the_machine(tmp_path):
    "Every verb, without any variable that would forbid it: no address is looked up, nothing is sent"
    import os
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env["PYTHONPATH"] = ":".join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", SILENT, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_refusals_are_input_errors(): assert issubclass(InputError, ValueError)
