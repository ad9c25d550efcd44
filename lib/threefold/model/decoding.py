"""Decoding one token a row over a KV cache; on a GPU as a captured CUDA graph, which saves the launches of kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from threefold.model.attention import AttentionContext, additive_mask, rotary_tables
from threefold.model.cache import KVCache
from threefold.model.decoder import Decoder

CAPTURED = {"cuda"}  # types of device that decode by `FixedSteps`
WORTH = 8  # tokens from which capturing, which takes about two steps, pays


class Steps:
    """Steps of decoding: a call takes the next token of every row [B] and returns the logits after it [B, V]."""

    def __init__(self, model: Decoder, cache: KVCache):
        self.model, self.cache = model, cache

    def __call__(self, tokens_B: Tensor) -> Tensor:
        return self.model.head(self.model.hidden(tokens_B[:, None], cache=self.cache)[:, -1])

    def filled(self) -> KVCache:
        """The cache with all tokens that were decoded."""
        return self.cache


class FixedSteps(Steps):
    """Steps whose tensors keep their shapes and addresses: they attend to the whole capacity of the cache, and a mask
    leaves out the slots that hold nothing yet. On a GPU one step is recorded and then replayed.

    The returned logits are overwritten by the next step.
    """

    def __init__(self, model: Decoder, cache: KVCache):
        super().__init__(model, cache)
        device, first = cache.keys.device, cache.used
        for part in (cache.keys, cache.values):
            part[:, :, :, first:] = 0  # fresh memory may hold NaN, which no mask takes out
        filled_BS = (torch.arange(cache.capacity, device=device) < first).expand(cache.batch, -1)
        if cache.real_BS is not None:
            filled_BS = filled_BS & cache.real_BS
        self.prefix, self.done = cache.prefix, 0
        self.mask = additive_mask(filled_BS, cache.keys.dtype)[:, None, None]  # [B, 1, 1, S]
        self.tokens_B1 = torch.zeros((cache.batch, 1), dtype=torch.long, device=device)
        self.positions_B1 = self.tokens_B1 + cache.next_position
        self.slot = torch.tensor([first], device=device)
        self.run = self._run
        if device.type == "cuda":
            self.run = _recorded(self._run, (self.mask, self.positions_B1, self.slot))

    def __call__(self, tokens_B: Tensor) -> Tensor:
        self.tokens_B1.copy_(tokens_B[:, None])
        self.run()
        self.done += 1
        return self.logits_BV

    def filled(self) -> KVCache:
        cache, begin = self.cache, self.cache.used
        cache.used += self.done
        if cache.real_BS is not None:
            cache.real_BS[:, begin : cache.used] = True
        cache.next_position = cache.next_position + self.done
        self.done = 0
        return cache

    def _run(self) -> None:
        self.mask.index_fill_(3, self.slot, 0.0)
        config, rotary = self.model.config, None
        if config.position == "rope":
            tables = rotary_tables(self.positions_B1, config.d_model // config.n_head, config.rope_theta)
            rotary = tables[0].unsqueeze(-2), tables[1].unsqueeze(-2)
        context = AttentionContext(self.positions_B1, False, self.mask, rotary, self.model.attention == "explicit")
        self.logits_BV = self.model.head(self.model.run(self.tokens_B1, context, self)[:, -1])

    # What layers use of a KVCache

    def write(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return keys.index_copy_(2, self.slot, k_BGTK), values.index_copy_(2, self.slot, v_BGTK)

    def finish(self, length: int) -> None:
        self.slot += length
        self.positions_B1 += length


def _recorded(run: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """A function that replays what `run` does on the GPU. state: the tensors that a run changes and the next one reads;
    recording does not change them."""
    before = [tensor.clone() for tensor in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what libraries prepare on first use cannot be recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    return graph.replay


def steps(model: Decoder, cache: KVCache) -> Steps:
    """The steps that decode over this cache on its device."""
    fixed = cache.keys.device.type in CAPTURED and cache.capacity - cache.used >= WORTH and type(cache) is KVCache
    return (FixedSteps if fixed else Steps)(model, cache)
