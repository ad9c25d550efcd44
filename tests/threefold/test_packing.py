"""Packing: every row read back position by position against the documents it came from."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basics.errors import DataError
from threefold.config import ModelConfig
from threefold.data.arrays import Documents, EpochOrder, best_fit, shuffled
from threefold.data.packing import IGNORE, pack_documents, pack_examples, pack_pairs
from threefold.model.decoder import segment_positions
from threefold.segments import TRUNK_SHIFT

EOS = 0


def config(context: int, sinks: int = 1) -> ModelConfig:
    return ModelConfig(context=context, sinks=sinks)


def sinks(k: int) -> list[int]:
    return list(range(1, 1 + k))


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that a token tells its document and place."""
    ends = np.cumsum(lengths) + 100
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


def pieces(batch):
    """(row, first column, tokens, targets, positions) of every piece of a batch."""
    for row in range(batch.tokens_BT.shape[0]):
        segments = batch.segments_BT[row].tolist()
        for segment in sorted(set(segments) - {0, -1}):
            columns = [column for column, value in enumerate(segments) if value == segment]
            assert columns == list(range(columns[0], columns[-1] + 1))
            inside = slice(columns[0], columns[-1] + 1)
            fields = (batch.tokens_BT, batch.targets_BT, batch.positions_BT)
            yield row, columns[0], *(field[row, inside].tolist() for field in fields)


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, context=st.integers(6, 24), k=st.integers(0, 4))
def test_every_token_is_an_input_and_a_target_once(lengths, context, k):
    documents = numbered(lengths)
    rows = pack_documents(documents, config(context, k), EOS, sinks(k))
    batch = rows.rows(range(len(rows)))
    following = {
        token: document[i + 1] if i + 1 < len(document) else EOS
        for document in documents
        for i, token in enumerate(document)
    }
    openers = {document[0] for document in documents if document}
    inputs, opened = [], 0
    for row, column, tokens, targets, positions in pieces(batch):
        assert positions == list(range(k, k + len(tokens)))
        if k == 0 and tokens[0] == EOS:  # the EOS between two documents of GPT-2's stream opens the later one
            assert targets[0] in openers
            assert tokens[1:] == [] or tokens[1] == targets[0]
            tokens, targets, opened = tokens[1:], targets[1:], opened + 1
        elif k and column == k:
            assert batch.targets_BT[row, k - 1] == (tokens[0] if tokens[0] in openers else IGNORE)
        assert targets == [following[token] for token in tokens]
        inputs += tokens
    assert sorted(inputs) == sorted(token for document in documents for token in document)
    for row in range(len(rows)):
        assert batch.tokens_BT[row, :k].tolist() == sinks(k)
        assert batch.segments_BT[row, :k].tolist() == [0] * k
        assert batch.positions_BT[row, :k].tolist() == list(range(k))
        assert (batch.targets_BT[row, : max(k - 1, 0)] == IGNORE).all()
    padding = batch.segments_BT == -1
    assert (batch.targets_BT[padding] == IGNORE).all()
    assert rows.n_padding == int(padding.sum()) == batch.n_padding
    assert rows.n_tokens == batch.n_tokens == len(inputs) + opened
    assert rows.n_documents == sum(length > 0 for length in lengths)


def test_a_row_by_hand():
    rows = pack_documents([[10, 11, 12], [20, 21]], config(8, 2), EOS, [1, 2])
    batch = rows.rows([0])
    assert batch.tokens_BT.tolist() == [[1, 2, 10, 11, 12, 20, 21, EOS]]
    assert batch.targets_BT.tolist() == [[IGNORE, 10, 11, 12, EOS, 21, EOS, IGNORE]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert batch.segments_BT.tolist() == [[0, 0, 1, 1, 1, 2, 2, -1]]
    assert all(
        getattr(batch, name).dtype == torch.int64 for name in ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")
    )


def test_a_row_by_hand_without_sinks():
    batch = pack_documents([[10, 11, 12], [20, 21]], config(8, 0), EOS, []).rows([0])
    assert batch.tokens_BT.tolist() == [[10, 11, 12, EOS, 20, 21, EOS, EOS]]
    assert batch.targets_BT.tolist() == [[11, 12, EOS, 20, 21, EOS, IGNORE, IGNORE]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 0, 0]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 2, 2, 2, -1, -1]]


def test_a_long_document_is_cut_and_loses_no_target():
    batch = pack_documents([list(range(10, 20))], config(5, 1), EOS, [1]).rows([0, 1, 2])
    assert batch.tokens_BT.tolist() == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, EOS, EOS]]
    assert batch.targets_BT.tolist() == [
        [10, 11, 12, 13, 14],
        [IGNORE, 15, 16, 17, 18],
        [IGNORE, 19, EOS, IGNORE, IGNORE],
    ]


