"""The GPT-2 counterpart of a configuration: what is trained where GPT-2's own weights are out of reach."""

from dataclasses import replace

from threefold.config import ModelConfig


def gpt2_counterpart(config: ModelConfig) -> ModelConfig:
    """GPT-2's parts (Radford et al. 2019) at the same depth, width, context and parameters of the feed-forward.

    LayerNorm, GELU, learned positions, biases, full heads, no QK-norm and no sinks. GELU's feed-forward has two
    matrices where SwiGLU's has three, so its width is 3/2 of it.
    """
    d_ff = round(config.d_ff * 3 / 2) if config.ffn == "swiglu" else config.d_ff
    return replace(
        config,
        d_ff=d_ff,
        n_kv_head=-1,
        norm="layer",
        ffn="gelu",
        position="learned",
        sinks=0,
        qk_norm=False,
        bias=True,
        tie_embeddings=True,
    )
