"Whatever strikes a command, its output is whole, absent or resumable; the same command then gives the same bytes."
import os
from collections import Counter

import pytest
from conftest import toy
from interrupted import FAULTS, Commands, Verb, can_mount, drawn, fill, strike
from reliability import noted

MANY = int(os.environ.get("STRIKES", 50))   # of each fault on each verb, in the slow tests
SIZE = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32 --context 24".split()


def verbs_in(folder):
    "Every verb as a command, on counts, a corpus and models that lie in the folder"
    human, mouse = folder/"human.h5ad", folder/"mouse.h5ad"
    corpus, model, classifier = folder/"tokenize/corpus", folder/"pretrain/model", folder/"finetune/classifier"
    cpu = "--device", "cpu"
    states = "--state", "cell_type", "--start", "a", "--goal", "b"
    return dict(
        tokenize=Verb(["mgf_tokenize", f"{human},{mouse}", "OUT/corpus", "--threads", 1, "--context", 24],
                      ["corpus"], [human, mouse], "state.json"),
        pretrain=Verb(["mgf_pretrain", corpus, "OUT/model", "--size", "paper", *SIZE, *cpu, "--epochs", 3,
                       "--batch_size", 8, "--checkpoint_every", 2, "--warmup_steps", 2, "--held_out", .2],
                      ["model"], [corpus], room=5),
        finetune=Verb(["mgf_finetune", corpus, model, "--out", "OUT/classifier", *cpu, "--epochs", 3,
                       "--warmup_steps", 2, "--checkpoint_every", 2], ["classifier"], [corpus, model], room=2),
        embed=Verb(["mgf_embed", human, model, "OUT/embedded.h5ad", *cpu], ["embedded.h5ad"], [human, model]),
        predict=Verb(["mgf_predict", human, classifier, "OUT/predicted.h5ad", *cpu], ["predicted.h5ad"],
                     [human, classifier]),
        transfer=Verb(["mgf_transfer", human, mouse, "OUT/labelled.h5ad", "--genes", "all", "--model", model,
                       "--classifier", "OUT/taught", *cpu], ["labelled.h5ad", "taught"], [human, mouse, model]),
        perturb=Verb(["mgf_perturb", human, model, "OUT/ranking", *cpu, *states], ["ranking"], [human, model],
                     "perturb.csv"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Commands, and the verbs after an undisturbed run of each, whose results the later ones read"
    folder, commands = tmp_path_factory.mktemp("undisturbed"), Commands()
    for seed, species in enumerate(("human", "mouse")):
        toy(species, n=48, seed=seed).write_h5ad(folder/f"{species}.h5ad")
    verbs = verbs_in(folder)
    for name, verb in verbs.items(): verb.measure(commands, folder/name)
    yield commands, verbs
    commands.close()


def clean(found):
    "No run leaves anything beside its output"
    assert found.litter == []
    return found


def test_nothing_leaves_the_machine(world):
    "Undisturbed runs of all verbs, without HF_HUB_OFFLINE, have asked for no address and no connection"
    _, verbs = world   # `Running.wait` looks after every run, of every test here
    assert all(verb.steps > 0 and verb.expected for verb in verbs.values())


@pytest.mark.parametrize("verb", ["tokenize", "pretrain", "finetune", "embed", "predict", "transfer", "perturb"])
def test_a_killed_command_goes_on(world, tmp_path, verb):
    commands, verbs = world
    for i in range(2): clean(strike(verbs[verb], "kill -9", commands, tmp_path/str(i), drawn(verb, i)))


@pytest.mark.parametrize("fault, verb", [
    ("SIGTERM", "pretrain"), ("SIGTERM", "embed"), ("vanished input", "tokenize"), ("vanished input", "predict"),
    ("no permission", "pretrain"), ("no permission", "perturb"), ("two processes", "tokenize"),
    ("two processes", "pretrain")])
def test_other_faults(world, tmp_path, fault, verb):
    commands, verbs = world
    clean(strike(verbs[verb], fault, commands, tmp_path/"0", drawn(fault, verb)))


@pytest.mark.parametrize("verb", ["tokenize", "pretrain", "embed"])
def test_a_full_disk(world, tmp_path, verb):
    if not can_mount(tmp_path/"try"): pytest.skip("small disks (tmpfs) cannot be mounted by this user")
    commands, verbs = world
    clean(fill(verbs[verb], commands, tmp_path/"disk", drawn(verb)))


# --- many times, and the table of the page ---------------------------------------------------------------------------

def told(verb, fault, strikes):
    "A row of the table"
    ended, left = Counter(s.ended for s in strikes), Counter(s.left for s in strikes)
    return dict(verb=verb, fault=fault, times=len(strikes), **{"while it ran": sum(s.hit for s in strikes)},
                **{f"ended {k}": ended[v] for k, v in {"by the signal": "signal", "in one sentence": "one sentence",
                                                       "well": "well"}.items()},
                absent=left["absent"], resumable=left["resumable"], whole=left["whole"],
                **{"same bytes afterwards": sum(s.same for s in strikes)})


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["tokenize", "pretrain", "finetune", "embed", "predict", "transfer", "perturb"])
@pytest.mark.parametrize("fault", [*FAULTS, "full disk"])
def test_many_strikes(world, tmp_path, fault, verb):
    if fault == "full disk" and not can_mount(tmp_path/"try"): pytest.skip("small disks cannot be mounted by this user")
    commands, verbs = world
    strikes = []
    for i in range(MANY):
        draw, folder = drawn(fault, verb, i), tmp_path/str(i)
        many = fill(verbs[verb], commands, folder, draw) if fault == "full disk" else strike(
            verbs[verb], fault, commands, folder, draw)
        strikes.append(clean(many))
    noted("interruptions", **told(verb, fault, strikes))
