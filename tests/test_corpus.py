from __future__ import annotations

import gzip
import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nacre import tokenizer
from nacre.data import corpus, embedded, hub, sample
from nacre.errors import ConfigError, DataError

TEXT = "First line.\r\nSecond: naïve 🦋\n\n  last\r"
ROWS = ["one\n", "два", "三\r\n"]


def texts(*sources: object, errors: corpus.Errors = "strict") -> list[str]:
    return [document.text for document in corpus.read([str(s) for s in sources], errors=errors)]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def message(*sources: object, errors: corpus.Errors = "strict", kind: type = DataError) -> str:
    with pytest.raises(kind) as caught:
        texts(*sources, errors=errors)
    return str(caught.value)


# --- formats


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_txt_is_one_document_kept_as_it_is(tmp_path, suffix):
    data = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](TEXT.encode())
    path = tmp_path / f"a.TXT{suffix}"
    path.write_bytes(data)
    assert list(corpus.read([str(path)])) == [corpus.Document(TEXT, str(path))]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_is_a_document_a_line(tmp_path, suffix):
    lines = "\n".join(json.dumps({"text": row, "id": 1}) for row in [*ROWS, ""]).encode()
    data = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](b"\n" + lines)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data)
    assert texts(path) == ROWS
    assert next(corpus.read([str(path)])).source == f"{path}, line 2"


def test_parquet_is_a_document_a_row(tmp_path):
    for number, kind in enumerate((pa.string(), pa.large_string())):
        path = tmp_path / f"{number}.parquet"
        table = pa.table({"id": [1, 2, 3, 4], "text": pa.array([*ROWS, None], type=kind)})
        pq.write_table(table, path)
        assert texts(path) == ROWS


def test_several_frames_and_members_are_one_file(tmp_path):
    halves = TEXT.encode()[:20], TEXT.encode()[20:]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(map(zstandard.compress, halves)))
    (tmp_path / "a.txt.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    assert texts(tmp_path) == [TEXT, TEXT]


def test_lines_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("nacre.data.bytestream._BLOCK", 5)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": row} for row in ROWS])
    assert texts(path) == ROWS


def test_a_byte_order_mark_is_dropped_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfa\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\n')
    assert texts(tmp_path) == ["\ufeffa\ufeff", "b"]


def test_a_late_nul_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 9000 + "\0", encoding="utf-8")
    assert texts(tmp_path)[0].endswith("x\0")


# --- sources


