#!/usr/bin/env bash
# Packages: fsspec 2026.9.0 with aiohttp 3.14.5, Python 3.10 or later.
#
# A loader over a thousand shards behind a web server asks first whether they are there and how large
# they are. One would expect `exists` and `isfile` to cost what `info` does, one HEAD without a body,
# and a server that is down to be told from a file that is not there.
#
# What happens: `exists` and `isfile` send a plain GET and go away once the headers have come, so that
# the server begins to send the file, megabytes of it for each call, as far as the buffers of both
# ends reach. And a connection that is refused becomes FileNotFoundError in `info` and `open` and False
# in `exists`, the same as for a file that is missing: "skip what is not there" then skips a whole
# dataset for a network that was down for a moment.
#
# Seen, of a file of 64 MB on the same machine: `info` HEAD, 0 bytes; `exists` and `isfile` GET, up to
# 3.9 MB each, less where the machine is busy with other things.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fsspec==2026.9.0 aiohttp==3.14.5
cat > "$folder/show.py" <<'EOF'
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec

SIZE, BLOCK = 64 << 20, bytes(1 << 16)
calls = []


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        calls.append(["HEAD", 0])
        self.headers_of_file()

    def do_GET(self):
        call = ["GET", 0]
        calls.append(call)
        self.headers_of_file()
        try:
            while call[1] < SIZE:
                self.wfile.write(BLOCK)
                call[1] += len(BLOCK)
        except OSError:  # the client has gone
            pass

    def headers_of_file(self):
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/shard"
system = fsspec.filesystem("http")
sent = {}
for name in ("info", "exists", "isfile"):
    calls.clear()
    getattr(system, name)(url)
    time.sleep(2)
    sent[name] = list(calls)
    print(name, calls)

with socket.socket() as free:  # a port where nobody listens
    free.bind(("127.0.0.1", 0))
    closed = f"http://127.0.0.1:{free.getsockname()[1]}/shard"
errors = {}
for name in ("info", "open"):
    try:
        getattr(system, name)(closed)
    except Exception as error:
        errors[name] = type(error).__name__
is_there = system.exists(closed)
print("a refused connection:", errors, "exists:", is_there)
as_described = (
    [method for method, _ in sent["info"]] == ["HEAD"]
    and all(sent[n][0][0] == "GET" and sent[n][0][1] > 0 for n in ("exists", "isfile"))
    and list(errors.values()) == ["FileNotFoundError"] * 2
    and is_there is False
)
raise SystemExit(0 if as_described else "the behavior has changed")
EOF
"$folder/venv/bin/python" "$folder/show.py"
