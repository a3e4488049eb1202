"""Files of others: what is too large, too deep or no file is refused before it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nacre import untrusted
from nacre.untrusted import RefusedFile, parse_json, read_bytes, read_json, read_lines


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": [1, 2.5, "\xc3\xa4"]}')
    assert read_bytes(tmp_path / "a.json") == b'{"a": [1, 2.5, "\xc3\xa4"]}'
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, "ä"]}
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 11)
    with pytest.raises(RefusedFile, match=r"^has 11 bytes, more than the 10 that are read$"):
        read_bytes(tmp_path / "a", most=10)
    assert read_bytes(tmp_path / "a", most=11) == b"x" * 11


@pytest.mark.parametrize("read", [read_bytes, lambda path: list(read_lines(path))])
def test_pipes_and_devices_are_not_read(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(RefusedFile, match=r"^is no regular file$"):
            read(tmp_path / name)


def test_lines_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "LINE_BYTES", 8)
    (tmp_path / "a").write_bytes(b"one\r\n\ntwo\n123456789\n")
    lines = read_lines(tmp_path / "a")
    assert [next(lines), next(lines), next(lines)] == [b"one", b"", b"two"]
    with pytest.raises(RefusedFile, match="a line of more than 8 bytes"):
        next(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        (b"\xff", "can't decode byte 0xff"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("[" * 10**6, "nested more than 100 deep"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
        ("9" * 41, "a whole number of 41 digits"),
        ("[" + "1," * 3_000_001 + "1]", "about 3,000,002 values, more than the 3,000,000"),
    ],
)
def test_json_that_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_at_the_limits() -> None:
    assert parse_json("9" * 40) == int("9" * 40)
    assert str(parse_json("[" * 100 + "]" * 100)) == "[" * 100 + "]" * 100
    assert parse_json(r'"\ud83d\ude00"', surrogates=False) == "😀"
    assert parse_json(r'"\ud83d"') == "\ud83d"
    with pytest.raises(ValueError, match="surrogates not allowed"):
        parse_json(r'{"a": "\uD83D"}', surrogates=False)


def test_links_may_stay_in_their_folder_and_lead_to_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "same.json").symlink_to("config.json")
    untrusted.check_links(snapshot)
    (tmp_path / "seen").symlink_to(snapshot, target_is_directory=True)
    untrusted.check_links(tmp_path / "seen")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "note.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedFile, match=r"^note\.txt is a link out of the folder: copy the file"):
        untrusted.check_links(snapshot)


def test_a_link_to_another_repository_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(tmp_path / "blobs" / "abc")
    with pytest.raises(RefusedFile, match="is a link out of the folder"):
        untrusted.check_links(folder)
