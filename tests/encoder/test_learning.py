"First weights from counts, and whether a model has learnt."

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from mix_geneformer.cells.genes import gene_table
from mix_geneformer.cells.sentences import Sentences
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.batches import MixedBatches
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.encoder.learnt import Apart, has_learnt, hidden_places, keep_apart, learnt_sentence, model_losses
from mix_geneformer.encoder.model import build_model
from mix_geneformer.encoder.start import gene_frequencies, start_from_coexpression
from mix_geneformer.files import InputError
from mix_geneformer.pretraining import pretrain

GENES, CONTEXT = 120, 24
SMALL = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    context=CONTEXT,
    attention_probs_dropout_prob=0.0,
)
RUN = dict(
    SMALL,
    batch_size=16,
    simcse_weight=0.0,
    learning_rate=3e-3,
    warmup_steps=1,
    held_out=0.2,
    study_power=0.5,
    epoch_cells=96,
    length_window=1,
    epochs=99,
    progress=False,
)


def a_study(name, n, seed, programmes=4):
    "Cells that each hold 20 of the 30 genes of one of four programmes."
    draw, x = np.random.default_rng(seed), np.zeros((n, GENES), np.float32)
    for i, row in enumerate(x):
        row[30 * (i % programmes) + draw.permutation(30)[:20]] = draw.permutation(20) + 1
    obs = pd.DataFrame(
        dict(
            study=name,
            donor=[f"{name}{i % 5}" for i in range(n)],
            cell_type=[f"type {i % programmes}" for i in range(n)],
        )
    )
    obs.index = [f"{name}-{i}" for i in range(n)]
    return AnnData(csr_matrix(x), obs, pd.DataFrame(index=gene_table("human").index[:GENES]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "Two studies of 160 and 60 cells."
    out, cells = tmp_path_factory.mktemp("learning") / "corpus", [a_study("a", 160, 0), a_study("b", 60, 1)]
    tokenize(cells, Vocabulary.build(cells), out, CONTEXT, ["study", "donor", "cell_type"], progress=False)
    return out


@pytest.fixture(scope="module")
def cells():
    "A vocabulary and sentences of four programmes."
    names = [f"ENSG{i:011d}" for i in range(GENES)]
    vocab = Vocabulary(
        pd.DataFrame(
            dict(token=range(2, GENES + 2), ensembl_id=names, symbol=names, species="human", median=1.0, ortholog="")
        )
    )
    draw = np.random.default_rng(0)
    words = [2 + 30 * (i % 4) + draw.permutation(30)[:20] for i in range(240)]
    return vocab, Sentences(np.concatenate(words), np.arange(241) * 20, "human")


def apart_of(cells):
    vocab, s = cells
    part = np.where(np.arange(240) < 200, "train", "held out")
    return Apart(s, vocab, CONTEXT, part, np.full(240, "a"), types=np.arange(240) % 4)


def test_the_start_predicts_before_the_first_step(cells):
    vocab, s = cells
    torch.manual_seed(0)
    random, apart = build_model(vocab, **SMALL), apart_of(cells)
    before = apart.table(random).iloc[-1]
    after = apart.table(start_from_coexpression(random, s.take(np.arange(200)))).iloc[-1]
    assert after.model < before.model and after.gained > -0.05


def test_the_start_spares_steps(cells):
    "After the same few steps the loss of cells kept apart is lower by far."
    vocab, s = cells
    apart, train, found = apart_of(cells), s.take(np.arange(200)), {}
    for start in False, True:
        torch.manual_seed(0)
        m = build_model(vocab, **SMALL)
        if start:
            start_from_coexpression(m, train)
        best = torch.optim.Adam(m.parameters(), lr=2e-3)
        for step in range(10):
            ids = torch.as_tensor(np.stack([train[i] for i in range(step * 20, step * 20 + 20)]).astype(np.int64))
            hide = torch.rand(ids.shape, generator=torch.Generator().manual_seed(step)) < 0.15
            loss = torch.nn.functional.cross_entropy(m(ids.masked_fill(hide, 1)).logits[hide], ids[hide])
            best.zero_grad(), loss.backward(), best.step()
        found[start] = apart.table(m).iloc[-1].gained
    assert found[True] > found[False] + 0.2


def test_frequencies_are_those_that_are_read(cells):
    vocab, s = cells
    w = np.where(np.arange(240) % 4 == 0, 4.0, 0.0)
    f = gene_frequencies(s, len(vocab), weights=w, prior=0)
    assert f[2:32].sum() == pytest.approx(1) and f[32:].sum() == 0


def test_hidden_places_do_not_depend_on_the_batch(cells):
    vocab, s = cells
    torch.manual_seed(0)
    m, some = build_model(vocab, **SMALL), s.take(np.arange(30))
    places = hidden_places(some, vocab, CONTEXT)
    np.testing.assert_allclose(
        model_losses(m, some, vocab, places, CONTEXT), model_losses(m, some, vocab, places, CONTEXT, 4), rtol=1e-4
    )


def test_a_hidden_gene_cannot_be_read(cells):
    "A model that copies what it sees knows nothing of hidden places: each is <mask>, none is left as it is."
    vocab, s = cells
    torch.manual_seed(0)
    m, some = build_model(vocab, **SMALL), s.take(np.arange(30))
    places = hidden_places(some, vocab, CONTEXT)
    other = Sentences(some.values.copy(), some.offsets, "human")
    at = some.offsets[places.cell] + places["rank"]
    other.values[at] = 2 + (other.values[at] - 1) % GENES  # other genes at the hidden places
    a, b = (model_losses(m, x, vocab, places, CONTEXT) for x in (some, other))
    np.testing.assert_array_equal(a, b)


def test_whole_donors_are_kept_apart():
    study, donor = np.repeat(["a", "b"], [100, 40]), np.array([f"d{i % 7}" for i in range(140)])
    part = keep_apart(study, donor, 0.1, seed=3)
    for s in "ab":
        held = set(donor[(study == s) & (part == "held out")])
        assert held and not held & set(donor[(study == s) & (part == "train")])


def test_without_donors_cells_are_kept_apart():
    part = keep_apart(np.repeat("a", 50), None, 0.1)
    assert (part == "held out").sum() == 5


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(apart=("x",)), "1 of 1 studies to keep apart are not there"),
        (dict(apart=("a",)), "0 of 50 cells are left to learn from"),
    ],
)
def test_bad_splits_get_a_sentence(how, said):
    with pytest.raises(InputError, match=said):
        keep_apart(np.repeat("a", 50), **how)


