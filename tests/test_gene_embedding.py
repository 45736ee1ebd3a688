"A gene's vector is that of its token, or the mean over its places in cells."
import numpy as np
import pytest
import torch
from conftest import refused, toy
from family import folder_of

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.gene_embedding import gene_vectors

@pytest.fixture(scope="module")
def loaded(tmp_path_factory): return load_model(folder_of("V2", tmp_path_factory.mktemp("V2")/"model"), "cpu")


def test_the_input_embedding(loaded):
    table = gene_vectors(loaded)
    assert list(table.obs.columns) == ["symbol", "ensembl_id", "species", "token"] and table.n_obs == 41
    weights = loaded.model.bert.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(table.X, weights[table.obs.token])
    refused(lambda: gene_vectors(loaded, species="mouse"), "0 mouse genes", "pass one of")


def test_the_mean_over_cells(loaded):
    cells = toy("human", n=5)
    here = gene_vectors(loaded, cells, progress=False)
    sentences, total, n = encode_cells(cells, loaded.vocab, loaded.context), {}, {}
    for i in range(5):
        ids = sentences[i].tolist()
        with torch.no_grad():
            h = loaded.model.bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0].double()
        for t, v in zip(ids, h): total[t], n[t] = total.get(t, 0)+v, n.get(t, 0)+1
    for row, token, held in zip(here.X, here.obs.token, here.obs.n_cells):
        assert held == n[token]
        np.testing.assert_allclose(row, total[token]/n[token], atol=1e-5)
    assert not {2, 3} & set(here.obs.token) and len(here) == len(total)-2
    refused(lambda: gene_vectors(loaded, cells, min_cells=99, progress=False), "at least 99 cells", "lower min_cells")
