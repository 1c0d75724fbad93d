"""A training run on Ray Train: driver, workers, checkpoints, health alarms, events.

Imported by the command line, the demo and sweeps.
"""
