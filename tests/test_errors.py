from __future__ import annotations

import pytest

from nacre.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FingerprintError,
    NacreError,
    Problem,
    nearest,
)


def test_a_problem_says_field_message_and_fix() -> None:
    assert str(Problem("model.width", "is odd", "use 64")) == "model.width: is odd (use 64)"
    assert str(Problem("model.width", "is odd")) == "model.width: is odd"


def test_one_problem_stands_on_one_line() -> None:
    error = ConfigError(Problem("a", "is wrong"), "plan.yaml")
    assert str(error) == "plan.yaml: a: is wrong"
    assert error.problems == (Problem("a", "is wrong"),)


def test_several_problems_are_a_list() -> None:
    error = ConfigError([Problem("a", "is wrong"), Problem("b", "is missing", "add it")], "x.yaml")
    assert str(error) == "x.yaml: 2 problems\n  - a: is wrong\n  - b: is missing (add it)"


def test_a_fingerprint_error_names_both_fingerprints_and_the_fix() -> None:
    error = FingerprintError("the tokenizer", "aaa", "bbb", "use the other one")
    assert str(error) == (
        "the tokenizer does not match: expected aaa, found bbb (use the other one)"
    )


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, FingerprintError])
def test_every_user_error_is_a_nacre_error(kind: type[Exception]) -> None:
    assert issubclass(kind, NacreError)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("widht", "did you mean 'width'?"), ("hads", "did you mean 'heads'?"), ("zzz", "")],
)
def test_nearest(word: str, expected: str) -> None:
    assert nearest(word, ["width", "heads"]) == expected
