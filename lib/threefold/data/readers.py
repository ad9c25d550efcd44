"""Files and rows read into items: one reader per kind of data, the same for own files, local folders and the hub.

`threefold.data.rows` turns a file into rows, dictionaries of columns with their place (file and line). A reader turns
rows into items, whose shapes are in `threefold.data.templates`. Anything wrong in a row raises a DataError that names
its place. A preference row that nothing can be learned from becomes an `OddRow` instead of an item. Large collections
hold a few of these; `threefold.data.sources` leaves them out, counts them, and stops if they are many.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from basics.errors import DataError
from threefold.data.rows import PLAIN, TABULAR, Row, is_null, kind_of, read_rows, read_text, suffix
from threefold.data.templates import LABELS, REVIEWS
from threefold.data.wikitext import articles, split_lines

END_OF_TEXT = "<|endoftext|>"  # separates documents in plain text files, as in TinyStories' own
ASSISTANT = "\n\nAssistant:"
REVIEWS_A_DOCUMENT = (4, 8)
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one alone; no file and no tokenizer takes it


@dataclass(frozen=True)
class OddRow:
    """A row to leave out: why, and its place."""

    reason: str
    place: str


# Readers of files and rows -------------------------------------------------------------------------------------------


def _string(row: Row, *columns: str, default: str | None = None) -> str:
    """The first of these columns that the row has, as text; the default if it is missing or null."""
    for column in columns:
        if column in row.columns:
            value = row.columns[column]
            if is_null(value) and default is not None:
                return default
            if not isinstance(value, str):
                raise DataError(f"{row.place}: column {column!r} holds {kind_of(value)}, expected text")
            if SURROGATE.search(value):
                raise DataError(f"{row.place}: column {column!r} holds half of a surrogate pair, which is not text")
            return value
    if default is not None:
        return default
    has = ", ".join(map(str, row.columns)) or "none"
    raise DataError(f"{row.place}: no column {columns[0]!r}; it has: {has}")


def _text(rows: Iterable[Row]) -> Iterator[str]:
    return (text for row in rows if (text := _string(row, "text", "story").strip()))


def _wikitext(rows: Iterable[Row]) -> Iterator[str]:
    # A row of the hub is a line with its newline, an empty one a line of a space; a row of several lines is a document.
    lines: list[str] = []
    for row in rows:
        text = _string(row, "text", "page")
        lines += split_lines(text if text.endswith("\n") else f"{text or ' '}\n")
    yield from articles(lines)


def _instructions(rows: Iterable[Row]) -> Iterator[dict]:
    for row in rows:
        item = {
            "instruction": _string(row, "instruction"),
            "input": _string(row, "input", default=""),
            "output": _string(row, "output"),
        }
        if not item["instruction"].strip():
            raise DataError(f"{row.place}: column 'instruction' is empty")
        yield item


def _preferences(rows: Iterable[Row]) -> Iterator[dict | OddRow]:
    for row in rows:
        prompt, chosen, rejected = _string(row, "prompt", default=""), _string(row, "chosen"), _string(row, "rejected")
        end = _end_of_prompt(prompt, chosen, rejected)
        if end is None and prompt.strip():
            raise DataError(
                f"{row.place}: column 'prompt' is the beginning of only one of chosen and rejected, or of another "
                "dialogue: expected responses to the prompt, or whole dialogues that both begin with it"
            )
        if end is None:
            yield OddRow(f"chosen and rejected share no dialogue up to an {ASSISTANT!r}", row.place)
            continue
        prompt = chosen[:end] if end else prompt
        chosen, rejected = chosen[end:], rejected[end:]
        if not chosen.strip() or not rejected.strip():
            yield OddRow("a response is empty", row.place)
        elif chosen == rejected:
            yield OddRow("chosen and rejected are equal", row.place)
        else:
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _end_of_prompt(prompt: str, chosen: str, rejected: str) -> int | None:
    """Where the prompt ends in both sides; 0 if the sides are responses to it; None if neither reading is sure.

    White space may differ between a prompt and the dialogues that begin with it, and the prompt may be a part of the
    dialogue that they share (its last question, say).
    """
    shared = len(shared_prompt(chosen, rejected))
    if not prompt.strip():
        return shared or None
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return len(prompt)
    spelled = re.compile(r"\s*" + r"\s+".join(map(re.escape, prompt.split())) + r"(?:(?<!\w)|(?!\w))")
    begins = [match.end() if (match := spelled.match(side)) else 0 for side in (chosen, rejected)]
    if not any(begins) and not any(side.lstrip().startswith("Human:") for side in (chosen, rejected)):
        return 0
    if all(begins) and chosen[: begins[0]] == rejected[: begins[1]]:
        return max(begins[0], shared)
    asked = " ".join(prompt.removesuffix(ASSISTANT).split())
    return shared if asked in " ".join(chosen[:shared].split()) and shared else None


def _sentiment(rows: Iterable[Row]) -> Iterator[dict]:
    labels = {
        value: number for number, name in enumerate(LABELS) for value in (number, str(number), f"{number}.0", name)
    }
    for row in rows:
        sentence = _string(row, "sentence", "text")  # as it is: the hub's end in a space, and lm-eval scores it
        label = row.columns.get("label")
        if isinstance(label, bool) or not isinstance(label, int | float | str) or label not in labels:
            what = "no column 'label'" if "label" not in row.columns else f"label {repr(label)[:40]}"
            raise DataError(f"{row.place}: {what}; expected 0 or negative, 1 or positive")
        yield {"sentence": sentence, "label": labels[label]}


def _problems(rows: Iterable[Row]) -> Iterator[dict]:
    for row in rows:
        question, answer = _string(row, "question").strip(), _string(row, "answer").strip()
        marked = with_final_number(answer)
        if marked is None:
            raise DataError(
                f"{row.place}: no number can be read from the answer {answer[-60:]!r}, or more than one: end it with "
                "a line such as `#### 18`"
            )
        yield {"question": question, "answer": marked}


_NUMBER = re.compile(
    r"(?:(?<!\w)-)?(?<!\w)(?:\$-?)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?!\w*[0-9])"
)


def _plain(number: str) -> str:
    """A number as a model writes it: 1,800 as 1800, $5.00 as 5, 007 as 7, .5 as 0.5."""
    number = re.sub(r"^(-?)\.", r"\g<1>0.", re.sub(r"[,$]", "", number))
    return re.sub(r"^(-?)0+(?=[0-9])|\.0+$", r"\1", number)


def with_final_number(answer: str) -> str | None:
    """The answer of a word problem in the form that is scored: alone, or with its final number after a last `#### `.

    An answer in this form is returned unchanged (1,800 but not 1.800,50; 7 but not 007). Otherwise the final number is
    looked for after the last `####`, else in the last `\\boxed{}`, else behind the last "answer is" or "answer:", else
    in the whole answer. None if there is no number there, or more than one.
    """
    scored = answer.rpartition("#### ")[2].removesuffix(".")
    if _NUMBER.fullmatch(scored) and _plain(scored) == re.sub(r"[,$]", "", scored):
        return answer
    solution, mark, final = answer.rpartition("####")
    if "\n" in final.strip():  # a heading, not a mark
        solution = answer
    if not mark:
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", answer)
        said = re.findall(r"(?i)answer\s*(?:is|[:=])(.*)", answer)
        solution, final = answer, (boxed or said or [answer])[-1]
    numbers = set(map(_plain, _NUMBER.findall(final.replace("\N{MINUS SIGN}", "-"))))
    if len(numbers) != 1:
        return None
    number = numbers.pop()
    return number if _NUMBER.fullmatch(answer.removesuffix(".")) else f"{solution.rstrip()}\n#### {number}".strip()


def _minimal_pairs(rows: Iterable[Row]) -> Iterator[dict]:
    for row in rows:
        yield {
            "good": _string(row, "sentence_good"),
            "bad": _string(row, "sentence_bad"),
            "phenomenon": _string(row, "UID", "file"),
            "group": _string(row, "linguistics_term", default=""),
        }


READERS: dict[str, Callable[[Iterable[Row]], Iterator]] = {
    "text": _text,
    "stories": _text,
    "wikitext": _wikitext,
    "wikitext-raw": _wikitext,
    "instructions": _instructions,
    "preferences": _preferences,
    "sentiment": _sentiment,
    **dict.fromkeys(REVIEWS, _sentiment),  # regrouped by `reviews` once the examples are chosen
    "problems": _problems,
    "minimal-pairs": _minimal_pairs,
}


def read_items(reader: str, rows: Iterable[Row]) -> Iterator:
    """The items of a reader from rows, with an `OddRow` for each row to leave out. Raises DataError for an unknown
    reader or a row that it cannot use."""
    if reader not in READERS:
        raise DataError(f"no reader {reader!r}; there are: {', '.join(READERS)}")
    return READERS[reader](rows)


def read_files(reader: str, paths: Iterable[Path]) -> Iterator:
    """The items of files, one file after the other, as `read_items`.

    Only the readers of text take plain text (.txt, .raw, .tokens): `wikitext` gives the file's articles, the others one
    document per file, or those between `<|endoftext|>`. Other files are read row by row.
    """
    for path in paths:
        if suffix(path) not in PLAIN:
            yield from read_items(reader, read_rows(path))
        elif reader in ("wikitext", "wikitext-raw"):
            yield from articles(split_lines(read_text(path)))
        elif reader in ("text", "stories"):
            rows = (Row({"text": part}, str(path)) for part in read_text(path).split(END_OF_TEXT))
            yield from read_items(reader, rows)
        else:
            raise DataError(f"{path}: reader {reader!r} reads rows, from {', '.join(TABULAR)}")


def shared_prompt(chosen: str, rejected: str) -> str:
    """The dialogue that both sides begin with, up to and including its last "\\n\\nAssistant:"; "" if there is none.

    Most sides differ in their last turn only. Where one side has further turns (14 of 4,666 pairs of the two base test
    files) the prompt ends where they part, and the rest of each dialogue is its response.
    """
    low, high = 0, min(len(chosen), len(rejected))
    while low < high:  # bisection: comparing slices is fast, comparing characters in Python is not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chosen[:middle] == rejected[:middle] else (low, middle - 1)
    shared = chosen[:low]
    end = shared.rfind(ASSISTANT)
    return shared[: end + len(ASSISTANT)] if end >= 0 else ""


# Labelled reviews as text ---------------------------------------------------------------------------------------------


def reviews(items: list[dict], seed: int = 0, reader: str = "reviews") -> list[str]:
    """Documents of 4 to 8 labelled reviews each, in the wording of a reader of REVIEWS, in seeded order.

    A model learns to use demonstrations only if its pretraining text has several labelled examples in a row.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(items))
    least, most = REVIEWS_A_DOCUMENT
    documents, start = [], 0
    while left := len(order) - start:
        size = int(rng.integers(least, most + 1))
        if left - size < least:  # so that the last document is not too short
            size = left if left <= most else left - least
        chosen = (items[index] for index in order[start : start + size])
        labelled = (f"{REVIEWS[reader](item['sentence'])} {LABELS[item['label']]}" for item in chosen)
        documents.append("\n\n".join(labelled))
        start += size
    return documents
