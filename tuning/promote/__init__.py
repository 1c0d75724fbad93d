"""From a run to the champion: candidate, checks, registry, rollback.

Imported by the command line.
"""
