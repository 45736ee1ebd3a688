"A hub of the tests: files of repositories over http on this machine, as much of the hub's interface as is used."
import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    "Serves `server.repos`, {repository: {path: bytes}}; keeps the paths that were asked for, and what was pushed."
    def log_message(self, *a): pass

    def answer(self, body=b"", status=200, **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.send_response(status)
        for name, value in {"Content_Length": len(body), "X_Repo_Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def missing(self): self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def do_GET(self):
        path, repos = self.path.split("?")[0], self.server.repos
        self.server.asked.append(path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if info and info[1] in repos:
            siblings = [dict(rfilename=name) for name in repos[info[1]]]
            self.answer(dict(id=info[1], modelId=info[1], sha=self.commit(info[2]), siblings=siblings, private=False,
                             tags=[]), Content_Type="application/json")
        elif tree and tree[1] in repos:
            found = [dict(type="file", path=name, size=len(x), oid=hashlib.sha1(x).hexdigest())
                     for name, x in repos[tree[1]].items()]
            self.answer(found, Content_Type="application/json")
        elif file and file[3] in repos.get(file[1], {}):
            x = repos[file[1]][file[3]]
            self.answer(x, ETag=f'"{hashlib.sha256(x).hexdigest()}"', X_Repo_Commit=self.commit(file[2]))
        else: self.missing()

    do_HEAD = do_GET

    def commit(self, revision): return COMMIT if revision in (None, "main") else revision

    def do_POST(self):
        said = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.path == "/api/repos/create":
            asked = json.loads(said)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            self.server.repos.setdefault(name, {})
            self.answer(dict(url=f"http://{self.headers['Host']}/{name}", id=name), Content_Type="application/json")
        elif self.path == "/api/validate-yaml":
            self.answer(dict(errors=[], warnings=[]), Content_Type="application/json")
        elif "/preupload/" in self.path:
            files = [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(said)["files"]]
            self.answer(dict(files=files), Content_Type="application/json")
        elif "/commit/" in self.path:
            name = re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path)[1]
            for line in map(json.loads, said.splitlines()):
                if line["key"] != "file": continue
                self.server.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(dict(commitUrl=f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", commitOid=COMMIT,
                             hookOutput="", success=True), Content_Type="application/json")
        else: self.missing()


@contextmanager
def hub(**repos):
    "A hub that holds some repositories: its address, and what it was asked for and holds"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked = repos, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", server
    finally: server.shutdown(), server.server_close()
