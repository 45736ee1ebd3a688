"What ran where."
import numpy as np

from mix_geneformer.paper.machine import describe_run, run_info

def test_the_run_is_described_in_one_sentence():
    info = run_info()
    assert info["mix_geneformer"] and info["python"].count(".") == 2 and info["versions"]["numpy"] == np.__version__
    text = describe_run({**info, "commit": None}, minutes=2, cells=1, seed=0)
    assert text.startswith("Run on ") and "in 2.0 minutes: 1 cell, seed 0; mix-geneformer" in text
    assert text.endswith(".") and "\n" not in text
