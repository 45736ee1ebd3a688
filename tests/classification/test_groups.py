"Groups come from a column, or from scanpy where igraph is there"
import numpy as np
import pytest
from conftest import refused, toy

from mix_geneformer.cells.counts import as_counts
from mix_geneformer.classification import groups

def test_without_igraph_it_is_said_what_is_missing(monkeypatch):
    monkeypatch.setattr(groups, "find_spec", lambda name: None)
    refused(lambda: groups.groups_of(as_counts(toy()), "leiden"), "1 package more", "pip install igraph")


def test_a_column_called_leiden_is_taken(monkeypatch):
    a = toy()
    a.obs["leiden"] = ["0", "1"]*12
    monkeypatch.setattr(groups, "_leiden", lambda counts: pytest.fail("clustered"))
    assert groups.groups_of(as_counts(a), "leiden").tolist() == ["0", "1"]*12
    assert groups.groups_of(as_counts(a), None) is None


def test_clusters_hold_like_cells():
    pytest.importorskip("igraph", reason="scanpy's leiden needs igraph")
    a = toy(n=60)
    found = groups.groups_of(as_counts(a), "leiden")
    pure = [np.unique(a.obs.cell_type[found == g]).size == 1 for g in np.unique(found)]
    assert np.mean(pure) > .5