def test_streams_are_packed_as_one_mixture():
    first, second = numbered([5, 3, 9]), [[900, 901], [910, 911, 912]]
    parts = [Documents.of(first, EOS), Documents.of(second, EOS)]
    rows = pack_documents(parts, config(8), EOS, [1])
    together = pack_documents(first + second, config(8), EOS, [1])
    assert torch.equal(rows.rows(range(len(rows))).tokens_BT, together.rows(range(len(together))).tokens_BT)
    assert torch.equal(rows.rows(range(len(rows))).targets_BT, together.rows(range(len(together))).targets_BT)


def test_streams_of_examples_and_pairs_are_packed_as_one():
    examples = [([100 + i] * (1 + i % 4), [200 + i] * (1 + i % 3)) for i in range(20)]
    pairs = [([100 + i] * (1 + i % 4), [200 + i] * (1 + i % 3), [300 + i] * (1 + i % 5)) for i in range(20)]

    def stream(sequences):
        return Documents.of([p + r for p, r in sequences], EOS, [len(p) for p, _ in sequences])

    sides = [side for prompt, *responses in pairs for side in ((prompt, response) for response in responses)]
    for k in (0, 1):
        apart = pack_examples([stream(examples[:7]), stream(examples[7:])], config(16, k), EOS, sinks(k))
        together = pack_examples(examples, config(16, k), EOS, sinks(k))
        index = range(len(together))
        assert all(map(torch.equal, vars(apart.rows(index)).values(), vars(together.rows(index)).values()))
        apart = pack_pairs([stream(sides[:14]), stream(sides[14:])], config(16, k), EOS, sinks(k))
        together = pack_pairs(pairs, config(16, k), EOS, sinks(k))
        for one, other in zip(apart.batches(6, shuffle=False), together.batches(6, shuffle=False), strict=True):
            assert all(map(torch.equal, vars(one).values(), vars(other).values()))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=20),
    k=st.integers(0, 2),
)
def test_examples_learn_the_response_and_eos_only(sizes, k):
    whole = numbered([p + r for p, r in sizes])
    examples = [(ids[:p], ids[p:]) for ids, (p, _) in zip(whole, sizes, strict=True)]
    rows = pack_examples(examples, config(16, k), EOS, sinks(k))
    assert rows.n_documents == len(examples) and rows.n_dropped == 0
    learned = set()
    batch = rows.rows(range(len(rows)))
    for row, column, tokens, targets, _ in pieces(batch):
        if k == 0 and tokens[0] == EOS:
            tokens = tokens[1:]
            head, targets = targets[0], targets[1:]
            assert head == IGNORE or head == tokens[0]
        else:
            head = batch.targets_BT[row, k - 1].item() if k and column == k else IGNORE
        prompt, response = next((p, r) for p, r in examples if (p + r)[0] == tokens[0])
        assert tokens == prompt + response
        assert targets == [IGNORE] * max(len(prompt) - 1, 0) + response[not prompt :] + [EOS]
        assert (head == tokens[0]) if not prompt and (column == k) and k else True
        assert head == IGNORE or not prompt
        learned.add(tokens[0])
    assert len(learned) == len(examples)


def test_examples_that_do_not_fit_are_counted():
    rows = pack_examples([([5] * 4, [6] * 3), ([5] * 4, [6] * 4)], config(8), EOS, [1])
    assert (rows.n_documents, rows.n_dropped) == (1, 1)
    with pytest.raises(DataError, match=r"no example of 1 fits into model\.context = 8"):
        pack_examples([([5] * 40, [6])], config(8), EOS, [1])


@pytest.mark.parametrize("k", [0, 1, 3])
def test_pairs_are_whole_in_every_batch(k):
    rng = np.random.default_rng(3)
    made = []
    for number in range(23):
        prompt = [1000 + number, *rng.integers(10, 90, rng.integers(1, 5)).tolist()]
        made.append(
            (
                prompt,
                rng.integers(100, 190, rng.integers(1, 9)).tolist(),
                rng.integers(200, 290, rng.integers(1, 9)).tolist(),
            )
        )
    made.append(([1] * 5, [2] * 50, [3]))
    made[7] = ([1007] * 9, [100] * 8, [200] * 8)  # together too long for a row
    made[8] = ([1008], [100] * 3, [200] * 4)  # the one token of the prompt learns on both sides
    rows = pack_pairs(made, config(24, k), EOS, sinks(k))
    assert (len(rows), rows.n_dropped, rows.kept.tolist()) == (23, 1, list(range(23)))
    seen, together = [], []
    for batch in rows.batches(4, shuffle=False):
        assert (batch.segments_BT > 0).any(dim=1).all(), "no row is left empty"
        for place, pair in enumerate(batch.pairs_P.tolist()):
            trunks = set()
            for side in (0, 1):
                here = batch.sides_BT == 2 * place + side
                (row,) = here.any(dim=1).nonzero().flatten().tolist()
                (segment,) = batch.segments_BT[here].unique().tolist()
                trunk = (
                    batch.segments_BT[row] == segment >> TRUNK_SHIFT if segment >> TRUNK_SHIFT else here[row] & False
                )
                trunks.add((row, *trunk.nonzero().flatten().tolist()))
                tokens, targets, positions = (
                    [*values[row][trunk].tolist(), *values[here].tolist()]
                    for values in (batch.tokens_BT, batch.targets_BT, batch.positions_BT)
                )
                prompt, response = made[pair][0], made[pair][1 + side]
                assert tokens == prompt + response
                assert targets == [IGNORE] * (len(prompt) - 1) + response + [EOS]
                assert positions == list(range(k, k + len(prompt) + len(response)))
                assert trunk.sum() == (len(prompt) - 1 if pair != 7 else 0)
            together += [pair] if len(trunks) == 1 and len(trunks.pop()) > 1 else []
        real = batch.segments_BT > 0
        assert (batch.targets_BT[~real | (batch.sides_BT < 0)] == IGNORE).all() and (batch.sides_BT[~real] < 0).all()
        assert torch.equal(segment_positions(batch.segments_BT)[real], batch.positions_BT[real])
        seen += batch.pairs_P.tolist()
    assert seen == list(range(23))
    assert together == [pair for pair in range(23) if pair != 7 and len(made[pair][0]) > 1]
    again = [len(prompt) if pair == 7 else 1 for pair, (prompt, _, _) in enumerate(made)]  # laid out a second time
    assert rows.n_tokens == sum(sum(map(len, parts)) + twice for parts, twice in zip(made[:23], again, strict=False))
    steps = rows.steps(4, epochs=2)
    trained = list(rows.batches(4, seed=5, steps=steps))
    assert len(trained) == steps == 12
    assert {len(batch.pairs_P) for batch in trained} == {4} and len({batch.tokens_BT.shape for batch in trained}) == 1
    resumed = list(rows.assembled(rows.shuffled(4, 5, steps), start=7))
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(trained[7:], resumed, strict=True))


