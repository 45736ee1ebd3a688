"What the tests of pretraining share: a short run, a kill in the midst of it, what a model directory holds."
import json
from pathlib import Path

import safetensors.torch
import torch
from conftest import TINY

from mix_geneformer.encoder.losses import Objective

# 6 steps an epoch, 12 in all
RUN = dict(TINY, batch_size=8, epochs=2, learning_rate=1e-3, warmup_steps=3, device="cpu", progress=False)


class Killed(BaseException): "As a kill: nothing catches it"


def weights(folder): return safetensors.torch.load_file(Path(folder)/"model.safetensors")


def log(folder): return json.loads((Path(folder)/"training.json").read_text())["log"]


def same(a, b):
    return set(weights(a)) == set(weights(b)) and all(torch.equal(w, weights(b)[k]) for k, w in weights(a).items())


def die_at(monkeypatch, calls):
    "The objective raises at these calls, counted over all runs; returns the count"
    real, count = Objective.forward, [0]

    def forward(self, *a, **k):
        count[0] += 1
        if count[0] in calls: raise Killed
        return real(self, *a, **k)
    monkeypatch.setattr(Objective, "forward", forward)
    return count
