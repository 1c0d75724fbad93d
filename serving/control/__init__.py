"""Which versions are loaded and which one is served: following the alias, starting, checking, switching.

Imported by the applications.
"""
