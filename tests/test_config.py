from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from nacre import config
from nacre.config import Section
from nacre.errors import ConfigError, Problem


class Inner(Section):
    size: Annotated[int, Field(gt=0)] = 4
    ratio: float = 0.5
    kind: Literal["glyph", "code"] = "glyph"
    fast: bool = False


class Item(Section):
    tokens: int


class Outer(Section):
    name: str = "unnamed"
    inner: Inner = Inner()
    words: tuple[str, ...] = ("a",)
    items: tuple[Item, ...] = ()


def messages(data: dict, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.validate(Outer, data, **options)
    return [str(problem) for problem in caught.value.problems]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- YAML files ---


def test_read_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "# text\nname: nácre\ninner: {size: 3}\n")
    assert config.read_yaml(path) == {"name": "nácre", "inner": {"size": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "is not valid YAML: "),
        ("a: 1\n\tb: 2", "is not valid YAML: "),
        ("a: \x01", "is not valid YAML: "),
        ("a: !!python/object:os.system x", "is not valid YAML: "),
        ("a: {b: 1, c: 2, b: 3}", "the key 'b' stands there twice in "),
        ("", "expected a mapping of keys to values, found an empty file"),
        ("- 1\n- 2\n", "expected a mapping of keys to values, found list"),
        ("just text", "expected a mapping of keys to values, found str"),
        ("a: 2024-99-99", "holds an impossible value: month must be in 1..12"),
        ("a: !!bool maybe", "holds an impossible value: 'maybe'"),
        ("a: !!int ''", "holds an impossible value: "),
        ("a: " + "9" * 5000, "holds an impossible value: "),
        ("[" * 3000, "is nested too deeply to be a plan"),
        (b"name: caf\xe9", "is not UTF-8 text: byte 9 is 0xe9"),
    ],
)
def test_bad_yaml_is_one_clear_message(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError) as caught:
        config.read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        config.read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.read_yaml(tmp_path)


def test_write_then_read_gives_the_same(tmp_path: Path) -> None:
    section = Outer(name="日本", inner=Inner(size=7, kind="code"), items=(Item(tokens=3),))
    config.write_yaml(section, tmp_path / "a.yaml")
    assert "日本" in (tmp_path / "a.yaml").read_text(encoding="utf-8")
    assert config.validate(Outer, config.read_yaml(tmp_path / "a.yaml")) == section


# --- settings ---


def test_override_sets_what_is_there_and_what_is_not() -> None:
    data = {"inner": {"size": 4}, "items": [{"tokens": 1}, {"tokens": 2}]}
    settings = ["inner.size=8", "items.1.tokens=5", "new.deep=[1, 2]", "name=x=y", "words=null"]
    result = config.override(data, settings)
    assert result == {
        "inner": {"size": 8},
        "items": [{"tokens": 1}, {"tokens": 5}],
        "new": {"deep": [1, 2]},
        "name": "x=y",
        "words": None,
    }
    assert data == {"inner": {"size": 4}, "items": [{"tokens": 1}, {"tokens": 2}]}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("size", "--set size: expected KEY=VALUE (e.g. model.width=256)"),
        ("=3", "--set =3: expected KEY=VALUE (e.g. model.width=256)"),
        ("items.3.tokens=1", "--set items.3.tokens=1: there is no 'items.3.tokens' to set"),
        ("items.3=1", "--set items.3=1: there is no 'items.3' to set"),
        ("items.x.tokens=1", "--set items.x.tokens=1: there is no 'items.x.tokens' to set"),
        ("items.0.a.b=1", "--set items.0.a.b=1: there is no 'items.0.a.b' to set"),
        ("name=[1", "--set name: '[1' is not a YAML value"),
        ("name=2024-99-99", "--set name: '2024-99-99' is not a YAML value"),
    ],
)
def test_a_bad_setting_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.override({"items": [5]}, [setting])
    assert str(caught.value) == message


def test_a_setting_nested_without_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--set name: '\[\[\[.*\.\.\..*' is not a YAML value$"):
        config.override({}, ["name=" + "[" * 3000])


