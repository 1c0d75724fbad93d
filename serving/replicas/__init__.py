"""What Ray Serve scales: encoders, fusion encoder and search, one batch a call.

Imported by `gateway` and the applications.
"""
