"""MLflow: runs, also while the server is away, the model registry, curves of earlier runs.

The only room that imports mlflow.
"""
