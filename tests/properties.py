"""What the property tests share: one deterministic profile, the rule they check, and ways to damage a file."""

import copy
import functools
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from basics.errors import ThreefoldError

PHASES = (Phase.explicit, Phase.generate)  # a failing input is shown as it was drawn: shrinking takes minutes
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
# The kinds of input in docs/boundaries.md. RAN counts the generated inputs of each; conftest.py prints them.
KINDS = ("preset", "override", "parameter", "data file", "row", "checkpoint", "tokenizer", "prompt")
KINDS += ("notebook", "run folder", "environment variable", "command line")
RAN: Counter[str] = Counter()
LEAST = int(os.environ.get("THREEFOLD_EXAMPLES", 0))  # inputs of each test, where it asks for fewer itself
PATIENCE = 60  # seconds that one input may take


def examples(kind: str, number: int) -> Callable[[Callable], Callable]:
    """Settings of a property test: the same inputs on every machine and day, no fewer than THREEFOLD_EXAMPLES. Each is
    counted under its kind, and fails where it takes longer than PATIENCE."""
    assert kind in KINDS

    def hung(*_: Any) -> None:
        raise AssertionError(f"no answer after {PATIENCE} seconds")

    def decorate(test: Callable) -> Callable:
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*arguments: Any, **given: Any) -> None:
            RAN[kind] += 1
            before = signal.signal(signal.SIGALRM, hung)
            signal.alarm(PATIENCE)
            try:
                inner(*arguments, **given)
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)

        test.hypothesis.inner_test = counted
        return settings(
            max_examples=max(number, LEAST),
            derandomize=True,
            deadline=None,
            suppress_health_check=QUIET,
            database=None,
            phases=PHASES,
        )(test)

    return decorate


def documented(action: Callable[[], Any], *named: str) -> Any:
    """The action's result, or None where it raised an error of the project: one printable line that holds each of
    `named`. Any other exception escapes and fails the test."""
    try:
        return action()
    except ThreefoldError as error:
        said = str(error)
        assert said and len(said) < 5000 and all(char.isprintable() for char in said.replace("\u00a0", " ")), said
        for word in named:
            assert word in said, f"{word!r} is not in: {said}"
        return None


# What JSON and TOML values may turn out to be.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**70), 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\u202e", "\x00", "a\nb", "\x1b[31m", "x" * 2000, "../x", "{{< var x >}}", "٣"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, here: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found = [here] if here else []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return found + [place for key, item in items for place in places(item, (*here, key))]


@st.composite
def mutated(draw: Callable, content: Any) -> Any:
    """The JSON value with one to three of its values replaced, removed, doubled or moved under another key."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        found = places(content)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        holder = content
        for key in path:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if what == "replace":
            holder[last] = draw(values)
        elif what == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = holder.pop(last)
        else:
            holder.append(copy.deepcopy(holder[last]))
    return content


@st.composite
def damaged(draw: Callable, data: bytes) -> bytes:
    """The bytes cut short, with some overwritten, or with some put in between."""
    at = draw(st.integers(0, len(data)))
    what = draw(st.sampled_from(["cut", "overwrite", "insert"]))
    if what == "cut":
        return data[:at]
    piece = draw(
        st.binary(min_size=1, max_size=8) | st.sampled_from([b"[" * 3000, b"\xff\xfe", b"1" * 5000, b"\x00" * 64])
    )
    return data[:at] + piece + data[at + (len(piece) if what == "overwrite" else 0) :]


def as_json(content: Any) -> str:
    """JSON as Python writes it, NaN and half surrogate pairs included."""
    return json.dumps(content)
