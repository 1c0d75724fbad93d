"""Retrieval scores: of a package, and of a model while it trains.

Imported by `train`, `embed`, promotion and the command line.
"""
