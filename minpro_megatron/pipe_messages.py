"""Messages between a process and a worker of its own over pipes: each comes after its length in eight bytes."""

import asyncio
import os
import struct
from typing import BinaryIO

LENGTH = struct.Struct("<Q")


def framed(body: bytes) -> bytes:
    """The message as it is written to a pipe."""
    return LENGTH.pack(len(body)) + body


def write_message(sink: BinaryIO, body: bytes | bytearray) -> None:
    """Writes a message at once; a large one is not copied."""
    sink.write(LENGTH.pack(len(body)))
    sink.write(body)
    sink.flush()


def read_message(source: BinaryIO) -> bytearray | None:
    """The next message of a buffered stream; None at the end of the input."""
    header = source.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    message = bytearray(LENGTH.unpack(header)[0])
    # readinto fills a buffered stream's whole request unless the input ends
    return message if source.readinto(message) == len(message) else None  # pyright: ignore[reportAttributeAccessIssue]


async def next_message(source: asyncio.StreamReader) -> bytes:
    """The next message, inside an event loop. Raises asyncio.IncompleteReadError at the end of the input."""
    (length,) = LENGTH.unpack(await source.readexactly(LENGTH.size))
    return await source.readexactly(length)


def output_for_messages() -> BinaryIO:
    """A worker's pipe for its messages. Standard output becomes standard error: a function of the user's that prints
    must not write into the messages."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sink
