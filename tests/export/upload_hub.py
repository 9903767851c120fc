"""A local server with as much of the Hugging Face Hub's protocol as uploading a model folder needs.

Creating a repository, asking how each file travels, small files inside the commit and large ones as LFS objects by a
PUT elsewhere. Nothing of it was recorded, and no real Hub was reached. The client library is the real one.
"""

import base64
import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from local_server import running

TOKEN = "hf_secret"
LARGE = 20_000


@dataclass
class UploadHub:
    """What was created and committed.

    Attributes:
        private: repository -> whether it was made private.
        files: repository -> path -> bytes.
        objects: sha256 -> bytes, of files that came by LFS.
        asked: requests, in order.
        refuse: answer every request with 403.
    """

    private: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    refuse: bool = False
    endpoint: str = ""

    def answer(self, method, path, body, token):
        """(status, JSON or None) of a request."""
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if self.refuse or token != f"Bearer {TOKEN}":
            return 403, {"error": "You have no right to write here"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.private[name], self.files[name] = asked.get("private") or asked.get("visibility") == "private", {}
            return 200, {"url": f"{self.endpoint}/{name}", "id": "1", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        name, _, verb = path.removeprefix("/api/models/").partition("/preupload/")
        if verb:
            sizes = {f["path"]: f["size"] for f in json.loads(body)["files"]}
            modes = [
                {"path": p, "uploadMode": "lfs" if n > LARGE else "regular", "shouldIgnore": False}
                for p, n in sizes.items()
            ]
            return 200, {"files": modes}
        name, _, verb = path.removeprefix("/api/models/").partition("/commit/")
        if verb:
            for line in body.splitlines():
                self._commit(self.files[name], json.loads(line))
            commit = {"commitUrl": f"{self.endpoint}/{name}/commit/abc", "commitOid": "a" * 40, "pullRequestUrl": None}
            return 200, commit
        return 404, {"error": f"nothing at {path}"}

    def _batch(self, asked):
        found = []
        for wanted in asked["objects"]:
            upload = {"href": f"{self.endpoint}/objects/{wanted['oid']}", "header": {}}
            found.append({**wanted, "authenticated": True, "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": found}

    def _commit(self, files, line):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            data = self.objects[value["oid"]]
            assert hashlib.sha256(data).hexdigest() == value["oid"]
            files[value["path"]] = data


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def _body(self):
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def reply(self):
            status, answer = hub.answer(self.command, self.path, self._body(), self.headers["Authorization"])
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = reply

    return Handler


@contextlib.contextmanager
def serving():
    """A running `UploadHub`; its `endpoint` names it to the client library."""
    hub = UploadHub()
    with running(_handler(hub)) as hub.endpoint:
        yield hub
