"Nothing heavy is loaded before it is needed."

import subprocess
import sys

import pytest

HEAVY = "torch", "transformers", "scanpy", "anndata", "sklearn", "datasets", "matplotlib"


@pytest.mark.parametrize("what", ["mix_geneformer", "mix_geneformer.cli"])
def test_importing_loads_nothing_heavy(what):
    "A command answers --help, and the package is imported, at once"
    code = f"import sys, {what}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_name_that_a_room_has_not():
    from mix_geneformer.rooms import Room

    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        Room("files").nothing_of_the_kind
