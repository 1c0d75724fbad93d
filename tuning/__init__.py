"""Sweeps, comparison and promotion: Ray Tune above training, one MLflow run a trial, a gate before the alias moves."""
