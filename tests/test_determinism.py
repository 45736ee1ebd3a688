"Threads, batches and the order of cells change no token; vectors, probabilities and shifts to 1e-5 at most."
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, toy
from trained import RUN

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.classification.finetuning import finetune
from mix_geneformer.classification.prediction import class_probabilities
from mix_geneformer.embedding import embed
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.perturbation.verb import perturb
from mix_geneformer.pretraining import pretrain

QUIET = dict(device="cpu", progress=False)
WAYS = [(1, 1), (1, 7), (2, 7), (2, 64), (4, 3)]   # threads, cells per batch


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory): return pretrain(corpus, tmp_path_factory.mktemp("model")/"model", **RUN)


@pytest.fixture(scope="module")
def classifier(corpus, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier")/"types"
    return finetune(corpus, model, out=out, epochs=2, min_share=0, **QUIET).path


@pytest.fixture
def threads():
    "Sets the threads of torch; afterwards they are as before"
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def files_of(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".lock"}


def test_tokens(both, vocab, tmp_path):
    "By one to four threads, and cell by cell"
    found = []
    for n in (1, 2, 4):
        tokenize(list(both), vocab, tmp_path/f"{n}", context=TINY["context"], threads=n, progress=False)
        found.append({k: v for k, v in files_of(tmp_path/f"{n}").items() if k.endswith(".arrow")})
    assert found[0] == found[1] == found[2] and len(found[0]) == 2
    human, whole = both[0], encode_cells(both[0], vocab, TINY["context"])
    for i in (0, 5, 23):
        alone = encode_cells(human[i].copy(), vocab, TINY["context"])
        assert np.array_equal(alone.values, whole.take([i]).values)


HASH = """
import sys
from conftest import partners, toy
from mix_geneformer.cells.vocabulary import Vocabulary
v = Vocabulary.build([toy("human"), toy("mouse", seed=1)])
v.save(sys.argv[1])
print(v.hash)
"""


def test_a_vocabulary_does_not_know_the_process(tmp_path):
    "Python's hashes of text differ from process to process"
    import os
    found = []
    for seed in ("0", "7"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))}
        done = subprocess.run([sys.executable, "-c", HASH, tmp_path/seed], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append((done.stdout, (tmp_path/seed/"vocabulary.json").read_bytes()))
    assert found[0] == found[1]
    assert found[0][0].strip() == Vocabulary.build([toy("human"), toy("mouse", seed=1)]).hash


def test_vectors(both, model, threads):
    found = []
    for n, size in WAYS:
        threads(n)
        found.append(embed(both[0].copy(), model, batch_size=size, **QUIET).obsm["X_mix_geneformer"])
    for x in found[1:]: np.testing.assert_allclose(x, found[0], rtol=0, atol=1e-5)
    order = np.random.default_rng(0).permutation(24)
    again = embed(both[0][order].copy(), model, batch_size=5, **QUIET).obsm["X_mix_geneformer"]
    np.testing.assert_allclose(again, found[0][order], rtol=0, atol=1e-5)


def test_probabilities(both, classifier, threads):
    found = []
    for n, size in WAYS:
        threads(n)
        loaded = load_model(classifier, "cpu")
        found.append(class_probabilities(loaded, both[0].copy(), size, progress=False).to_numpy())
    for p in found[1:]: np.testing.assert_allclose(p, found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_shifts(both, model, threads, mode):
    ask, found = dict(state="cell_type", start="a", goal="b", mode=mode, **QUIET), []
    for n, tokens in [(1, 4096), (1, 60), (2, 300), (4, 4096)]:
        threads(n)
        found.append(perturb(both[0].copy(), model, batch_tokens=tokens, **ask).set_index("ensembl_id"))
    for t in found[1:]:
        assert set(t.index) == set(found[0].index)
        np.testing.assert_allclose(t.cosine_shift.loc[found[0].index], found[0].cosine_shift, rtol=0, atol=1e-5)


def test_training_on_one_thread_and_on_two(corpus, model, tmp_path, threads):
    "Sums come in another order: near, not equal"
    import safetensors.torch
    threads(2)
    out = pretrain(corpus, tmp_path/"model", **RUN)
    a, b = (safetensors.torch.load_file(folder/"model.safetensors") for folder in (model, out))
    for k, w in a.items(): torch.testing.assert_close(b[k], w, rtol=0, atol=1e-4)
