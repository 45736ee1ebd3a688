"""Whatever comes in, whole or damaged, is read as a plain reader reads it or refused in one sentence: no other error,
no other numbers. A hundred inputs here; thousands with `pytest -m slow tests/test_inputs.py`."""
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import toy
from fuzzed import CONTAINERS, DAMAGES, EASE, ON_DISK, SPELLS_TEXT, cells, made, plainly, right
from handmade import tenx_folder
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from mix_geneformer.cells.counts import read_counts
from mix_geneformer.files import InputError

FEW, MANY = 50, 1500   # of either test below
# what fails is small as it is drawn; making it smaller takes minutes
QUICKLY = dict(deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
               phases=[Phase.explicit, Phase.reuse, Phase.generate])


def one_of(kinds): return st.sampled_from([k for k in kinds for _ in range(EASE[k])])


def read(source, layer, species):
    "What is read, or the sentence of the refusal; every other exception is a failure"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read_counts(source, species, layer, verbose=False)
    except InputError as e:
        line = str(e)
        assert "\n" not in line and ": " in line and len(line) < 700, line
        return line


def as_written(c, got, table, totals):
    "The cells are those that were written: genes, counts, totals, names and the columns beside them"
    assert not isinstance(got, str), got
    assert got.obs_names.tolist() == c.obs.index.tolist(), got.obs_names.tolist()
    assert got.var_names.tolist() == table.columns.tolist(), got.var_names.tolist()
    np.testing.assert_array_equal(got.X.toarray(), table.to_numpy())
    np.testing.assert_array_equal(got.obs.n_counts, totals)
    exact = np.float32 if table.to_numpy().max() < 2**24 else np.float64
    assert set(got.obs.species) == {c.species} and got.X.dtype == exact and got.X.format == "csr"
    assert np.isclose(got.uns["mix_geneformer"]["share_of_counts"], table.to_numpy().sum()/totals.sum())


def whole(data):
    c, kind = data.draw(cells()), data.draw(one_of(CONTAINERS))
    note(f"{kind}: {c}")
    with tempfile.TemporaryDirectory() as folder:
        source, layer = made(c, kind, Path(folder))
        got, expected = read(source, layer, c.given), right(c)
        if kind in ("backed",): source.file.close()
        if expected is None:
            assert isinstance(got, str), got   # no gene, or not one count
            return
        as_written(c, got, *expected)
        if kind not in ("tenx_h5", "tenx_folder"): assert got.obs.donor.astype(str).tolist() == c.obs.donor.tolist()
        if kind not in SPELLS_TEXT + ("loom",):
            assert got.obs.age.tolist() == c.obs.age.tolist() and got.obs.cell_type.tolist() == c.obs.cell_type.tolist()


def damaged(data):
    c, kind = data.draw(cells()), data.draw(one_of(ON_DISK))
    how = data.draw(st.sampled_from(list(DAMAGES)))
    note(f"{how} {kind}: {c}")
    with tempfile.TemporaryDirectory() as folder:
        source, layer = made(c, kind, Path(folder))
        before = plainly(kind, source, layer)
        assert before is not None, "the plain reader does not read the whole file"
        DAMAGES[how](data.draw, source)
        got, after = read(source, layer, c.given), plainly(kind, source, layer)
        if isinstance(got, str): return
        # what a plain reader stumbles over is then not the counts: those are as they were
        x, names, genes = after or (before[0], got.obs_names, before[2])
        if genes != before[2]: return       # damaged names are names: of nobody, or of another gene
        c.x, c.obs = np.asarray(x), c.obs.set_axis(names)
        as_written(c, got, *right(c))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=FEW, **QUICKLY)
@given(st.data())
def test_whole(data): whole(data)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=FEW, **QUICKLY)
@given(st.data())
def test_damaged(data): damaged(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=MANY, derandomize=False, **QUICKLY)
@given(st.data())
def test_thousands_of_whole_ones(data): whole(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=MANY, derandomize=False, **QUICKLY)
@given(st.data())
def test_thousands_of_damaged_ones(data): damaged(data)


BAD = {np.nan: "NaN or infinite", np.inf: "NaN or infinite", -1.: "negative", .5: "not whole numbers"}


@pytest.mark.parametrize("kind", [k for k in CONTAINERS if not k.startswith("tenx_h5")])
@pytest.mark.parametrize("value", BAD)
@settings(max_examples=2, **QUICKLY)
@given(st.data())
def test_values_that_are_no_counts(kind, value, data):
    "One of them anywhere among the genes is refused"
    c = data.draw(cells(["float32", "float64"]).filter(lambda c: right(c) is not None))
    genes = np.flatnonzero(c.is_gene)
    c.x = c.x.astype(float)
    c.x[data.draw(st.integers(0, len(c.x)-1)), genes[data.draw(st.integers(0, len(genes)-1))]] = value
    with tempfile.TemporaryDirectory() as folder:
        got = read(*made(c, kind, Path(folder)), c.given)
        assert isinstance(got, str) and BAD[value] in got, got


ODD = dict(behind=lambda t: t[:-1]+b"~", zeros=lambda t: t[:-9]+bytes(9),
           within=lambda t: t.replace(b"\n2 ", b"\0002 "))


@pytest.mark.parametrize("damage", ODD.values(), ids=ODD)
def test_text_that_is_no_number_does_not_end_the_process(tmp_path, damage):
    "As scipy's reader does on such bytes"
    folder = tenx_folder(2)(toy(), tmp_path)
    (folder/"matrix.mtx").write_bytes(damage((folder/"matrix.mtx").read_bytes()))
    assert "matrix.mtx" in read(folder, None, None)


def test_a_damaged_layer_is_advised_to_nobody(tmp_path):
    "X holds no counts, and the layer that did cannot be read"
    a = toy()
    a.layers["counts"], a.X = a.X.copy(), a.X*0
    a.write_h5ad(tmp_path/"cells.h5ad", compression="gzip")
    with h5py.File(tmp_path/"cells.h5ad") as f: chunk = f["layers/counts/data"].id.get_chunk_info(0)
    data = bytearray((tmp_path/"cells.h5ad").read_bytes())
    data[chunk.byte_offset:chunk.byte_offset+chunk.size] = bytes(chunk.size)
    (tmp_path/"cells.h5ad").write_bytes(data)
    said = read(tmp_path/"cells.h5ad", None, None)
    assert "0 counts in 24 cells" in said and "pass raw counts" in said and "layer=" not in said
