"""The vector index: built, stored, opened, searched.

Imported by `replicas` and the command line.
"""
