"""Ray: joining or starting it, its room for work, and jobs on a cluster.

Imported by whatever runs on Ray.
"""
