"""Data: sources and readers, the tokenizer, tokenised corpora and packed rows.

`sources.load` gives items, `corpus.pretraining_rows`, `example_rows` and `preference_rows` give rows to train on;
shapes of items and wordings of prompts are in `templates`, of batches in `packing`.
"""
