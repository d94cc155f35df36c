"""The server's socket sends small writes at once: streamed tokens and keep-alive responses do not wait for an ACK."""

from __future__ import annotations

import asyncio
import socket

import pytest

from serving_export.server.__main__ import _bound_socket


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_have_tcp_nodelay(host: str) -> None:
    async def nodelay_of_a_connection(bound: socket.socket) -> int:
        accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda reader, writer: accepted.set_result(writer), sock=bound)
        async with server:
            _, client = await asyncio.open_connection(host, bound.getsockname()[1])
            writer = await accepted
            value = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for one in (writer, client):
                one.close()
        return int(value)

    try:
        bound = _bound_socket(host, 0)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    assert asyncio.run(nodelay_of_a_connection(bound)) != 0
