"""`make demo`: corpus, training, scores, report and service in one go.

Imported by nobody.
"""
