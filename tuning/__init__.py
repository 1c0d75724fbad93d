"""Sweeps, comparison and promotion (Ray Tune); its issue is not built yet."""
