"""Model, objectives and metrics in plain PyTorch; knows no Ray, no MLflow and no sibling package."""
