"""HTML pages of training runs and their SVG charts.

Imported by the demo and by the report of a sweep.
"""
