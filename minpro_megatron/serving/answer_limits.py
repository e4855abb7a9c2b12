"""Limits on the size of an answer: an external server may send without end."""

import requests

# A description of the model is about a kilobyte.
MAX_INFO_BYTES = 64 * 1024
# All settings of a server, with the state of its schedulers: some ten kilobytes per scheduler.
MAX_SETTINGS_BYTES = 8 * 1024**2
# The largest other answer to a control request has a checksum per tensor of each rank of a server: megabytes.
MAX_CONTROL_BYTES = 256 * 1024**2
_PIECE_BYTES = 64 * 1024


class BodyTooLarge(requests.RequestException):
    """The answer has more bytes than allowed."""


def read_body(response: requests.Response, limit: int) -> bytes:
    """The body of a response that was requested with `stream=True`.

    Raises BodyTooLarge for more than `limit` bytes, and the error of requests if the connection fails.
    """
    body = bytearray()
    for piece in response.iter_content(_PIECE_BYTES):
        body += piece
        if len(body) > limit:
            raise BodyTooLarge(f"more than {limit} bytes, which no answer to this request has")
    return bytes(body)
