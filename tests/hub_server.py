"""A stand-in for the Hugging Face hub: what its client asks over HTTP, answered from memory.

Repositories are made, files declared (large ones by LFS), sent and committed to branches; trees are
listed, files resolved. It speaks no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
USER = "pearl"
Tree = dict[str, bytes]


@dataclass
class Repository:
    """Files by branch; every commit's tree stays reachable by its hash."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        about = f"{len(self.commits)} {branch} {sorted(tree)}"
        sha = hashlib.sha1(about.encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    def tree(self, revision: str = "main") -> Tree:
        return self.commits[self.branches[revision]]


@dataclass
class Hub:
    """What the stand-in holds; `sent` counts how often each large file's bytes came in."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    refuse: int = 0  # a status that every commit is answered with


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        assert found, path
        repository = self.hub.repositories.get(found[1])
        if repository is None:
            return self._missing("RepoNotFound")
        if found[2] == "branch":
            if found[3] in repository.branches:
                return self._answer({"error": "exists"}, 409)
            repository.branches[found[3]] = repository.branches["main"]
            return self._answer({})
        if found[2] == "preupload":
            return self._preupload(repository.tree(found[3]), json.loads(body)["files"])
        return self._commit(found[1], repository, found[3], body)

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.hub.sent[oid] += 1
        self._answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?"
        if found := re.fullmatch(api, path):
            name, what, revision = found[1], found[2], found[3] or "main"
        else:
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not found:
                return self._missing("RepoNotFound")
            name, what, revision = found[1], "resolve", found[2]
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private
        if repository is None or (
            hidden and self.headers.get("authorization") != f"Bearer {TOKEN}"
        ):
            return self._missing("RepoNotFound", 401)
        sha = repository.find(revision)
        if sha is None:
            return self._missing("RevisionNotFound")
        tree = repository.commits[sha]
        if what == "tree":
            below = f"{found[4]}/" if found[4] else ""
            inside = [_entry(file, tree[file]) for file in tree if file.startswith(below)]
            return self._answer(inside) if inside else self._missing("EntryNotFound")
        if what == "resolve":
            return self._file(tree.get(found[3]), sha)
        about = {"id": name, "modelId": name, "sha": sha, "private": repository.private}
        return self._answer(about | {"siblings": [{"rfilename": file} for file in tree]})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        about = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "0"}
        if not name.startswith(f"{USER}/"):
            return self._answer({"error": "You don't have the rights"}, 403)
        if name in self.hub.repositories:
            return self._answer({**about, "error": "You already created this model repo"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = self.hub.repositories[name] = Repository(private)
        repository.commit("main", {".gitattributes": b""})
        return self._answer(about)

    def _preupload(self, tree: Tree, files: list[dict[str, Any]]) -> None:
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], tree[file["path"]]) if file["path"] in tree else None,
            }
            for file in files
        ]
        self._answer({"files": answers})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}
            known = each["oid"] in self.hub.large
            objects.append({**each, **({} if known else {"actions": upload})})
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        if self.hub.refuse:
            return self._answer({"error": "the hub is being mended"}, self.hub.refuse)
        tree = dict(repository.tree(branch))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        sha = repository.commit(branch, tree)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        return self._answer({"success": True, "commitOid": sha, "commitUrl": url})

    def _file(self, content: bytes | None, sha: str) -> None:
        if content is None:
            return self._missing("EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self._end(content)

    def _missing(self, code: str, status: int = 404) -> None:
        self._answer({"error": code}, status, {"X-Error-Code": code})

    def _answer(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self._end(json.dumps(data).encode())

    def _end(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = iter(lambda: self.rfile.read(int(self.rfile.readline(), 16) + 2)[:-2], b"")
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _oid(path: str, content: bytes) -> str:
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if _is_large(path):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a stand-in on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
