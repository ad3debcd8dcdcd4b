"""Code vectors (B, N, C) -> pictures."""
