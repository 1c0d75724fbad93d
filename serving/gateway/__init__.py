"""A process that speaks HTTP: its port, batches, and its clients of the loaded versions.

Imports `http` and `replicas`; imported by the applications and by `control`.
"""
