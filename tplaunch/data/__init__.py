"""Text to tokens to samples: Megatron `.bin/.idx` corpora, tokenizers, and the order in which samples are read."""
