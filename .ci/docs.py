#!/usr/bin/env python3
"""Build the site into _docs and check its links: with Quarto where it is installed, with smalldocs where it is not.

nbdev_docs does the same with Quarto, and also rewrites README.md with it, which `make readme` makes here."""

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent


def build():
    "Process the notebooks into _proc, render them, and move the site to _docs; returns its folder"
    os.chdir(ROOT)
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    cfg = get_config()
    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    refresh_quarto_yml()
    proc = proc_nbs(n_workers=2)
    shutil.copytree(
        ROOT / "nbs",
        proc,
        dirs_exist_ok=True,
        ignore=lambda d, names: [n for n in names if n.endswith(".ipynb") or n.startswith(".")],
    )
    if shutil.which("quarto"):
        cmd, cwd = ["quarto", "render", "--no-cache"], proc
    else:
        cmd, cwd = [str(Path(sys.executable).parent / "smalldocs"), "render", str(proc)], ROOT
    subprocess.run(cmd, cwd=cwd, check=True)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(proc / cfg.doc_path.name, cfg.doc_path)
    return cfg.doc_path


class Page(HTMLParser):
    "The ids of a page, and what it links to"

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if not v:
                continue
            if k == "id" or (k == "name" and tag == "a"):
                self.ids.add(v)
            elif k in ("href", "src"):
                self.links.append(v)
            elif k == "srcset":
                self.links += [o.split()[0] for o in v.split(",") if o.strip()]


def broken(site):
    "One line for each local link of the pages of `site` that leads nowhere"
    site, pages, out = Path(site).resolve(), {}, []
    for f in site.rglob("*.html"):
        if "site_libs" not in f.parts:
            pages[f] = Page(f)
    for f, page in sorted(pages.items()):
        for link in dict.fromkeys(page.links):
            u = urlsplit(link)
            if u.scheme or u.netloc:
                continue
            to = (
                (site / u.path.lstrip("/") if u.path.startswith("/") else f.parent / unquote(u.path)).resolve()
                if u.path
                else f
            )
            if to.is_dir():
                to /= "index.html"
            where = f.relative_to(site)
            if not to.is_relative_to(site):
                out.append(f"{where}: {link} leaves the site")
            elif not to.is_file():
                out.append(f"{where}: {link} does not exist")
            elif u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids | {"", "top"}:
                out.append(f"{where}: {link} has no such heading")
    return out, len(pages)


if __name__ == "__main__":
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else build()
    lines, n = broken(site)
    if not n:
        sys.exit(f"{site} holds no page")
    if lines:
        sys.exit("\n".join([f"{len(lines)} broken links in {n} pages:", *lines]))
    print(
        f"{n} pages in {site.relative_to(ROOT) if site.is_relative_to(ROOT) else site}, every local link leads "
        "somewhere"
    )
