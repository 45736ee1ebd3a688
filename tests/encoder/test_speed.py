"What a run does is counted while the clock runs, and told."

import pytest
import torch

from mix_geneformer.encoder.speed import Speed, matmul_rate

class Worker:
    def flops(self, attention_mask):
        return 10 * attention_mask.numel()


def counted(seconds=2.0):
    s = Speed()
    s.count(Worker(), dict(attention_mask=torch.ones(4, 8)))  # before the clock runs
    s.start()
    mask = torch.ones(4, 8)
    mask[:, 6:] = 0
    for _ in range(3):
        s.count(Worker(), dict(attention_mask=mask))
    s.count(Worker(), dict(labels=mask))  # nothing to count by
    s.stop()
    s.seconds = seconds
    return s


def test_cells_tokens_and_padding():
    found = counted().summary()
    assert found == dict(steps_per_s=1.5, cells_per_s=6, tokens_per_s=36, padding=0.25, flop_per_s=480)
    assert counted().summary(rate=960)["mfu"] == 0.5


def test_in_words():
    assert counted().line(960) == "1.50 steps/s, 6 cells/s, 36 tokens/s, 25.0% padding, MFU 50% of 0 GFLOP/s"
    assert counted().line().endswith("padding") and Speed().line() == "" and Speed().summary() == {}


def test_a_clock_that_stands_still():
    s = Speed()
    s.stop()
    assert s.seconds == 0
    s.start()
    s.stop()
    first = s.seconds
    s.stop()
    assert s.seconds == first > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_this_machine(dtype):
    assert matmul_rate("cpu", dtype) > 1e8
