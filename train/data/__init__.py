"""Text corpora, tokenizer training, and the deterministic input pipeline of language models."""
