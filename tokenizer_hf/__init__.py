"""Pixels <-> codes <-> token ids: an image tokenizer that is a Hugging Face model."""
