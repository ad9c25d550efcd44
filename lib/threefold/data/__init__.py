"""Data: sources and readers, the tokenizer, tokenised corpora and packed rows.

`sources.load` gives the items of a source that `registry` names or of own files; `corpus.pretraining_rows`,
`example_rows` and `preference_rows` give rows to train on. Shapes of items and wordings of prompts are in `templates`,
shapes of batches in `packing`.
"""
