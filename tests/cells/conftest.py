"Real cells and files of toy cells, for the tests of the cells."

import pytest
from conftest import DATA

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.vocabulary import Vocabulary

@pytest.fixture
def paths(both, tmp_path):
    for a, n in zip(both, ("human", "mouse")):
        a.write_h5ad(tmp_path / f"{n}.h5ad")
    return [tmp_path / "human.h5ad", tmp_path / "mouse.h5ad"]


@pytest.fixture(scope="module")
def read(pancreas_counts):
    return pancreas_counts


@pytest.fixture(scope="module")
def pancreas_vocab(pancreas):
    return Vocabulary.build(pancreas)


@pytest.fixture(scope="module")
def sentences(read, pancreas_vocab):
    return {s: encode_cells(a, pancreas_vocab) for s, a in read.items()}


@pytest.fixture
def shared(request):
    path = DATA / f"{request.param}.h5ad"
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    return path
