"""From files of pairs to rows on a worker: manifest, formats, epoch plan, transforms, loader, skip ledger, corpora.

Knows nothing of training; imported by every room that reads pairs.
"""
