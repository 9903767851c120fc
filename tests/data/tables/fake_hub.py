"""A local server with the Hugging Face Hub's protocol, as far as reading datasets needs it.

What is simulated: ``/api/datasets/…`` (with ``/revision/…``) as JSON, and ``…/resolve/SHA/PATH`` with the headers that
`huggingface_hub` reads (ETag, X-Repo-Commit, Content-Length), files of more than `LARGE` bytes through a redirect to
another host name as for LFS (X-Linked-Etag, X-Linked-Size), refusals by X-Error-Code. Nothing of it was recorded, and
no real Hub was reached. The client library is the real one, end to end.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from local_server import running

LARGE = 5000


@dataclass
class Repo:
    """A dataset: revision -> commit, commit -> files.

    Attributes:
        commits: commit -> path -> bytes.
        branches: name -> commit.
        card: the card's metadata.
        access: "" for everybody; "gated", "private" or "disabled" for none without `TOKEN`.
    """

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    card: dict = field(default_factory=dict)
    access: str = ""


TOKEN = "hf_secret"


def commit_of(files):
    """A commit's hash, from its files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class FakeHub:
    """Repositories, what was asked for, and how many requests are answered with `status` (-1: all)."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cdn_tokens: list[str | None] = field(default_factory=list)
    status: int = 503
    failing: int = 0
    endpoint: str = ""

    def add(self, name, files, **more):
        """Add a repository, or a commit to its main branch; the commit's hash."""
        files = {path: data if isinstance(data, bytes) else data.encode() for path, data in files.items()}
        sha = commit_of(files)
        repo = self.repos.setdefault(name, Repo({}, {}, **more))
        repo.commits[sha] = files
        repo.branches["main"] = sha
        return sha

    def downloads(self):
        """Paths of files whose bytes were sent."""
        return [line.removeprefix("GET ") for line in self.asked if line.startswith("GET ") and "/api/" not in line]

    def answer(self, method, path, token):
        """(status, headers, body) of a request."""
        self.asked.append(f"{method} {path}")
        if self.failing:
            self.failing -= 1
            return self.status, {}, b""
        if path.startswith("/cdn/"):
            self.cdn_tokens.append(token)
            _, _, owner, name, sha, file = path.split("/", 5)
            return 200, {}, self.repos[f"{owner}/{name}"].commits[sha][file]
        head, _, rest = path.removeprefix("/api").removeprefix("/datasets/").partition("/")
        tail, _, rest = rest.partition("/")
        repo = self.repos.get(f"{head}/{tail}")
        if repo is None or (repo.access == "private" and token != f"Bearer {TOKEN}"):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if repo.access == "gated" and token != f"Bearer {TOKEN}" and "/api/" not in path:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repo.access == "disabled":
            return 403, {"X-Error-Message": "Access to this resource is disabled."}, b""
        _, _, rest = rest.partition("/")
        revision, _, file = rest.partition("/")
        revision = unquote(revision) or "main"
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path.startswith("/api/"):
            return 200, {"Content-Type": "application/json"}, self.info(f"{head}/{tail}", repo, sha)
        return self.file(f"{head}/{tail}", repo, sha, unquote(file))

    def info(self, name, repo, sha):
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        told = {"id": name, "sha": sha, "siblings": siblings, "cardData": repo.card, "tags": [], "private": False}
        return json.dumps(told | {"downloads": 0, "likes": 0, "gated": False}).encode()

    def file(self, name, repo, sha, path):
        if path not in repo.commits[sha]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b""
        data = repo.commits[sha][path]
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}
        if len(data) <= LARGE:
            return 200, headers, data
        elsewhere = self.endpoint.replace("127.0.0.1", "localhost")
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        return 302, headers | linked | {"Location": f"{elsewhere}/cdn/{name}/{sha}/{path}"}, b""


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self):
            status, headers, body = hub.answer(self.command, urlsplit(self.path).path, self.headers["Authorization"])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = reply

    return Handler


@contextlib.contextmanager
def serving():
    """A running `FakeHub`; its `endpoint` names it to the client library."""
    hub = FakeHub()
    with running(_handler(hub)) as hub.endpoint:
        yield hub
