"""Threefold: a small language model through pretraining, SFT and DPO, compared with GPT-2 and DistilGPT-2."""

__version__ = "0.1.0"
