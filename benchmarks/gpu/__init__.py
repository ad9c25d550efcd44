"""A first run on a GPU in at most nine minutes: is it right there, and how fast is it?

    PYTHONPATH=lib python -m benchmarks.gpu [--seconds 520] [--out results.json] [--rehearse]

It needs torch 2.11 or later, transformers 5, numpy, pydantic, safetensors and tokenizers, and neither network nor data:
documents are random tokens with lengths like those of real ones. The model is that of lib/study/presets/full.toml, and
so are the batches of its stages. `--rehearse` runs the same code on a CPU with a tiny model and without the compiler.

The results file holds `sections`. Each has `seconds` and what it measured, or `error`, or `skipped` where no time was
left; either makes the exit status 1. Sections run in the order of their worth, and the file is written after each.

machine             the device, its memory and capability, driver, versions of Python, torch, CUDA and other packages
matmul              TFLOP/s of matrix products in bf16 (fp32 on a CPU) for several shapes, and the fastest of them
oracle: ...         relative errors on the device, each with the tolerance that it is checked against:
  flex attention      compiled FlexAttention against masks, hidden states and gradients (on a CPU eager, no gradients)
  transformers        logits against transformers' Llama with the same weights
  objectives          loss and gradient of each objective, packed, against documents alone in fp64 on the CPU
  compiled losses     losses at the head whose passes over the logits are fused, against eager ones, with gradients
  decoding            steps of a captured CUDA graph (on a CPU the same steps, not captured) against plain ones
  training            a repeated training (determinism) and an interrupted one (resume) against an uninterrupted one.
                      `bit_identical` is reported and not required: a GPU sums some gradients in no fixed order
  fsdp2               gradients and one update of a model that FSDP2 holds, in one process, against a plain one
pretrain, sft, dpo  training steps with everything in them, data and optimizer included:
  tokens_per_second   document tokens (no padding, no sinks) of a step / its seconds; the median of the steps after the
                      warm-up, with quartiles. `padding`: the share of the positions that are padding
  tflops              FLOPs per second: 6 per token and weight of the blocks, 6 per target and weight of the head, and
                      per token 12 x layers x width x context for attention, as if nothing were masked
  share_of_989_tflops, share_of_matmul   that rate over the H100's data sheet, and over the fastest product above
  peak_memory_gb      the most that torch had allocated on the GPU at once
  reference_pairs_per_second   dpo: pairs whose reference log-probabilities are computed
decoding            new tokens per second of greedy batches, prefill included, of the same without a captured graph,
                    and of transformers' `generate`
scoring             tokens of requests per second, and those of a batched transformers loop: windows of running text,
                    and few-shot prompts with the same demonstrations. `difference`: the largest, in nats per token
profile             the kernels of a pretraining step of one micro-batch that take most time
"""
