"""Vectors <-> codes, one file per quantizer."""
