"""Files that are there whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nacre.atomic import write_text

WRITER = """
import sys
from pathlib import Path
from nacre.atomic import write_text
for _ in range(300):
    write_text(Path(sys.argv[1]), sys.argv[2] * 1000)
"""


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "after \ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_may_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    commands = [[sys.executable, "-c", WRITER, str(path), text] for text in ("one ", "two ")]
    writers = [subprocess.Popen(command) for command in commands]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert path.read_text() in ("one " * 1000, "two " * 1000)
    assert list(tmp_path.iterdir()) == [path]
