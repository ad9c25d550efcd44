"""WikiText's form: articles, the hub's rows, and the text as it would be written.

WikiText is read in its published form, for which perplexities are defined: documents are articles, and the file is all
documents joined. That text has spaces around punctuation (`1 @,@ 000 words .`) and, in the `.tokens` files, `<unk>` in
the place of rare words. For pretraining `natural_text` undoes the spacing, because the other sources and GPT-2's
training text are natural, and leaves out sentences with `<unk>`, because a model that has seen them writes them.
"""

import re
from collections.abc import Iterable, Iterator

TITLE = re.compile(r" ?= [^=](?:.*[^=])? = ?\n")


def split_lines(text: str) -> list[str]:
    """Lines with their newlines, split at "\\n" alone (`splitlines` would also split at U+2028 and others)."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """The articles of WikiText's lines (each with its newline), whose texts, joined, are the lines again.

    An article begins at a title, ` = Title = ` between blank lines: 60 of them in WikiText-2's test, 60 in its
    validation and 600 in its training split, as published. Blank lines before the first title belong to the first
    article.
    """
    lines = [line if line.endswith("\n") else f"{line}\n" for line in lines]
    starts = [
        number
        for number, line in enumerate(lines)
        if TITLE.fullmatch(line)
        and (number == 0 or not lines[number - 1].strip())
        and (number + 1 == len(lines) or not lines[number + 1].strip())
    ]
    if not any(line.strip() for line in lines):
        return
    if not starts or any(line.strip() for line in lines[: starts[0]]):
        starts.insert(0, 0)
    starts[0] = 0
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield "".join(lines[start:end])


def hub_rows(article: str) -> list[str]:
    """An article as rows of the hub's `wikitext-*-raw-v1`: a line with its newline, "" for a blank one.

    `"\\n\\n".join` over the rows of all articles is the text on which GPT-2's perplexities are computed.
    """
    return [line if line.strip() else "" for line in split_lines(article)]


def without_holes(text: str) -> str:
    """WikiText without the sentences (and titles) that hold an `<unk>`; a text without any comes back as it is."""
    if "<unk>" not in text:
        return text
    lines = []
    for line in split_lines(text):
        if "<unk>" in line:
            sentences = re.findall(r".*?(?: [.!?](?: \"| '| \))?(?= |$)|$)", line.rstrip("\n"))
            line = "".join(sentence for sentence in sentences if "<unk>" not in sentence)
            if not line.strip():
                continue
            line = f" {line.strip()} \n"
        lines.append(line)
    return "".join(lines)


def natural_text(article: str) -> str:
    """WikiText as it would be written: no spaces before punctuation, no ` @-@ `, `== Heading ==`, blank lines around
    headings.

    Sentences with `<unk>` are left out first, and headings that are left with no text.
    """
    lines = [_natural(line) for line in split_lines(without_holes(article))]
    lines = [line for line in lines if line]
    kept: list[str] = []
    for line, following in zip(lines, [*lines[1:], "= end ="], strict=True):
        depth = _depth(line)
        if depth > 1 and 0 < _depth(following) <= depth:
            continue  # a heading with nothing under it
        if depth or (kept and _depth(kept[-1])):
            kept.append("")
        kept.append(line)
    return "\n".join(kept).strip("\n")


def _natural(line: str) -> str:
    text = line.strip()
    if heading := re.fullmatch(r"((?:= )+)(.*[^= ])((?: =)+)", text):
        marks = "=" * (len(heading[1]) // 2)
        text = f"{marks} {heading[2]} {marks}"
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r" '(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    text = re.sub(r"(s) '(?= )", r"\1'", text)
    text = re.sub(r"([(\[{$£€]) ", r"\1", text)
    text = re.sub(r" ([.,;:!?%)\]}]|° ?)", r"\1", text)
    return text


def _depth(line: str) -> int:
    heading = re.fullmatch(r"(=+) .* \1", line)
    return len(heading[1]) if heading else 0
