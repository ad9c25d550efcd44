"""Conversations with the checkpoints of a run, each in a form that its stage was trained on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basics.errors import DataError
from basics.names import replicate_of
from study.preset import LINEAGE, Preset
from threefold.data.registry import find
from threefold.data.templates import FORM_OF_READER, FORMS


def forms(preset: Preset, stage: str) -> list[str]:
    """Names of the forms (`threefold.data.templates.FORMS`) that a stage was trained to answer in, the one to ask it in
    first. Answers are taught by SFT, so DPO's own form comes after SFT's. A stage that only continues text has the form
    text.
    """
    name = replicate_of(stage)[0]
    taught: list[str] = []
    for part in LINEAGE[1 : LINEAGE.index(name) + 1] if name in LINEAGE else ():
        readers = {source.reader or find(source.source).reader for source in getattr(preset.data, part)}
        of_part = {FORM_OF_READER.get(reader) for reader in readers}
        taught += [form for form in FORMS if form in of_part and form not in taught]
    return taught or ["text"]


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first of some strings; what may be the beginning of one waits for the rest."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [place for stop in stops if (place := held.find(stop)) >= 0]
        if ends:
            yield held[: min(ends)]
            return
        kept = max((size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size])), default=0)
        if len(held) > kept:
            yield held[: len(held) - kept]
            held = held[len(held) - kept :]
    yield held


@dataclass
class Speaker:
    """A checkpoint that answers in one form. turns: what was said, where the form takes it."""

    name: str
    form: str
    model: Any
    tokenizer: Any
    turns: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def load(cls, name: str, form: str, folder: Path) -> "Speaker":
        from threefold import model as models  # late: torch takes seconds
        from threefold.data.tokenizer import load_tokenizer

        return cls(name, form, models.load_checkpoint(folder, device=models.pick_device()), load_tokenizer(folder))

    def answer(self, message: str, most: int, **sampling: Any) -> Iterator[str]:
        """The pieces of an answer of at most `most` tokens, as they come. The oldest turns are left out where the
        context has no room for them. Raises DataError for a message that leaves no room for an answer."""
        from threefold.data.tokenizer import decode_stream
        from threefold.model import StreamingCache, stream

        form, context = FORMS[self.form], self.model.config.context
        ids = self.ids(message)
        while len(ids) + most > context and self.turns:
            del self.turns[0]
            ids = self.ids(message)
        if len(ids) >= context:
            raise DataError(f"{self.name}: the message has {len(ids)} tokens, the context {context}: shorten it")
        new = stream(
            self.model,
            ids,
            StreamingCache.of(self.model, 1),
            min(most, context - len(ids)),
            eos_id=self.tokenizer.eos_token_id,
            **sampling,
        )
        said = ""
        for piece in until(decode_stream(self.tokenizer, new), form.stops):
            piece = piece if said else piece.lstrip()
            said += piece
            yield piece
        if form.turns:
            self.turns.append((message, said.strip()))

    def ids(self, message: str) -> list[int]:
        """The tokens of the message in its form. What looks like a special token in it is plain text."""
        from threefold.data.tokenizer import encode, sink_ids

        form = FORMS[self.form]
        prompt = form.prompt(message, self.turns) if form.turns else form.prompt(message)
        return [*sink_ids(self.tokenizer), *next(encode(self.tokenizer, [prompt])).tolist()]
