"""Inputs for a fuzz campaign: a sound one, changed at a few places drawn at random."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 65_536, 10**9, 2**31, 2**63 - 1, 2**63, 10**18, 10**39,
    -(10**18), 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), "", " ", "a",
    "0", "-1", "1e999", "1.5M", "999999999999T", "true", "null", "\x00", "\ud800", "é", "日" * 40,
    "x" * 5000, "../../etc/passwd", "/dev/zero", "/", ".", "..", "hf:a/b", "C:\\a", "%s{}",
    [], {}, [[]], [None], [0, 1], ["a"], [1.5] * 100, {"": ""}, {"a": {"b": [1]}}, {"name": "a"},
)  # fmt: skip
"""What a program may not expect in the place of anything else."""

PIECES: tuple[bytes, ...] = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\t", b" ", b'"', b"'", b",",
    b":", b"{", b"}", b"[", b"]", b"&a ", b"*a", b"<<: ", b"!!int ", b"!!python/object:os.system ",
    b"---\n", b"? ", b"- ", b"| ", b"> ", b"%YAML 1.1\n", b"#", b"null", b"NaN", b"1e999",
    b"-Infinity",     b"0x", b"0b", b"1:1:1", b"9" * 50, b"\\ud800", b"\\u0000", b"[" * 300,
    b'{"a":' * 120, b"2024-99-99",     b"\xf0\x9f\x98\x80", b"=", b"~", b"`", b"@",
)  # fmt: skip

UNCHANGED = 0.02

Mutate = Callable[[random.Random], bytes]


def document(draw: random.Random, sound: Any) -> Any:
    """Return a copy of plain data with one to four changes; one of fifty has none."""
    changed = copy.deepcopy(sound)
    if draw.random() < UNCHANGED:
        return changed
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        changed = _change(draw, changed)
    return changed


def mapping(draw: random.Random, sound: dict[str, Any]) -> dict[str, Any]:
    """Return a changed document that is still a mapping."""
    changed = document(draw, sound)
    return changed if isinstance(changed, dict) else {"a": changed}


def as_json(draw: random.Random, sound: Any) -> bytes:
    """Return a changed document as JSON, every tenth with changed bytes too."""
    data = json.dumps(document(draw, sound), ensure_ascii=draw.random() < 0.9)
    written = data.encode("utf-8", "surrogatepass")
    return raw(draw, written) if draw.random() < 0.1 else written


def raw(draw: random.Random, sound: bytes) -> bytes:
    """Return bytes with one to four changes, of some or of whole parts; one of fifty has none."""
    if draw.random() < UNCHANGED:
        return sound
    data = bytearray(sound)
    for _ in range(draw.choice((1, 1, 2, 3, 4))):
        at = draw.randrange(len(data) + 1)
        to = min(len(data), at + draw.choice((1, 1, 2, 4, 16, 64)))
        match draw.randrange(6):
            case 0:
                data[at:to] = bytes(draw.randrange(256) for _ in range(to - at))
            case 1:
                del data[at:to]
            case 2:
                data[at:at] = draw.choice(PIECES)
            case 3:
                data[at:to] = draw.choice(PIECES)
            case 4:
                data[at:at] = data[at:to] * draw.choice((1, 2, 50))
            case _:
                if draw.random() < 0.2:
                    del data[at:]
    return bytes(data)


def value(draw: random.Random) -> Any:
    """Return one of `VALUES`, now and then inside others."""
    chosen = copy.deepcopy(draw.choice(VALUES))
    if draw.random() < 0.02:
        for _ in range(draw.choice((3, 40, 120))):
            chosen = [chosen] if draw.random() < 0.5 else {"a": chosen}
    return chosen


def _change(draw: random.Random, node: Any) -> Any:
    """Return a node that differs in one place, found by a walk from the top."""
    if not isinstance(node, dict | list) or not node or draw.random() < 0.08:
        return value(draw)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = draw.choice(keys)
    step = draw.random()
    if step < 0.55:
        node[key] = _change(draw, node[key])
    elif step < 0.75:
        node[key] = value(draw)
    elif step < 0.87:
        del node[key]
    elif isinstance(node, dict):
        name = draw.choice((*keys, "x", "", "__class__", "a" * 300))
        node[name] = copy.deepcopy(node[draw.choice(keys)]) if draw.random() < 0.5 else value(draw)
    else:
        node.insert(draw.randrange(len(node) + 1), copy.deepcopy(node[key]))
    return node
