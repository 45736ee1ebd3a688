"Tokenising on a Dask cluster of two workers, one of which is killed: the corpus of one process, byte by byte."

import os
import signal
import threading
import time

import pytest
from conftest import files_under, toy

from mix_geneformer.cells.tokenizer import tokenize

distributed = pytest.importorskip("distributed", reason="pip install 'mix-geneformer[cluster]' brings it")


def content(folder):
    return {name: (folder/name).read_bytes() for name in files_under(folder) if name.endswith(".arrow")}


def test_a_killed_worker_loses_nothing(vocab, tmp_path):
    paths = [tmp_path/f"{i}.h5ad" for i in range(8)]
    for i, path in enumerate(paths):
        toy(n=40, seed=i).write_h5ad(path)
    tokenize(paths, vocab, tmp_path/"plain", progress=False)
    with (distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
          distributed.Client(cluster) as client):
        first, second = client.run(os.getpid).values()
        assert first != second
        busy = client.map(time.sleep, [2] * 2, pure=False)  # so that shards wait for both workers when one is killed
        killer = threading.Timer(1, os.kill, (first, signal.SIGKILL))
        killer.start()
        tokenize(paths, vocab, tmp_path/"mapped", client=client, progress=False)
        client.gather(busy), killer.join()
        assert first not in client.run(os.getpid).values()
    assert content(tmp_path/"mapped") == content(tmp_path/"plain") and len(content(tmp_path/"plain")) == 8

