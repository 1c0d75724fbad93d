"""One optimisation step in plain PyTorch: state, gradient cache, loss inputs, codebook, gradients, schedules.

Imports `models` only, no Ray and no MLflow, so that it runs, and is measured, bare; imported by `train`.
"""
