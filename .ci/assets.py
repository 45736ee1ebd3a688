#!/usr/bin/env python3
"""Before the site is rendered, bring figures/ and tables/ into the rendered folder and point its notebooks there.

A notebook in nbs/ shows ../figures/x.png, which Jupyter and GitHub find; the site's root is nbs/, so there it is
figures/x.png. Links to other files of the repository go to the repository. Runs as the `pre-render` step of Quarto
and of smalldocs, in the project folder (_proc), with the standard library alone."""

import json
import os
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("figures", "tables")


def repository():
    "Where a file of the repository is on the web"
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{cfg['DEFAULT']['git_url']}/blob/{cfg['DEFAULT']['branch']}/"


def relink(text, depth, web):
    "Links that leave nbs/ from a notebook `depth` folders inside it"
    up = "../" * depth

    def fix(m):
        pre, href = m.groups()
        if not href.startswith(up + "../"):
            return m.group(0)
        href = href[len(up) + 3 :]
        return pre + (up + href if href.split("/")[0] in SHOWN else web + href)

    return re.sub(r"""(\]\(|(?:src|href)=\\?["'])([^)"'\\\s]+)""", fix, text)


def unlink_code(text):
    "nbdev links names in backticks inside a signature's comments too, where a link is not rendered: back to the name"
    fenced = re.split(r"(^```.*?^```)", text, flags=re.S | re.M)
    return "".join(re.sub(r"\[`([^`]+)`\]\([^)]*\)", r"\1", o) if o.startswith("```") else o for o in fenced)


def walk(node, fix):
    "`fix` every string of a JSON value, the lines of a cell or an output as one"
    if isinstance(node, str):
        return fix(node)
    if isinstance(node, list):
        return [walk(o, fix) for o in node]
    if not isinstance(node, dict):
        return node
    whole = lambda v: "".join(v) if isinstance(v, list) and all(isinstance(o, str) for o in v) else v
    return {
        k: v
        if k.startswith("image/")
        else walk(whole(v) if k in ("source", "text") or k.startswith("text/") else v, fix)
        for k, v in node.items()
    }


def main(site=Path(".")):
    for name in SHOWN:
        shutil.rmtree(site / name, ignore_errors=True)
        # those would become pages
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("*.md"))
    web = repository()
    for nb in site.rglob("*.ipynb"):
        depth = len(nb.relative_to(site).parts) - 1
        old = json.loads(nb.read_text(encoding="utf-8"))
        new = walk(old, lambda s: unlink_code(relink(s, depth, web)))
        if new != old:
            nb.write_text(json.dumps(new, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(os.environ.get("QUARTO_PROJECT_DIR") or "."))
