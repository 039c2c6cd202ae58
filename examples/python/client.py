"""A Pontoon client in Python. Needs `pip install pycapnp`; run it where the directory `schema` is:

    python3 examples/python/client.py 127.0.0.1:7101 demo
"""

import asyncio
import sys

import capnp

kv_capnp = capnp.load("schema/kv.capnp")


async def main(address, database):
    host, port = address.rsplit(":", 1)
    stream = await capnp.AsyncIoStream.create_connection(host, int(port))
    gate = capnp.TwoPartyClient(stream).bootstrap().cast_as(kv_capnp.Gate)
    kv = (await gate.open({"protocol": {"min": 1, "max": 1}, "software": "client.py"})).kv

    put = (await kv.put(database, b"greeting", b"hello, bridge", 0)).result
    print("put:", put.error if put.which == "error" else f"version {put.written}")
    got = (await kv.get(database, b"greeting", 0)).result
    print("get:", got.value.value.decode() if got.which == "value" else got)


asyncio.run(capnp.run(main(*sys.argv[1:])))
