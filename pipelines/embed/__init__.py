"""A corpus through the encoders to vectors, as a Ray Data job, and the folder of vectors that it leaves.

Imported by the command line and the demo.
"""
