"""Sources, readers, tokenizer, packing and tokenised corpora."""
