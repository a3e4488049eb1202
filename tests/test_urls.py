from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nacre import tokenizer as tokenizers
from nacre.data import check, files, read, tokenize
from nacre.errors import ConfigError, DataError

ROWS = ["one\n", "два", "三\r\n"]
JSONL = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()


def texts(*sources: str) -> list[str]:
    return [document.text for document in read(sources)]


def message(*sources: str, kind: type = DataError) -> str:
    with pytest.raises(kind) as caught:
        texts(*sources)
    return str(caught.value)


def parquet(rows: list[str], **options: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": rows, "n": range(len(rows))}), file, **options)  # type: ignore[arg-type]
    return file.getvalue()


# --- memory://, a store with folders


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_files_folders_and_globs(store):
    store.pipe(
        {
            "/b/text/2.jsonl.zst": zstandard.compress(JSONL),
            "/b/text/1.jsonl.gz": gzip.compress(JSONL),
            "/b/text/deep/3.parquet": parquet(ROWS),
            "/b/text/deep/.x.txt": b"hidden",
            "/b/text/.y/x.txt": b"hidden",
            "/b/text/notes.md": b"left out",
            "/b/4.TXT": b"four",
        }
    )
    assert texts("memory://b/4.TXT") == ["four"]
    assert texts("memory://b/text") == texts("memory://b/text/") == ROWS * 3
    assert texts("memory://b/text/*.jsonl.*", "memory://b/4.TXT") == [*ROWS * 2, "four"]
    assert texts("memory://b/**/*.parquet") == ROWS
    found = check(["memory://b/text", "memory://b/4.TXT"])
    names = ["text/1.jsonl.gz", "text/2.jsonl.zst", "text/deep/3.parquet", "4.TXT"]
    assert [file.name for file in found.files] == [f"memory:///b/{name}" for name in names]
    assert found.total_bytes == sum(store.size(f"/b/{name}") for name in names)
    assert next(read(["memory://b/text"])).source == "memory:///b/text/1.jsonl.gz, line 1"


def test_what_is_not_there(store):
    store.pipe("/b/a.md", b"x")
    store.pipe("/b/empty.txt", b"")
    store.pipe("/b/bad.jsonl", b"no json\n")
    store.pipe("/b/bad.parquet", b"PAR1 and then nothing")
    assert message("memory://b/c.txt") == "memory://b/c.txt: there is no such file or folder"
    assert "memory:///b/a.md: unknown extension '.md'; nacre reads" in message("memory://b/a.md")
    store.pipe("/c/a.md", b"x")
    assert "memory://c: the folder has no file that nacre reads" in message("memory://c")
    assert "the pattern has no file that nacre reads; 1 files have other extensions" in message(
        "memory://b/*.md"
    )
    assert "memory:///b/empty.txt: the file is empty" in message("memory://b/empty.txt")
    assert "memory:///b/bad.jsonl, line 1: it is no JSON" in message("memory://b/bad.jsonl")
    assert "memory:///b/bad.parquet: the parquet file is damaged" in message(
        "memory://b/bad.parquet"
    )


def test_kinds_of_urls_that_cannot_be_read(monkeypatch):
    assert message("htps://host/a.txt") == (
        "htps://host/a.txt: there are no htps:// URLs (did you mean 'https'?)"
    )
    assert "there are no odd:// URLs (nacre reads s3://, gs://" in message("odd://host/a.txt")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    found = message("s3://bucket/text/*.jsonl.zst", kind=ConfigError)
    assert found == "data: s3://bucket/text/*.jsonl.zst needs the package s3fs (pip install s3fs)"


def test_file_urls_are_paths(tmp_path):
    (tmp_path / "a.txt").write_text("here")
    assert texts(f"file://{tmp_path}/a.txt") == texts(f"file://{tmp_path}") == ["here"]


def test_a_store_is_used_again_until_the_remote_file_changes(store, tmp_path):
    tokenizer = tokenizers.build([row * 9 for row in ROWS], 512)
    store.pipe("/a.jsonl", JSONL)

    def made() -> bool:
        before = (tmp_path / "out").stat().st_ino if (tmp_path / "out").exists() else None
        tokenize(["memory://a.jsonl"], tokenizer, tmp_path / "out")
        return (tmp_path / "out").stat().st_ino != before

    assert [made(), made()] == [True, False]
    store.pipe("/a.jsonl", JSONL)
    assert made()
    assert "memory:///a.jsonl" in (tmp_path / "out" / "store.json").read_text()


# --- http://, a server whose connections break


class Server:
    """Serves `content` on a loopback port; `cuts` says after how many bytes each answer breaks."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.cuts: Iterator[int | None] = itertools.repeat(None)
        self.status: int | None = None
        self.says_length = True
        self.tag = "first"
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                server.requests += body
                data = server.content.get(self.path)
                if server.status or data is None:
                    self.send_error(server.status or 404)
                    return
                wanted = self.headers.get("Range")
                if wanted:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    data = data[int(first) : int(last or len(data)) + 1]
                self.send_response(206 if wanted else 200)
                self.send_header("ETag", server.tag)
                if server.says_length:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    with contextlib.suppress(OSError):
                        self.wfile.write(data[: next(server.cuts)])
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(files, "_PAUSES", (0, 0, 0))
    monkeypatch.setattr(files, "_AHEAD", 1000)
    started = Server()
    yield started
    started.http.shutdown()
    started.http.server_close()


def test_the_web(server):
    server.content = {"/a.jsonl.zst": zstandard.compress(JSONL), "/b.parquet": parquet(ROWS)}
    assert texts(f"{server.url}/a.jsonl.zst", f"{server.url}/b.parquet") == ROWS * 2
    server.content["/a.jsonl?part=1&x=.md"] = JSONL
    assert texts(f"{server.url}/a.jsonl?part=1&x=.md") == ROWS
    server.content["/"] = b'<a href="/b.parquet">b</a> <a href="/a.jsonl.zst">a</a>'
    assert texts(f"{server.url}/*.parquet") == ROWS


def test_a_broken_connection_is_taken_up_again(server, caplog):
    whole = "".join(f"line {number}\n" for number in range(2000))
    server.content = {"/a.txt": whole.encode(), "/b.parquet": parquet([whole, *ROWS] * 5)}
    server.cuts = itertools.cycle([300, None, 0, 999, None])
    with caplog.at_level(logging.WARNING, "nacre"):
        assert texts(f"{server.url}/a.txt") == [whole]
        assert texts(f"{server.url}/b.parquet") == [whole, *ROWS] * 5
    assert "a.txt: " in caplog.text
    assert "at byte 0; trying again in 0 s" in caplog.text


def test_a_server_that_stays_away(server):
    server.content = {"/a.txt": b"x" * 5000}
    url = f"{server.url}/a.txt"
    server.cuts = itertools.repeat(10)
    assert f"{url}: cannot be read (" in message(url)
    assert server.requests == 4
    server.status = 403
    assert f"{url}: cannot be read (403, message='Forbidden'" in message(url)
    server.status, server.content = None, {}
    assert f"{url}: cannot be read (404, message='Not Found'" in message(url)
    server.http.shutdown()
    server.http.server_close()
    assert f"{url}: cannot be read (Cannot connect to host" in message(url)
    assert "check the address, the network and the credentials" in message(url)


def test_a_file_that_changes_while_it_is_read(server):
    server.content = {"/a.jsonl": JSONL * 100}
    server.cuts = iter([10, None])
    documents = read([f"{server.url}/a.jsonl"])
    server.tag = "second"
    with pytest.raises(DataError, match=r"a\.jsonl: it was changed while it was read"):
        list(documents)


def test_a_server_that_does_not_say_the_length(server):
    server.says_length = False
    server.content = {"/a.jsonl": JSONL, "/b.parquet": parquet(ROWS)}
    assert texts(f"{server.url}/a.jsonl") == ROWS
    assert check([f"{server.url}/a.jsonl"]).total_bytes is None
    assert "b.parquet: the server does not say how long it is, which parquet needs" in message(
        f"{server.url}/b.parquet"
    )
