"""Reading, overriding, validating and writing configuration; every problem in one message."""

from __future__ import annotations

import copy
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from nacre.atomic import write_text
from nacre.errors import ConfigError, Problem, nearest
from nacre.untrusted import DEPTH, read_text


class Section(BaseModel):
    """A part of a configuration: immutable; unknown keys and `yes` for a number are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_is_not_zero(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if not isinstance(value, bool) or annotation is bool:
            return value
        word = "on" if value else "off"  # YAML reads these words as true and false
        if word in get_args(annotation):
            return word
        raise ValueError("true, false, yes and no are not allowed here")


SectionT = TypeVar("SectionT", bound=BaseModel)
Path_ = tuple[str | int, ...]
StandIn = Callable[[Path_], object]

# PyYAML raises these, besides its own, on tagged or impossible values such as 2024-99-99.
_YAML_VALUE_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
_PLAIN_WORDS = {
    "model_type": "expected a mapping of keys to values",
    "tuple_type": "expected a list",
    "invalid_key": "keys must be text",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
}


YAML_BYTES, YAML_VALUES, YAML_DEPTH = 2**20, 20_000, 50
"""Of a file, and in it, with what its aliases name counted in each place."""

_LONGEST_NUMBER = 64


if TYPE_CHECKING or not yaml.__with_libyaml__:
    _Safe = yaml.SafeLoader
else:

    class _Safe(
        yaml.composer.Composer, yaml.cyaml.CParser, yaml.constructor.SafeConstructor,
        yaml.resolver.Resolver,
    ):  # fmt: skip
        """The safe loader on libyaml's events; its own composer recurses in C without a bound."""

        def __init__(self, stream: str) -> None:
            yaml.cyaml.CParser.__init__(self, stream)
            yaml.composer.Composer.__init__(self)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)


class _Loader(_Safe):
    """The safe loader, bounded; a key that stands twice in a mapping is an error."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.composed = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.composed += 1
        self.depth += 1
        _bound(self.composed, self.depth)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        self.composed += len(node.value)  # what `<<` brings in may stand there many times
        _bound(self.composed, 0)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, times in written.items() if times > 1 and key != "<<"), None)
        if twice is not None:
            message = f"the key {twice!r} stands there twice"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(str(value)) > _LONGEST_NUMBER:
            raise ValueError(f"a number of {len(str(value)):,} characters")
        return value


class _TooMuch(ValueError):
    """YAML beyond the bounds."""


def _bound(values: int, depth: int) -> None:
    if values > YAML_VALUES:
        raise _TooMuch(f"has more than {YAML_VALUES:,} values")
    if depth > YAML_DEPTH:
        raise _TooMuch("is nested too deeply to be a plan")


def parse_yaml(text: str) -> object:
    """Return what a YAML text says, as plain data in which nothing is shared.

    Raises yaml.YAMLError and ValueError.
    """
    try:
        return _unshared(yaml.load(text, _Loader), Counter())
    except RecursionError:
        raise _TooMuch("is nested too deeply to be a plan") from None
    except _YAML_VALUE_ERRORS as error:
        if isinstance(error, _TooMuch):
            raise
        raise ValueError(f"holds an impossible value: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, safely; raise `ConfigError` if the file holds none."""
    try:
        data = parse_yaml(read_text(path, YAML_BYTES))
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), "no such file")) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ConfigError(Problem(str(path), message)) from None
    except OSError as error:
        raise ConfigError(Problem(str(path), f"cannot be read: {error.strerror}")) from None
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ConfigError(Problem(str(path), f"is not valid YAML: {text}")) from None
    except ValueError as error:
        raise ConfigError(Problem(str(path), str(error))) from None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else type(data).__name__
        raise ConfigError(
            Problem(str(path), f"expected a mapping of keys to values, found {found}")
        )
    return cast("dict[str, Any]", data)


def _unshared(node: object, made: Counter[str], depth: int = 0) -> object:
    """Return plain data in which what YAML's aliases name stands anew in each place.

    `made` counts the values, so that aliases of aliases cannot fill the memory.
    """
    made["values"] += 1
    _bound(made["values"], depth)
    if isinstance(node, dict):
        mapping = cast("dict[Any, object]", node)
        return {key: _unshared(value, made, depth + 1) for key, value in mapping.items()}
    if isinstance(node, list):
        return [_unshared(item, made, depth + 1) for item in cast("list[object]", node)]
    return node


