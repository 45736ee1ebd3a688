"Processes that train together, one of which is lost: a sentence, and the same command goes on with as many or others."
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from trained import RUN, log, weights

from mix_geneformer.encoder.runs import told_of_loss
from mix_geneformer.pretraining import pretrain

# without dropout: what one process draws, two draw otherwise
HOW = dict(RUN, hidden_dropout_prob=0., attention_probs_dropout_prob=0., max_steps=10, checkpoint_every=2)

SCRIPT = """
import json, os, signal, sys
from mix_geneformer.encoder.losses import Objective
from mix_geneformer.files import InputError
from mix_geneformer.pretraining import pretrain
corpus, out, how, die = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
real, calls = Objective.forward, [0]
def forward(self, *a, **k):
    calls[0] += 1
    if os.environ["RANK"] == "1" and calls[0] == die: os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *a, **k)
Objective.forward = forward
try: pretrain(corpus, out, **how)
except InputError as e: sys.exit(f"run: {e}")
import torch.distributed as dist
if dist.is_initialized(): dist.barrier(); dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script")/"run.py"
    path.write_text(SCRIPT)
    return path


def together(script, corpus, out, n, die=0):
    "Train with `n` processes; the second is killed at its step `die`"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
           "PYTHONPATH": ":".join(filter(None, sys.path))}
    start = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n
    cmd = *start, script, corpus, out, json.dumps(HOW), die
    return subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=200, env=env)


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory): return pretrain(corpus, tmp_path_factory.mktemp("one")/"model", **HOW)


@pytest.mark.parametrize("n", [2, 1])
def test_a_lost_process_and_the_same_command_again(script, corpus, one, tmp_path, n):
    lost = together(script, corpus, tmp_path/"model", 2, die=7)
    assert lost.returncode and not (tmp_path/"model").exists()
    mine = [line for line in lost.stderr.splitlines() if line.startswith("run: ")]
    assert not mine or "1 or more of 2 processes that train together were lost: start the same command again" in mine[0]
    assert [p.name for p in tmp_path.glob(".model.*.work/step-*") if p.suffix != ".partial"] == ["step-6"]
    again = together(script, corpus, tmp_path/"model", n)
    assert again.returncode == 0, again.stderr[-3000:]
    for k, w in weights(one).items():
        if k.endswith("key.bias"): continue   # softmax ignores it: its gradient is rounding alone
        torch.testing.assert_close(weights(tmp_path/"model")[k], w, rtol=0, atol=1e-5, msg=lambda m: f"{k}: {m}")
    a, b = pd.DataFrame(log(one)), pd.DataFrame(log(tmp_path/"model"))
    assert a.step.tolist() == b.step.tolist() and a.mlm.to_numpy() == pytest.approx(b.mlm.to_numpy(), abs=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("said", ["[gloo/transport/tcp/pair.cc:534] Connection closed by peer", "NCCL error"])
def test_what_libraries_say_becomes_a_sentence(monkeypatch, said):
    from conftest import refused

    from mix_geneformer.encoder import runs
    monkeypatch.setattr(runs, "n_processes", lambda: 4)

    @told_of_loss()
    def broken(): raise RuntimeError(said)
    refused(broken, "1 or more of 4 processes", "start the same command again")

    @told_of_loss()
    def other(): raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"): other()
