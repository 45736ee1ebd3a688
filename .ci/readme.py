#!/usr/bin/env python3
"""README.md from nbs/index.ipynb, with the outputs the notebook holds: no browser and no Quarto needed.

Links that start in nbs/ are moved to the top of the repository; `#| hide`, `#| echo` and `#| output` are obeyed."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\s*\|\s*([\w-]+):?[ \t]*(.*)\n?", re.M)


def directives(cell):
    return {k: v.strip() for k, v in DIRECTIVE.findall(cell.source)} if cell.cell_type == "code" else {}


def shown(cell):
    "The part of `cell` that its directives leave: None when nothing"
    d = directives(cell)
    if cell.cell_type == "raw" or "hide" in d or d.get("include") == "false":
        return None
    if cell.cell_type != "code":
        return cell
    cell.source = DIRECTIVE.sub("", cell.source)
    cell.metadata["transient"] = {
        "remove_source": "hide_input" in d or d.get("echo") == "false" or not cell.source.strip()
    }
    if d.get("output") == "false":
        cell.outputs = []
    for o in cell.outputs:  # tables as Markdown where the object offers it, and no second copy of them
        data = o.get("data", {})
        if any(k.startswith("image/") for k in data):
            sys.exit("index.ipynb holds a picture: save it under figures/ and show it with ![](../figures/...)")
        if "text/markdown" in data:
            o.data = {"text/markdown": data["text/markdown"]}
    return cell


def relink(text):
    "Links and pictures as seen from the top of the repository instead of nbs/"

    def fix(m):
        pre, href = m.groups()
        if re.match(r"[a-z]+:|#|/", href):
            return m.group(0)
        if href.startswith("../"):
            return pre + href[3:]
        if href.startswith(("figures/", "tables/")):
            return m.group(0)
        return pre + "nbs/" + href

    return re.sub(r"""(\]\(|(?:src|href)=["'])([^)"'\s]+)""", fix, text)


def readme(nb):
    "The Markdown of notebook `nb`"
    nb.cells = [c for c in map(shown, nb.cells) if c is not None]
    body, _ = MarkdownExporter().from_notebook_node(nb)
    # pandas' styles show as text on GitHub
    body = re.sub(r"<div>\s*<style scoped>.*?</style>", "<div>", body, flags=re.S)
    parts = re.split(r"(^```.*?^```[ \t]*$)", body, flags=re.S | re.M)  # code stays as it is
    body = "".join(p if p.startswith("```") else relink(p) for p in parts)
    body = "\n".join(line.rstrip() for line in body.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    src = ROOT / "nbs" / "index.ipynb"
    note = "<!-- made from nbs/index.ipynb by `make readme`: edit that -->\n\n"
    (ROOT / "README.md").write_text(note + readme(nbformat.read(src, 4)), encoding="utf-8")
