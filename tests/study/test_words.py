"""The report's texts hold no number or setting of a run: typed digits are in a list of allowed ones, with reasons."""

import re
import tomllib
from collections.abc import Iterator

import pytest

from basics import paths
from papertrail.report import sources

# What may stand typed, and why. Names are taken out first.
NAMES = re.compile(r"(Distil)?GPT-2|SST-2|WikiText-2|C1, C2|lm-eval|SHA-256|bf16")
ALLOWED = {
    "95%": "level of every interval (statistics.py)",
    "5%": "level of every test, before adjustment (differences.ALPHA); share of the steps of a running mean (smooth)",
    "80%": "power of the minimum detectable effect (differences.POWER)",
    "12": "digits of a hash that the provenance table shows",
    "6N": "floating-point operations a token of Kaplan et al. 2020: a formula",
    "6": "the same, in words",
}


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of the page's prose, its captions and its templates."""
    source = (paths.REPORT / "index.qmd").read_text(encoding="utf-8")
    for number, line in enumerate(source.split("\n"), 1):
        bare = re.sub(r"\{\{<.*?>\}\}|\[[^\]]*@[^\]]*\]|@[\w-]+|\{[^}]*\}|\$[^$]*\$", " ", line)
        if number > sources.parse(source).body_start and not line.startswith(("\\", "$")):
            yield f"index.qmd line {number}", bare
    script = (paths.NOTEBOOKS / "percent" / "06_compare.py").read_text(encoding="utf-8")
    yield from (("06_compare.py", caption) for caption in re.findall(r'^#\| (?:tbl|fig)-cap: "(.*)"$', script, re.M))
    words = (paths.PLAN.with_name("words.toml")).read_text(encoding="utf-8")
    yield from strings("words.toml", tomllib.loads(words))


def strings(where: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from strings(f"{where}: {key}", part)
            yield f"{where}, a heading", "" if key in ("tables", "metrics") else re.sub(r"\{.*?\}", " ", key)
    elif isinstance(value, list):
        for part in value:
            yield from strings(where, part)
    elif isinstance(value, str):
        yield where, re.sub(r"\{[^}]*\}", " ", value)


def digits(text: str) -> list[str]:
    return [one for one in re.findall(r"\d[\w.,]*%?", NAMES.sub(" ", text)) if one.rstrip(".,") not in ALLOWED]


def test_no_number_of_a_run_is_typed():
    found = [(where, text) for where, text in texts() if digits(text)]
    assert found == []
    assert sum(bool(re.search(r"\w", text)) for _, text in texts()) > 200


@pytest.mark.parametrize(
    "text",
    [
        "at a perplexity of 364.7",
        "after 3 seeds",
        "a model of 253M parameters",
        "learning rate 0.02",
        "1.38M parameters",
    ],
)
def test_the_check_finds_a_number_of_a_run(text):
    assert digits(text)


def test_every_allowed_number_is_used():
    used = {one.rstrip(".,") for _, text in texts() for one in re.findall(r"\d[\w.,]*%?", NAMES.sub(" ", text))}
    assert used == set(ALLOWED) and all(ALLOWED.values())


def test_the_prose_keeps_to_plain_words():
    for where, text in texts():
        assert not re.search(r"\b(could show|told|anew|by turns|goes on|precedent’s)\b", text), (where, text)
