"""Runs and sweeps compared: collected, ranked with errors, as a table and as a page.

Imported by the command line.
"""