def write_yaml(section: BaseModel, path: Path) -> None:
    """Write a section as YAML, its fields in the order of their declaration; all or nothing."""
    data = section.model_dump(mode="json", by_alias=True)
    write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def override(data: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` and `list.0.c=value` settings (values in YAML) to a copy of `data`."""
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for setting in settings:
        dotted, equals, raw = setting.partition("=")
        if not equals or not dotted:
            raise ConfigError(
                Problem(f"--set {setting}", "expected KEY=VALUE", "e.g. model.width=256")
            )
        try:
            value = parse_yaml(raw)
        except (yaml.YAMLError, ValueError):
            message = f"{_short.repr(raw)} is not a YAML value"
            raise ConfigError(Problem(f"--set {dotted}", message)) from None
        node: Any = result
        *parents, last = dotted.split(".")
        if len(parents) > DEPTH:
            message = f"nested more than {DEPTH} deep"
            raise ConfigError(Problem(f"--set {_short.repr(dotted)}", message))
        try:
            for key in parents:
                if isinstance(node, list):
                    node = cast("list[Any]", node)[int(key)]
                else:
                    if not isinstance(node.get(key), dict | list):
                        node[key] = {}
                    node = node[key]
            if isinstance(node, list):
                node[int(last)] = value
            else:
                node[last] = value
        except (ValueError, IndexError, AttributeError, TypeError):
            problem = Problem(f"--set {setting}", f"there is no {dotted!r} to set")
            raise ConfigError(problem) from None
    return result


def validate(
    kind: type[SectionT],
    data: Mapping[str, Any],
    *,
    check: Callable[[SectionT], list[Problem]] | None = None,
    stand_in: StandIn = lambda location: None,
    where: str = "",
) -> SectionT:
    """Build `kind` from `data`, or raise one `ConfigError` that names everything wrong with it.

    `check` finds what single fields cannot show. It runs even when some fields are wrong, on a copy
    of the data in which these have their defaults, or what `stand_in` gives for a location that has
    none, so that a person sees every problem at once. What it says of such fields is left out.
    """
    problems: list[Problem] = []
    wrong: set[Path_] = set()
    section: SectionT | None = None
    remaining: dict[str, Any] = copy.deepcopy(dict(data))
    while section is None:
        try:
            section = kind.model_validate(remaining)
        except ValidationError as error:
            found = [detail for detail in error.errors() if detail["loc"] not in wrong]
            problems += [_problem(kind, cast("dict[str, Any]", detail)) for detail in found]
            wrong |= {detail["loc"] for detail in found}
            if not found:
                break
            for detail in found:
                _mend(remaining, detail["loc"], stand_in)
    if section is not None and check is not None:
        unsure = {_dotted(location) for location in wrong}
        problems += [problem for problem in check(section) if not _rests_on(problem, unsure)]
    if problems:
        raise ConfigError(problems, where)
    assert section is not None
    return section


def _rests_on(problem: Problem, unsure: set[str]) -> bool:
    """Tell whether a problem is about an unsure field, a part of one, or what holds one."""
    parts = [re.split(r"[.\[]", field) for field in (problem.field, *problem.involves)]
    others = [re.split(r"[.\[]", field) for field in unsure]
    return any(a[: len(b)] == b[: len(a)] for a in parts for b in others)


def _dotted(location: Path_) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _mend(data: Any, location: Path_, stand_in: StandIn) -> None:
    """Replace what is wrong at `location` by its stand-in, else take out the key that holds it."""
    node, owner, owned = data, data, location[:1]
    for depth, part in enumerate(location, start=1):
        if isinstance(node, dict):
            owner, owned = cast("dict[Any, Any]", node), location[:depth]
            node = owner.get(part)
        elif isinstance(node, list | tuple) and isinstance(part, int):
            entries = cast("list[Any]", node)
            if part >= len(entries):  # mended with another part
                return
            replacement = stand_in(location) if depth == len(location) else None
            if replacement is not None and isinstance(node, list):
                entries[part] = replacement
                return
            node = entries[part]
    replacement = stand_in(owned)
    if replacement is not None:
        owner[owned[-1]] = replacement
    elif owned[-1] in owner:
        del owner[owned[-1]]
    else:
        for key in [key for key in owner if not isinstance(key, str)]:
            del owner[key]


def _problem(kind: type[BaseModel], detail: dict[str, Any]) -> Problem:
    location: Path_ = detail["loc"]
    field = _dotted(location)
    if detail["type"] == "extra_forbidden":
        allowed = _keys(_section_at(kind, location[:-1]))
        fix = nearest(str(location[-1]), allowed) or f"allowed: {', '.join(sorted(allowed))}"
        return Problem(field, "unknown key", fix)
    if detail["type"] == "missing":
        return Problem(field, "is required")
    message = str(detail["msg"]).removeprefix("Value error, ")
    message = _PLAIN_WORDS.get(detail["type"], message[0].lower() + message[1:])
    fix = ""
    if detail["type"] == "literal_error":
        fix = nearest(str(detail["input"]), re.findall("'([^']*)'", detail["ctx"]["expected"]))
    return Problem(field, f"{message}, got {_short.repr(detail['input'])}", fix)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def _keys(kind: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _section_at(kind: type[BaseModel], location: Path_) -> type[BaseModel]:
    """Return the section class that stands at `location` inside `kind`."""
    for part in location:
        if isinstance(part, int):
            continue
        for name, field in kind.model_fields.items():
            if part in (name, field.alias):
                kind = _section_in(field.annotation) or kind
    return kind


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