# --- validation ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"sise": 3}}, "inner.sise: unknown key (did you mean 'size'?)"),
        (
            {"inner": {"zzz": 3}},
            "inner.zzz: unknown key (allowed: fast, kind, ratio, size)",
        ),
        ({"inner": {"size": "x"}}, "inner.size: expected a whole number, got 'x'"),
        ({"inner": {"size": 1.5}}, "inner.size: expected a whole number, got 1.5"),
        ({"inner": {"size": [1]}}, "inner.size: expected a whole number, got [1]"),
        ({"inner": {"size": 0}}, "inner.size: input should be greater than 0, got 0"),
        (
            {"inner": {"size": True}},
            "inner.size: true, false, yes and no are not allowed here, got True",
        ),
        ({"inner": {"ratio": "x"}}, "inner.ratio: expected a number, got 'x'"),
        ({"inner": {"ratio": None}}, "inner.ratio: expected a number, got None"),
        (
            {"inner": {"ratio": float("inf")}},
            "inner.ratio: expected a finite number, got inf",
        ),
        (
            {"inner": {"kind": "glyhp"}},
            "inner.kind: input should be 'glyph' or 'code', got 'glyhp' (did you mean 'glyph'?)",
        ),
        ({"inner": {"fast": "x"}}, "inner.fast: expected true or false, got 'x'"),
        ({"inner": {"fast": [1]}}, "inner.fast: expected true or false, got [1]"),
        ({"inner": 5}, "inner: expected a mapping of keys to values, got 5"),
        ({"inner": None}, "inner: expected a mapping of keys to values, got None"),
        ({"name": 5}, "name: expected text, got 5"),
        ({"words": "a"}, "words: expected a list, got 'a'"),
        ({"words": ["a", 5]}, "words[1]: expected text, got 5"),
        ({"items": [{}]}, "items[0].tokens: is required"),
        ({"items": [3]}, "items[0]: expected a mapping of keys to values, got 3"),
        ({1: 2}, "[1]: keys must be text, got 1"),
        ({"inner": {None: 2}}, "inner.None: keys must be text, got None"),
    ],
)
def test_each_mistake_has_its_message(data: dict, message: str) -> None:
    assert messages(data) == [message]


def test_a_long_value_is_shortened() -> None:
    (message,) = messages({"name": ["x" * 500] * 500})
    assert "..." in message
    assert len(message) < 500


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list = []
    loop.append(loop)
    assert len(messages({"name": loop, "words": loop})) == 2


def test_every_mistake_is_named_at_once_and_checks_still_run() -> None:
    def check(outer: Outer) -> list[Problem]:
        return [
            Problem("name", f"is checked: {outer.name}"),
            Problem("inner.size", "must be left out: it is wrong itself"),
            Problem("inner", "must be left out: a part of it is wrong"),
            Problem("words", "must be left out: it rests on inner.size", involves=("inner.size",)),
            Problem("items[1].tokens", "must be left out: it is a stand-in"),
        ]

    def stand_in(location: tuple) -> object:
        if location == ("items", 0):
            return {"tokens": 1}
        return 1 if location[-1] == "tokens" else None

    data = {
        "name": "me",
        "wrods": ["b"],
        "inner": {"size": "x", "ratio": "y"},
        "items": ["no", {"tokens": "z"}, {}],
    }
    assert messages(data, check=check, stand_in=stand_in) == [
        "inner.size: expected a whole number, got 'x'",
        "inner.ratio: expected a number, got 'y'",
        "items[0]: expected a mapping of keys to values, got 'no'",
        "items[1].tokens: expected a whole number, got 'z'",
        "items[2].tokens: is required",
        "wrods: unknown key (did you mean 'words'?)",
        "name: is checked: me",
    ]


def test_where_stands_before_the_problems() -> None:
    with pytest.raises(ConfigError, match=r"^mine\.yaml: name: "):
        config.validate(Outer, {"name": 5}, where="mine.yaml")


def test_validation_leaves_its_input_alone() -> None:
    data = {"inner": {"size": "x"}, "zzz": 1}
    messages(data)
    assert data == {"inner": {"size": "x"}, "zzz": 1}


def test_a_setting_of_endless_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--set 'a\.a.*\.\.\..*': nested more than 100 deep$"):
        config.override({}, [".".join("a" * 500) + "=1"])
