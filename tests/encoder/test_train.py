"The training loop on a module whose best weights are known; models are trained in tests/test_pretraining.py."

import pytest
import torch
from conftest import refused
from torch import nn

from mix_geneformer.encoder.train import fit, parameter_groups, warmup_within

class Line(nn.Module):
    "Fits y = 3x; what it is called with is kept."

    def __init__(self):
        super().__init__()
        self.slope, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, x):
        self.seen.append(float(x[0]))
        return dict(loss=((self.slope * x - 3 * x) ** 2).mean())


class Batches:
    "Batches 0, 1, 2, ... of an epoch, as numbers in `x`."

    def __init__(self, steps):
        self.steps = steps

    def epoch(self, epoch, start=0, rank=0, world=1):
        for i in range(start, self.steps):
            yield dict(x=torch.full((2,), 1.0 + 10 * epoch + i))


def run(steps=4, **how):
    module = Line()
    how = dict(dict(epochs=2, learning_rate=0.1, warmup_steps=1, weight_decay=0.0, device="cpu", progress=False), **how)
    log, speed = fit(module, Batches(steps), **how)
    return module, log, speed


def test_every_batch_of_every_epoch_in_order():
    module, log, _ = run()
    assert module.seen == [1, 2, 3, 4, 11, 12, 13, 14]
    assert log[-1]["step"] == 8 and module.slope.item() != 0


@pytest.mark.parametrize("max_steps, n", [(3, 3), (5, 5), (99, 8), (None, 8)])
def test_the_shorter_of_epochs_and_steps(max_steps, n):
    module, _, _ = run(max_steps=max_steps)
    assert len(module.seen) == n


def test_nothing_to_train():
    refused(lambda: run(epochs=0), "0 optimiser steps are nothing to train", "raise epochs or max_steps")


def test_it_learns():
    module, _, _ = run(epochs=40, learning_rate=0.3)
    assert module.slope.item() == pytest.approx(3, abs=0.05)


def test_a_function_after_each_epoch_is_logged():
    _, log, _ = run(after_epoch=lambda module, epoch: dict(mine=float(epoch)))
    assert [row["mine"] for row in log if "mine" in row] == [0.0, 1.0]


@pytest.mark.parametrize("asked, total, n", [(10, 100, 10), (100, 100, 10), (10_000, 100, 10), (5, 4, 1), (0, 9, 0)])
def test_a_warm_up_fits_the_run(asked, total, n):
    assert warmup_within(asked, total) == n


def test_vectors_do_not_decay():
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    module[1].bias.requires_grad_(False)
    matrices, vectors = parameter_groups(module, 0.1)
    assert [tuple(p.shape) for p in matrices["params"]] == [(2, 3)] and matrices["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in vectors["params"]] == [(2,), (2,)] and vectors["weight_decay"] == 0
