"""A reverse proxy as a program, as small as one can be: it serves a server below /lab/rl.

    python tests/server/prefix_proxy.py HOST:PORT told     cuts the path off and says so in X-Forwarded-Prefix
    python tests/server/prefix_proxy.py HOST:PORT kept     leaves the path as it came

Prints the port that it listens on.
"""

import http.client
import http.server
import sys

PREFIX = "/lab/rl"
UPSTREAM, MODE = sys.argv[1:]
PER_CONNECTION = ("connection", "transfer-encoding", "content-length", "x-forwarded-prefix")


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path
        headers = {name: value for name, value in self.headers.items() if name.lower() not in PER_CONNECTION}
        headers["X-Forwarded-For"] = "203.0.113.9"
        if MODE == "told":
            path = path.removeprefix(PREFIX) or "/"
            headers["X-Forwarded-Prefix"] = PREFIX
        length = int(self.headers.get("Content-Length", 0))
        upstream = http.client.HTTPConnection(UPSTREAM)
        upstream.request(self.command, path, self.rfile.read(length) if length else None, headers)
        response = upstream.getresponse()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in PER_CONNECTION:
                self.send_header(name, value)
        self.end_headers()
        # piece by piece, so that event streams pass
        while piece := response.read1(65_536):
            self.wfile.write(piece)
            self.wfile.flush()
        upstream.close()

    do_POST = do_DELETE = do_GET  # noqa: N815 (the names that the library looks for)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        print(f"port {server.server_port}", flush=True)
        server.serve_forever()
