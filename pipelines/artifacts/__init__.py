"""Run folders, checkpoints and encoder packages: found by path, URL or registered name, and built.

Imported by whatever takes a MODEL or a run.
"""
