"A download that was cut off goes on; a file that was changed is noticed."
import functools
import http.server
import threading

import pytest

from mix_geneformer.cells.downloads import download
from mix_geneformer.files import InputError

class Ranges(http.server.BaseHTTPRequestHandler):
    "Serves `body`, from an offset where asked; the first answer is cut off in the middle."
    body, cut = bytes(range(256))*4000, True
    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        end = len(self.body)//2 if type(self).cut else len(self.body)
        type(self).cut = False
        self.wfile.write(self.body[start:end])
    def log_message(self, *args): pass


def test_a_cut_off_download_goes_on(tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fetch = functools.partial(download, f"http://127.0.0.1:{server.server_port}/x", tmp_path/"x", progress=False)
    with pytest.raises(InputError, match="call again, it goes on from there"): fetch()
    assert 0 < (tmp_path/"x.partial").stat().st_size < len(Ranges.body) and not (tmp_path/"x").exists()
    assert fetch().read_bytes() == Ranges.body
    (tmp_path/"x").write_bytes(b"changed")
    with pytest.raises(InputError, match="it is cut off or was changed"): fetch()
    server.shutdown()