def test_random_weights_are_called_so(cells):
    vocab, _ = cells
    torch.manual_seed(0)
    t = apart_of(cells).table(build_model(vocab, **SMALL))
    assert not has_learnt(t) and learnt_sentence(t).startswith("HAS NOT LEARNT")
    assert t["per cell type"].iloc[-1] < t["gene frequencies"].iloc[-1] - 0.5  # types tell more than frequencies


def test_pretrain_says_whether_it_has_learnt(corpus, tmp_path):
    said = {}
    for init, steps, rate in ("random", 2, 0.0), ("coexpression", 60, 3e-3):
        out = pretrain(corpus, tmp_path / init, **dict(RUN, init=init, max_steps=steps, learning_rate=rate))
        said[init] = json.loads((out / "metrics.json").read_text())
        assert said[init]["verdict"] in (out / "README.md").read_text()
    assert not said["random"]["learnt"] and said["coexpression"]["learnt"]
    assert {r["study"] for r in said["coexpression"]["kept_apart"]} == {"a", "b", "mean over studies"}


def test_a_killed_run_of_mixed_studies_is_the_run_that_was_never_killed(corpus, tmp_path, monkeypatch):
    how = dict(
        RUN, init="coexpression", max_steps=14, schedule="warmup_stable_decay", decay_steps=4, checkpoint_every=5
    )
    whole = pretrain(corpus, tmp_path / "whole", **how)
    step, n = torch.optim.AdamW.step, [0]

    def dies(self, *a, **k):
        n[0] += 1
        if n[0] == 9:
            raise KeyboardInterrupt
        return step(self, *a, **k)

    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain(corpus, tmp_path / "killed", **how)
    again = pretrain(corpus, tmp_path / "killed", **how)
    a, b = (load_model(p, "cpu") for p in (whole, again))
    for k, v in a.model.state_dict().items():
        assert torch.equal(v, b.model.state_dict()[k]), k
    drop = lambda log: [{k: v for k, v in r.items()} for r in log]
    assert drop(a.training["log"]) == drop(b.training["log"])


def test_a_longer_run_is_the_shorter_one_until_it_falls(corpus, tmp_path):
    "The level schedule: what was learnt before the fall does not depend on the length of the run."
    logs = []
    for steps in 14, 24:
        out = pretrain(
            corpus, tmp_path / str(steps), **dict(RUN, max_steps=steps, schedule="warmup_stable_decay", decay_steps=4)
        )
        logs.append(
            [r for r in json.loads((out / "training.json").read_text())["log"] if r["step"] <= 10 and "loss" in r]
        )
    assert logs[0] == logs[1] and logs[0]


def test_half_precision_halves_the_file(corpus, tmp_path):
    how = dict(RUN, max_steps=1)
    size = [
        os.path.getsize(pretrain(corpus, tmp_path / str(h), half=h, **how) / "model.safetensors") for h in (False, True)
    ]
    assert size[1] < size[0] * 0.6
    m = load_model(tmp_path / "True", "cpu").model
    assert next(m.parameters()).dtype == torch.float32


def test_one_goes_on_from_a_model(corpus, tmp_path):
    first = pretrain(corpus, tmp_path / "first", **dict(RUN, init="coexpression", max_steps=60))
    more = pretrain(corpus, tmp_path / "more", **dict(RUN, init=str(first), max_steps=2, learning_rate=1e-6))
    gained = [json.loads((p / "metrics.json").read_text())["kept_apart"][-1]["gained"] for p in (first, more)]
    assert gained[1] == pytest.approx(gained[0], abs=0.02)


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(init="nowhere"), "init='nowhere' is none of 3 choices"),
        (dict(studies_apart=("lung",)), "1 of 1 studies to keep apart are not there"),
        (dict(batch_tokens=300), "batch_tokens=300 and study_power=0.5 are 2 ways"),
    ],
)
def test_bad_settings_get_a_sentence(corpus, tmp_path, how, said):
    with pytest.raises(InputError, match=said):
        pretrain(corpus, tmp_path / "x", **dict(RUN, max_steps=1, **how))
    assert not (tmp_path / "x").exists()


def test_two_processes_have_equal_shares(cells):
    vocab, s = cells
    study = np.where(np.arange(240) < 200, "a", "b").astype(object)
    b = MixedBatches(s, vocab, 16, CONTEXT, study, pd.Series(dict(a=0.31, b=0.69)), 160)
    for epoch in range(4):
        one, two = ([x["input_ids"].shape[0] for x in b.epoch(epoch, rank=r, world=2)] for r in (0, 1))
        assert one == two == [8] * b.steps
