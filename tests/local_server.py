"""A small HTTP server of this machine, for tests that talk to a service's protocol."""

import contextlib
import threading
from http.server import ThreadingHTTPServer


@contextlib.contextmanager
def running(handler):
    """The address of a server that answers with this handler, as long as it is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
