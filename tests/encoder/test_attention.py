"Sentences end to end attend as padded ones do, cell by cell and in one call of a kernel."
import pytest
import torch
import torch.nn.functional as F
from tinymodel import batch_of, close, tiny, two_species

from mix_geneformer.encoder import model
from mix_geneformer.encoder.attention import attend_padded, packed_attention, run_layers, varlen_kernel
from mix_geneformer.encoder.model import encode

LENGTHS = [3, 1, 7]


def kernel_by_hand(q, k, v, ends_q, ends_k, longest_q, longest_k):
    "What flash attention is told, (N, heads, H/heads) and where sentences end, done with plain products"
    assert (longest_q, longest_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    assert (ends_q[-1], ends_k[-1]) == (len(q), len(k)) and ends_q.dtype == ends_k.dtype == torch.int32
    out = []
    for i in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) / q.shape[-1] ** .5
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys]))
    return torch.cat(out)


@pytest.fixture
def a(): return tiny(two_species()).bert.encoder.layer[0].attention.self


def states(seed): return torch.randn(sum(LENGTHS), 16, generator=torch.Generator().manual_seed(seed))


def padded(x, fill=9.): return torch.nn.utils.rnn.pad_sequence(x.split(LENGTHS), batch_first=True, padding_value=fill)


@pytest.mark.parametrize("kernel", [None, kernel_by_hand], ids=["cell by cell", "one call"])
@pytest.mark.parametrize("n_queries", [None, 1])
def test_end_to_end_is_padded(a, kernel, n_queries):
    q, k, v = (states(i) for i in range(3))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    bias = torch.where(real, 0., -1e9)[:, None, None]
    wide = attend_padded(padded(q), padded(k), padded(v), a, bias)
    first = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    plain = wide[real] if n_queries is None else wide[:, 0]
    close(packed_attention(LENGTHS, "cpu", n_queries, kernel)(q if n_queries is None else q[first], k, v, a), plain)


def test_a_rectangle_by_hand(a):
    "softmax(q k / sqrt(d)) v, head by head"
    q, k, v = (states(i)[None] for i in range(3))
    out = []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        out.append((q[0, :, part] @ k[0, :, part].T / 8 ** .5).softmax(-1) @ v[0, :, part])
    close(attend_padded(q, k, v, a)[0], torch.cat(out, 1))


@pytest.mark.parametrize("at", [None, torch.tensor([[0, 2], [16, 4], [5, 3]])], ids=["all positions", "some"])
def test_the_encoder_by_a_kernel_is_the_encoder(monkeypatch, at):
    v = two_species()
    net, batch = tiny(v), batch_of([9, 24, 6], v)
    with torch.no_grad():
        plain = encode(net, batch, at=at, packed=False)
        monkeypatch.setattr(model, "varlen_kernel", lambda *_: kernel_by_hand)
        fast = encode(net, batch, at=at)
    real = batch["attention_mask"].bool() if at is None else ...
    close(fast[real], plain[real])


def test_dropout_of_attention_is_on_in_training_alone(a):
    x = states(0)[None]
    torch.manual_seed(0)
    still = attend_padded(x, x, x, a)
    assert torch.equal(still, attend_padded(x, x, x, a))
    a.train()
    assert not torch.allclose(still, attend_padded(x, x, x, a))
    torch.manual_seed(1)
    dropped = attend_padded(x, x, x, a)
    torch.manual_seed(1)
    assert torch.equal(dropped, attend_padded(x, x, x, a))


def test_no_kernel_on_a_cpu():
    net = tiny(two_species())
    assert varlen_kernel(net, torch.device("cpu")) is None
    assert varlen_kernel(net.bfloat16(), torch.device("cpu")) is None
    assert varlen_kernel(net.float(), torch.device("cuda")) is None                  # full precision
    net.bfloat16().train()
    assert varlen_kernel(net, torch.device("cuda")) is None                          # dropout


def test_the_last_layer_is_asked_where_it_is_wanted():
    v = two_species()
    net, batch = tiny(v), batch_of([9], v)
    seen = []

    def attend(q, k, v, a):
        seen.append((q.shape[1], k.shape[1]))
        return attend_padded(q, k, v, a)
    with torch.no_grad():
        x = net.bert.embeddings(batch["input_ids"])
        blocks = list(net.bert.encoder.layer)
        whole = run_layers(blocks, x, attend)
        some = run_layers(blocks, x, attend, attend, lambda x: x[:, 2:4])
    assert seen == [(9, 9), (9, 9), (9, 9), (2, 9)]
    close(some, whole[:, 2:4])
    assert F.cosine_similarity(whole[0, 0], whole[0, 1], dim=0) < .999               # there is something to compare
