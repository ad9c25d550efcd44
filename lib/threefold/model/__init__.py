"""The model: the decoder and its KV cache, generation, and Hugging Face checkpoints in and out."""

from threefold.model.cache import KVCache, StreamingCache
from threefold.model.decoder import Decoder, parameter_counts
from threefold.model.device import pick_device
from threefold.model.generation import generate, stream
from threefold.model.hf import export, from_transformers, load_checkpoint, save_checkpoint, to_transformers

__all__ = [
    "Decoder",
    "KVCache",
    "StreamingCache",
    "export",
    "from_transformers",
    "generate",
    "load_checkpoint",
    "parameter_counts",
    "pick_device",
    "save_checkpoint",
    "stream",
    "to_transformers",
]
