"""Ports of this machine: one that all gateways share, and a free one."""

import socket


def shared_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address that other gateways of this machine are bound to as well; port 0: a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only then; without it small replies wait 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((host, port))
    return bound


def free_port() -> int:
    """A port of loopback that nobody is bound to now."""
    with shared_socket("127.0.0.1", 0) as bound:
        return int(bound.getsockname()[1])
