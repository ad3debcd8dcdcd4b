"""Learns: the image tokenizer, the text model, and the LoRA that joins them."""
