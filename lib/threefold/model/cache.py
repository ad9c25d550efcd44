"""Caches of keys and values: `KVCache`, and `StreamingCache` of constant size. Shape suffixes as in `model.decoder`."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from basics.errors import ConfigError, DataError
from threefold.config import ModelConfig

if TYPE_CHECKING:
    from threefold.model.decoder import Decoder


def kv_heads(config: ModelConfig) -> int:
    """Key/value heads: `n_kv_head`, or as many as query heads where that is -1."""
    return config.n_head if config.n_kv_head == -1 else config.n_kv_head


class KVCache:
    """Preallocated keys and values of all layers, [L, B, G, capacity, K], filled in slot order.

    Rows may hold padding (segment -1 in the forward that wrote them): it stays masked, and positions count real tokens
    only, so left- and right-padded batches give what each row alone gives. Use it under `torch.no_grad()`.

    `expand` makes rows that all continue one batch-1 cache without copying it: the shared part is attended to as one
    matrix for all rows (few-shot prompts, many samples of one prompt).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prefix: tuple[Tensor, Tensor] | None = None,
    ):
        self.config, self.batch, self.capacity = config, batch, capacity
        shape = (config.n_layer, batch, kv_heads(config), capacity, config.d_model // config.n_head)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.prefix = prefix  # keys and values [L, 1, G, P, K] before every row's own slots
        self.used = 0  # own slots filled in every row
        self.real_BS: Tensor | None = None  # which own slots hold real tokens; None: all of them
        self.prefix_length = 0 if prefix is None else prefix[0].shape[3]
        self.next_position: int | Tensor = self.prefix_length  # [B, 1] once rows differ
        self._next: int | Tensor = self.prefix_length  # next_position once the tokens begun are finished

    @classmethod
    def of(cls, model: "Decoder", *sizes: int, **options: Any) -> Self:
        """A cache on the model's device and in its dtype; other arguments as for the class, without the config."""
        weight = model.embed.weight
        return cls(model.config, *sizes, dtype=weight.dtype, device=weight.device, **options)

    @property
    def length(self) -> int:
        """Slots filled in every row: the shared prefix, real tokens and padding."""
        return self.prefix_length + self.used

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, slots not filled yet included."""
        return sum(part.nbytes for part in (self.keys, self.values, *(self.prefix or ())))

    def expand(self, batch: int, capacity: int | None = None) -> "KVCache":
        """`batch` rows that continue this cache's one row, which is shared, not copied.

        capacity: further slots of each row (None: as many as are left here). ValueError when this cache has several
        rows or padding.
        """
        if self.batch != 1 or self.real_BS is not None or type(self) is not KVCache:
            raise ValueError(
                "only a cache of one row without padding can be expanded; a streaming cache cannot be shared"
            )
        prefix = self.keys[:, :, :, : self.used], self.values[:, :, :, : self.used]
        if self.prefix is not None:
            joined = (torch.cat(pair, dim=3) for pair in zip(self.prefix, prefix, strict=True))
            prefix = tuple(joined) if self.used else self.prefix
        capacity = self.capacity - self.used if capacity is None else capacity
        return KVCache(self.config, batch, capacity, dtype=prefix[0].dtype, device=prefix[0].device, prefix=prefix)

    def select(self, rows: Tensor) -> "KVCache":
        """The same cache with only these rows (an int64 index); frees what finished rows held."""
        chosen = copy.copy(self)
        chosen.batch = len(rows)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.empty((old.shape[0], len(rows), *old.shape[2:]), dtype=old.dtype, device=old.device)
            new[:, :, :, : self.used] = old[:, rows, :, : self.used]
            setattr(chosen, name, new)
        chosen.real_BS = None if self.real_BS is None else self.real_BS[rows]
        chosen.next_position = self.next_position if isinstance(self.next_position, int) else self.next_position[rows]
        return chosen

    def join(self, parts: Sequence["KVCache"]) -> None:
        """Take over the tokens of caches whose rows, one part after the other, are this empty one's. All rows' tokens
        end at the same slot; what lies before shorter ones is padding."""
        self.used = max(part.used for part in parts)
        real_BS = torch.ones((self.batch, self.capacity), dtype=torch.bool, device=self.keys.device)
        end = 0
        for part in parts:
            rows, first = slice(end, end + part.batch), self.used - part.used
            end += part.batch
            for own, taken in ((self.keys, part.keys), (self.values, part.values)):
                own[:, rows, :, :first] = 0  # fresh memory may hold NaN, which no mask takes out
                own[:, rows, :, first : self.used] = taken[:, :, :, : part.used]
            real_BS[rows, :first] = False
            if part.real_BS is not None:
                real_BS[rows, first : self.used] = part.real_BS[:, : part.used]
        if not real_BS.all():
            self.real_BS = real_BS
            self._next = self.prefix_length + real_BS[:, : self.used].sum(dim=1, keepdim=True)
        self.finish(0)

    def begin(self, length: int, real_BT: Tensor | None) -> Tensor | None:
        """Room for `length` new tokens; returns their positions [B, T], or None when they simply count on in every row.

        DataError when they do not fit the capacity.
        """
        if self.used + length > self.capacity:
            raise DataError(
                f"a KV cache of {self.capacity} slots cannot take {length} tokens after {self.used}; "
                "give it more capacity"
            )
        if real_BT is None and self.real_BS is None:
            return None
        device = self.keys.device
        if real_BT is None:
            real_BT = torch.ones((self.batch, length), dtype=torch.bool, device=device)
        if self.real_BS is None:
            self.real_BS = torch.ones((self.batch, self.capacity), dtype=torch.bool, device=device)
        self.real_BS[:, self.used : self.used + length] = real_BT
        counts_BT = real_BT.long().cumsum(dim=1)
        positions_BT = (self.next_position + counts_BT - 1).clamp_min(0)
        self._next = self.next_position + counts_BT[:, -1:]
        return positions_BT

    def begin_documents(self, length: int) -> None:
        """Room for `length` new tokens of several documents side by side, after which the cache is full.

        ValueError where rows have tokens of their own already.
        """
        if self.used or type(self) is not KVCache:
            raise ValueError(
                "packed documents follow a prefix that all rows share, or nothing; rows with tokens of their own, and "
                "streaming caches, take segments of 0 (real) and -1 (padding)"
            )
        self.begin(length, None)
        self.capacity = length  # what came after would see several documents as one past

    def unrotated_positions(self, length: int) -> Tensor | None:
        """Positions [S] of all slots with `length` new tokens, where keys are written unrotated; None: rotated."""
        return None

    def write(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all own ones so far, [B, G, S, K]."""
        end = self.used + k_BGTK.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.used : end] = k_BGTK
        values[:, :, self.used : end] = v_BGTK
        return keys[:, :, :end], values[:, :, :end]

    def finish(self, length: int) -> None:
        """Count `length` new tokens as written in every layer."""
        self.used += length
        self.next_position = self.prefix_length + self.used if self.real_BS is None else self._next


