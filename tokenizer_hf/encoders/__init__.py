"""Pictures -> latents (B, N, C), one row per code."""
