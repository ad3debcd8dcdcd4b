"""Measures: the procedural world, its parser, scores and reports."""