class StreamingCache(KVCache):
    """Keys and values of the first `sinks` tokens and of the last `window` ones, however many have passed (Xiao et al.
    2023, 2309.17453, section 3.2). A token is part of the window that it sees.

    Positions are those within the cache: 0..k-1 for the sinks, from k for the window in the order of the text, so that
    none leaves the training context. Keys are held unrotated, for the position of each changes with every token that
    leaves. What is held was computed when its token was processed, from what was held then. The window is a ring: the
    newest token takes the slot of the oldest.

    window: -1 for what the context leaves beside the sinks. sinks: -1 for the model's. Rows hold no padding. Raises
    ConfigError where sinks and window do not fit the context.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        window: int = -1,
        *,
        sinks: int = -1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.sinks = config.sinks if sinks == -1 else sinks
        if not 0 <= self.sinks < config.context:
            raise ConfigError(f"sinks = {sinks}: allowed is -1 (the model's) or 0 to {config.context - 1}")
        most = config.context - self.sinks
        self.window = most if window == -1 else window
        if not 1 <= self.window <= most:
            raise ConfigError(
                f"window = {window}: allowed is 1 to {most}, what the model's context of {config.context} leaves "
                f"beside {self.sinks} sink{'' if self.sinks == 1 else 's'}"
            )
        super().__init__(config, batch, self.sinks + self.window, dtype=dtype, device=device)
        self.seen = 0  # tokens that have passed

    def begin(self, length: int, real_BT: Tensor | None) -> Tensor | None:
        """As `KVCache.begin`. Past the window one token at a time: each sees another window. Learned positions are
        part of what is cached; they count all tokens, and end with their table."""
        if real_BT is not None:
            raise ValueError("a streaming cache takes rows without padding")
        if self.seen + length <= self.capacity:
            return None
        if length > 1:
            raise ValueError(
                f"a streaming cache of {self.capacity} slots takes one token at a time once they are full, "
                f"not {length} after {self.seen}"
            )
        last = self.seen if self.config.position == "learned" else self.capacity - 1
        return torch.tensor([last], device=self.keys.device)

    def unrotated_positions(self, length: int) -> Tensor:
        slots_S = torch.arange(min(self.seen + length, self.capacity), device=self.keys.device)
        if self.seen + length <= self.capacity:
            return slots_S
        oldest = (self.seen + length - self.sinks) % self.window  # its place in the ring, the next to be written
        return torch.where(slots_S < self.sinks, slots_S, self.sinks + (slots_S - self.sinks - oldest) % self.window)

    def write(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all that are held [B, G, S, K], in the order of the slots."""
        length = k_BGTK.shape[2]
        begin = self.seen if self.seen < self.capacity else self.sinks + (self.seen - self.sinks) % self.window
        end = max(self.used, begin + length)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, begin : begin + length] = k_BGTK
        values[:, :, begin : begin + length] = v_BGTK
        return keys[:, :, :end], values[:, :, :end]

    def finish(self, length: int) -> None:
        self.seen += length
        self.used = min(self.seen, self.capacity)
