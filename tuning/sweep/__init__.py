"""A sweep over Ray Tune: space, schedulers, trials, their record and their runs in MLflow.

Imported by `compare`, `promote` and the command line.
"""