def test_folders_are_read_recursively_and_sorted(tmp_path, caplog):
    for name in ("b.txt", "a/z.txt", "a/b/y.txt", ".hidden/x.txt", "a/.x.txt", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    with caplog.at_level(logging.INFO, "nacre"):
        assert texts(tmp_path) == ["a/b/y.txt", "a/z.txt", "b.txt"]
    assert "1 files are left out" in caplog.text


def test_globs_and_several_sources_in_order(tmp_path):
    for name in ("2.txt", "1.txt", "3.md", "sub/4.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name, encoding="utf-8")
    assert texts(tmp_path / "*") == ["1.txt", "2.txt"]
    assert texts(tmp_path / "**/*.txt") == ["1.txt", "2.txt", "sub/4.txt"]
    assert texts(tmp_path / "2.txt", tmp_path / "?.txt") == ["2.txt", "1.txt", "2.txt"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("plain", encoding="utf-8")
    assert texts(tmp_path / "a[1].txt") == ["plain"]


def test_check_counts_without_reading(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    inventory = corpus.check([str(tmp_path)])
    assert [file.name for file in inventory.files] == [str(tmp_path / "a.txt")]
    assert inventory.total_bytes == 2
    assert corpus.check(["hf:anything"]).total_bytes is None


def test_the_default_corpus():
    documents = list(corpus.read(["default"]))
    size = sum(len(document.text.encode()) for document in documents)
    assert 1_000_000 < size < embedded._LIMIT
    assert abs(size - corpus.check(["default"]).total_bytes) < 0.25 * size  # type: ignore[operator]
    assert len({document.source for document in documents}) == len(documents) > 200
    by_source = {document.source: document.text for document in documents}
    assert "Lightweight XML" in by_source["default:module xml.etree.ElementTree"]
    assert '"with" statement' in by_source["default:topic with"]
    assert not any(".test" in source or "idlelib" in source for source in by_source)
    assert all(document.text.endswith("\n") for document in documents)


def test_the_default_corpus_is_the_same_in_another_process():
    code = (
        "import hashlib; from nacre.data import embedded as e;"
        "print(hashlib.sha256(repr(e.texts()).encode()).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": "src", "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == hashlib.sha256(repr(embedded.texts()).encode()).hexdigest()


def test_docstrings_are_found_in_order_without_importing(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module."""\nraise SystemExit\n'
        'if 1:\n  def f():\n    """Eff.\n\n    More:\n      indented\n    """\n'
        'class C:\n  """See."""\n  x = """no docstring"""\n  async def g(self):\n    "\\d"\n'
        'try:\n  def h():\n    """Aitch."""\nexcept OSError:\n  pass\n',
        encoding="utf-8",
    )
    expected = "Module.\n\nEff.\n\nMore:\n  indented\n\nSee.\n\n\\d\n\nAitch.\n"
    assert embedded._module_docstrings(path) == expected
    path.write_text('"""broken', encoding="utf-8")
    assert embedded._module_docstrings(path) == ""


# --- data sets


@pytest.fixture
def quiet_datasets(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.usefixtures("quiet_datasets")
def test_saved_data_sets(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [*ROWS, ""], "title": ["a"] * 4})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(f"hf:{tmp_path}/one") == ROWS
    assert texts(f"hf:{tmp_path}/two") == ROWS
    assert texts(f"hf:{tmp_path}/two:test") == ROWS[1:2]
    assert "no split 'dev'; there are train, test" in message(f"hf:{tmp_path}/two:dev")


@pytest.mark.usefixtures("quiet_datasets")
def test_streamed_folders(tmp_path):
    for name in ("j", "p"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "j" / "train.jsonl", [{"story": row, "n": 1} for row in ROWS])
    pq.write_table(pa.table({"text": ROWS}), tmp_path / "p" / "train.parquet")
    assert texts(f"hf:{tmp_path}/j") == ROWS  # the only column of strings
    assert texts(f"hf:{tmp_path}/p:train") == ROWS
    assert "cannot open the data set" in message(f"hf:{tmp_path}/p:nothing")


@pytest.mark.usefixtures("quiet_datasets")
def test_data_sets_without_a_text(tmp_path, monkeypatch):
    columns = {"a": ["x"], "b": ["y"], "n": [1]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "two")
    datasets.Dataset.from_dict({"text": [1]}).save_to_disk(tmp_path / "number")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text('{"text": "x"}\n' * 3 + '{"text": ')
    assert 'no column "text" and not exactly one column of strings' in message(f"hf:{tmp_path}/two")
    assert "the columns are a, b, n" in message(f"hf:{tmp_path}/two")
    assert "row 1: 'text' holds int, not a string" in message(f"hf:{tmp_path}/number")
    assert "the data set broke off" in message(f"hf:{tmp_path}/broken")
    assert "there is no folder /no/such" in message("hf:/no/such")
    assert "name must follow hf:" in message("hf:")
    monkeypatch.setattr(hub, "open_rows", lambda _: [])
    assert "the data set is empty" in message("hf:some/name")


# --- mistakes


def test_missing_and_unknown(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "b.parquet.gz").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.md").write_text("x")
    assert "there is no such file, folder or pattern" in message(tmp_path / "gone.txt")
    assert "unknown extension '.pdf'; nacre reads .txt" in message(tmp_path / "a.pdf")
    assert "unknown extension '.parquet.gz'" in message(tmp_path / "b.parquet.gz")
    assert "the folder has no file that nacre reads; nacre reads" in message(tmp_path / "empty")
    assert "1 files have other extensions" in message(tmp_path / "other")
    assert "the pattern has no file that nacre reads" in message(tmp_path / "*.nothing")
    assert "no regular file" in message("/dev/null")
    assert "no source is given" in message()


def test_all_problems_come_at_once(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").touch()
    (tmp_path / "x.pdf").write_bytes(b"x")
    found = message(tmp_path / "gone.txt", tmp_path / "x.pdf", tmp_path)
    assert found.startswith("the data has problems\n  - ")
    assert found.count("\n  - ") == 11
    for part in ("gone.txt", "unknown extension '.pdf'", "00.txt: the file is empty", "4 more"):
        assert part in found


def test_problems_are_found_before_the_first_document(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    with pytest.raises(DataError):
        corpus.read([str(tmp_path / "a.txt"), str(tmp_path / "gone.txt")])


def test_empty_files(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "c.jsonl").write_bytes(b'\n\n{"text": ""}\n')
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b""))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert "a.txt: the file is empty" in message(tmp_path / "a.txt")
    for name in ("b.txt", "c.jsonl", "d.txt.gz", "e.parquet"):
        assert f"{name}: there is no text in it" in message(tmp_path / name)


def test_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "a.txt: permission to read it is denied" in message(path)
    monkeypatch.undo()

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "a.txt: permission to read it is denied" in message(path)


def test_other_trouble_while_reading(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")

    def fail(self, *_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert "a.txt: cannot be read (Input/output error)" in message(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_binary(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    data = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert "it looks binary (a NUL at byte 8)" in message(path, errors="replace")


def test_invalid_utf8_names_file_and_offset(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(b"abc\xe9def \xef\xbf\xbd \xff\xfe")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n')
    pq.write_table(
        pa.table({"text": pa.array([b"fine", b"x\xff"], pa.binary()).view(pa.string())}),
        tmp_path / "c.parquet",
    )
    assert "a.txt: invalid UTF-8 at byte 3 (0xE9)" in message(tmp_path / "a.txt")
    assert "--errors replace" in message(tmp_path / "a.txt")
    assert "b.jsonl: invalid UTF-8 at byte 25 (0xE9)" in message(tmp_path / "b.jsonl")
    assert "c.parquet, row 2: invalid UTF-8 at byte 1" in message(tmp_path / "c.parquet")
    with caplog.at_level(logging.WARNING, "nacre"):
        found = texts(tmp_path, errors="replace")
    assert found == ["abc\ufffddef \ufffd \ufffd\ufffd", "ok", "\ufffd", "fine", "x\ufffd"]
    assert "a.txt: 3 invalid UTF-8 sequences became U+FFFD" in caplog.text
    assert "b.jsonl: 1 invalid" in caplog.text


def test_bad_jsonl_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    for line, words in {
        '{"text": ': "line 2: it is no JSON",
        '{"body": "x"}': 'line 2: it has no "text" with a string',
        '{"text": 3}': 'line 2: it has no "text" with a string',
        '["text"]': 'line 2: it has no "text" with a string',
        '{"text": "\\ud83d"}': "line 2: lone surrogate U+D83D at character 0",
        "[" * 100_000: "line 2: it is no JSON",
    }.items():
        path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
        assert f"{path}, {words}" in message(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compression(tmp_path, suffix):
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    whole = compress(bytes(range(1, 128)) * 50)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[:-7])
    assert f"a.txt{suffix}: the " in message(path)
    assert "cut off" in message(path)
    path.write_bytes(b"this is no archive at all")
    assert "damaged" in message(path)
    path.write_bytes(whole + b"garbage")
    assert "damaged" in message(path)


def test_damaged_or_unfit_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    assert "the parquet file is damaged" in message(path)
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    assert 'there is no column "text"; the columns are body, id' in message(path)
    pq.write_table(pa.table({"text": [1]}), path)
    assert 'the column "text" holds int64, not strings' in message(path)


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard"), ("hf:some/name", "datasets")],
)
def test_missing_packages(tmp_path, monkeypatch, name, package):
    source = name
    if not name.startswith("hf:"):
        (tmp_path / name).write_bytes(b"x")
        source = str(tmp_path / name)
    for module in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    found = message(source, kind=ConfigError)
    assert (
        f"{name} needs the package {package} (in a clone of nacre: pip install -e '.[data]')"
        in found
    )


def sources_of(root: Path) -> list[str]:
    """Three sources of 5,000, 600 and 4,000 characters in documents of several sizes."""
    (root / "english").mkdir()
    (root / "english" / "a.txt").write_text("It was a bright day. " * 200)  # 4,200
    (root / "english" / "b.txt").write_text("and cold" * 100)  # 800
    write_jsonl(root / "short.jsonl", [{"text": "x" * 300}, {"text": ""}, {"text": "y" * 300}])
    write_jsonl(root / "russian.jsonl", [{"text": "Мороз и солнце; день чудесный! " * 2}] * 64)
    return [str(root / name) for name in ("english", "short.jsonl", "russian.jsonl")]


@pytest.mark.parametrize("limit", [9568, 100_000_000])
def test_text_within_the_limit_is_learned_from_whole_and_in_order(
    tmp_path, monkeypatch, caplog, limit
):
    sources = sources_of(tmp_path)
    monkeypatch.setattr("nacre.data.bytestream._BLOCK", 1000)
    monkeypatch.setattr(tokenizer, "LEARN_FROM", limit)
    with caplog.at_level(logging.INFO, "nacre"):
        found = sample(sources)
    assert sum(map(len, found)) == 9568
    assert found == texts(*sources)
    assert not caplog.text
    before, after = tokenizer.build(texts(*sources), 600), tokenizer.build(found, 600)
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()


def test_longer_text_gives_an_equal_share_of_every_source(tmp_path, monkeypatch, caplog):
    sources = sources_of(tmp_path)
    monkeypatch.setattr(tokenizer, "LEARN_FROM", 3000)
    with caplog.at_level(logging.INFO, "nacre"):
        found = sample(sources)
    english, *short, _ = found[:4]
    assert english == ("It was a bright day. " * 200)[:1200]
    assert short == ["x" * 300, "y" * 300]  # it leaves 400 characters to the others
    assert "".join(found[3:]) == ("Мороз и солнце; день чудесный! " * 128)[:1200]
    assert "the tokenizer learns from the first 1200 characters of each source" in caplog.text


def test_one_long_source_gives_its_beginning(tmp_path, monkeypatch, caplog):
    source = sources_of(tmp_path)[0]
    monkeypatch.setattr(tokenizer, "LEARN_FROM", 4300)
    with caplog.at_level(logging.INFO, "nacre"):
        assert list(map(len, sample([source]))) == [4200, 100]
    assert caplog.messages == ["the tokenizer learns from the first 4300 characters"]


def test_what_is_past_the_share_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_bytes(b"a" * 3000 + b"\xff" * 3000)
    (tmp_path / "short.txt").write_text("b" * 500)
    monkeypatch.setattr("nacre.data.bytestream._BLOCK", 1000)
    monkeypatch.setattr(tokenizer, "LEARN_FROM", 2000)
    sources = [str(tmp_path / "long.txt"), str(tmp_path / "short.txt")]
    assert sample(sources) == ["a" * 1500, "b" * 500]


def test_a_sample_is_of_sources_that_are_there():
    with pytest.raises(DataError, match="there is no such file"):
        sample(["gone.txt"])
