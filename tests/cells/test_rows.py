"Every kind of file as rows that are read a stretch at a time."
import concurrent.futures

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import toy

from mix_geneformer.cells.rows import H5Rows

HOW = [dict(), dict(compression="gzip"), dict(compression="gzip", chunks=(7,)), dict(compression="gzip", shuffle=True),
       dict(compression="gzip", fletcher32=True), dict(compression="lzf"), dict(chunks=(11,))]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ">f8", np.uint16, bool])
def test_stretches_of_an_hdf5_matrix(tmp_path, how, dtype):
    x = toy(n=50).X.tocsr()
    expected = x.toarray().astype(dtype)
    with h5py.File(tmp_path/"x", "w") as f:
        f.create_dataset("X/data", data=x.data.astype(dtype), **how)
        for k in ("indices", "indptr"): f.create_dataset(f"X/{k}", data=getattr(x, k), **how)
        f["X"].attrs["shape"] = x.shape
        rows = H5Rows(f["X"])
        for a, b in ((0, 50), (0, 1), (13, 14), (7, 31), (49, 50), (20, 20)):
            got = rows[a:b]
            assert got.shape == (b - a, 40) and (got.toarray() == expected[a:b]).all()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda i: rows[i:i + 5], range(0, 50, 5)))
    assert (sp.vstack(parts).toarray() == expected).all()
