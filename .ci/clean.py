#!/usr/bin/env python3
"""Exit 1 when nbdev_export, nbdev_clean or the README step would change a file.

They run on a copy of the working tree, so that the check neither needs committed changes nor makes any."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(root):
    "Tracked and untracked files that git does not ignore, relative to `root`"
    out = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, capture_output=True, check=True
    ).stdout
    return sorted({p for p in out.decode().split("\0") if p and (root / p).is_file()})


def copy(root, dest):
    "Copy the working tree, as git sees it, to `dest`"
    for p in files(root):
        (dest / p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / p, dest / p)


def run(dest, *cmd):
    "Run `cmd` in `dest`, quietly unless it fails"
    cmd = (Path(sys.executable).parent / cmd[0], *cmd[1:])  # this environment's, activated or not
    r = subprocess.run(cmd, cwd=dest, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(dest)})
    if r.returncode:
        sys.exit(f"{' '.join(map(str, cmd))} failed:\n{r.stdout}{r.stderr}")


def content(root):
    return {
        p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }


def changes(root=ROOT):
    "The files that the three steps change, make or remove in a copy of `root`"
    with tempfile.TemporaryDirectory() as tmp:
        dest = Path(tmp).resolve()
        copy(root, dest)
        before = content(dest)
        run(dest, "nbdev_export")
        run(dest, "nbdev_clean")
        run(dest, sys.executable, ".ci/readme.py")
        after = content(dest)
    return sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))


if __name__ == "__main__":
    if changed := changes():
        sys.exit("not what `nbdev_export && nbdev_clean && make readme` leaves: " + ", ".join(changed))
    print("notebooks clean, library and README up to date")
