"""The model: the decoder and its KV cache, generation, and Hugging Face checkpoints in and out."""

from threefold.model.decoder import Decoder, KVCache, parameter_counts

__all__ = ["Decoder", "KVCache", "parameter_counts"]
