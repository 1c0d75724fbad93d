"""The whole service as Ray Serve runs it: the application, `triptych serve`, the check of a served candidate.

Imported by the command line.
"""