def test_shuffled_batches_cover_each_epoch():
    rows = pack_documents(numbered([6] * 50), config(8), EOS, [1])
    batches = list(rows.batches(8, seed=1, steps=rows.steps(8, epochs=4)))
    assert len(batches) == 25
    first = torch.cat([batch.tokens_BT for batch in batches])
    for epoch in range(4):
        assert len(set(first[epoch * 50 : (epoch + 1) * 50, 1].tolist())) == 50
    assert first[:50].tolist() != first[50:100].tolist()
    endless = rows.batches(8, seed=1)
    assert all(torch.equal(batch.tokens_BT, next(endless).tokens_BT) for batch in batches)
    other = next(rows.batches(8, seed=2, steps=1))
    assert not torch.equal(batches[0].tokens_BT, other.tokens_BT)


def test_scoring_covers_every_row_once_in_one_shape():
    rows = pack_documents(numbered([6] * 11), config(8), EOS, [1])
    batches = list(rows.batches(4, shuffle=False))
    assert [batch.n_tokens for batch in batches] == [24, 24, 18]
    assert all(batch.tokens_BT.shape == (4, 8) for batch in batches)
    assert batches[-1].segments_BT[3].tolist() == [0] + [-1] * 7
    assert (batches[-1].targets_BT[3] == IGNORE).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 12), st.integers(0, 99))
def test_stratified_epochs_are_permutations_of_even_batches(n, batch_size, seed):
    lengths = np.random.default_rng(seed).integers(1, 1000, n)
    batches = list(shuffled(n, batch_size, seed, 2 * n, lengths))
    order = np.concatenate(batches)
    for epoch in range(2 * batch_size):
        assert sorted(order[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    resumed = EpochOrder(n, (seed,), lengths, batch_size).take(n * batch_size, (n + 1) * batch_size)
    assert resumed.tolist() == batches[n].tolist()


def test_stratified_batches_are_of_about_the_same_size():
    lengths = np.random.default_rng(0).exponential(300, 1600).astype(np.int64) + 1
    totals = {
        name: np.array([lengths[index].sum() for index in shuffled(1600, 16, 1, 100, by)])
        for name, by in (("random", None), ("stratified", lengths))
    }
    assert totals["stratified"].std() < 0.35 * totals["random"].std()


def test_a_batch_larger_than_the_data():
    assert [len(set(index.tolist())) for index in shuffled(3, 8, 0, 2)] == [3, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200))
def test_best_fit_is_a_packing(lengths):
    lengths = np.array(lengths, np.int64)
    order, offsets = best_fit(lengths, 50)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    loads = [lengths[order[a:b]].sum() for a, b in pairwise(offsets)]
    assert all(0 < load <= 50 for load in loads)
    assert sum(load <= 25 for load in loads) <= 1  # two such rows would have been one


def test_steps_count_document_tokens_not_positions():
    rows = pack_documents(numbered([4] * 100), config(8), EOS, [1])
    assert (rows.n_tokens, rows.n_padding, rows.utilisation) == (400, 300, 0.5)
    assert rows.steps(10, tokens=400) == 10 and rows.steps(10, epochs=0.5) == 5


def test_nothing_to_pack():
    with pytest.raises(DataError, match="nothing to pack"):
        pack_documents([[], []], config(8), EOS, [1])
    with pytest.raises(ValueError, match="2 sink ids"):
        pack_documents([[5]], config(8), EOS, [1, 2])
