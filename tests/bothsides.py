"Hand-made cells of both species."

from conftest import toy

from mix_geneformer.cells.counts import read_counts

def sides(n=80, genes=40):
    "Both species' cells, as `read_counts` gives them"
    return [read_counts(toy(s, n, genes, seed), verbose=False) for seed, s in enumerate(("human", "mouse"))]
