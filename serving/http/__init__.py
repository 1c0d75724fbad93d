"""HTTP by ASGI: requests, replies, limits, keys, the page's files; no Ray.

Speaks to the models through `serving.interfaces` only; imported by `gateway`.
"""
