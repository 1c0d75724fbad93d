"""Model, objectives and metrics in plain PyTorch; imports no Ray, no MLflow and no sibling package."""
