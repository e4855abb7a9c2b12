"""How much of an answer is read: a server of somebody else may send without end."""

import requests

# A description of the model is about a kilobyte.
MAX_INFO_BYTES = 64 * 1024
# All settings of a server, and what its schedulers say of themselves: some ten kilobytes for each of them.
MAX_SETTINGS_BYTES = 8 * 1024**2
# The largest other answer to a control request has a checksum for each tensor of each of a server's ranks: megabytes.
MAX_CONTROL_BYTES = 256 * 1024**2
_PIECE_BYTES = 64 * 1024


class BodyTooLarge(requests.RequestException):
    """The answer has more bytes than it may have."""


def read_body(response: requests.Response, limit: int) -> bytes:
    """The body of a response that was asked for with `stream=True`.

    Raises BodyTooLarge for more than `limit` bytes, and what requests raises where the connection fails.
    """
    body = bytearray()
    for piece in response.iter_content(_PIECE_BYTES):
        body += piece
        if len(body) > limit:
            raise BodyTooLarge(f"more than {limit} bytes, which no answer to this request has")
    return bytes(body)
