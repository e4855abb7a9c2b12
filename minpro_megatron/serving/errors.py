"""Errors between a request and the tokens it asked for."""

import errno
import re
from http import HTTPStatus

from minpro_megatron.errors import ProjectError

WRONG_KEY = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)  # the statuses of a server that requires another API key


class ServerError(ProjectError):
    """A request to a rollout server failed; the message names the server, the request and the field."""

    def __init__(self, server: str, request_id: str, field: str, problem: str) -> None:
        self.server, self.request_id, self.field, self.problem = server, request_id, field, problem
        super().__init__(f"{server}, request {request_id}, {field}: {problem}")

    @property
    def kind(self) -> str:
        """The last name of the field, by which failures are counted: `output_ids` of `[1].output_ids[3]`."""
        names = re.findall(r"[a-z_]+", self.field)
        return names[-1] if names else "body"


class ServerUnavailable(ServerError):
    """No answer, even after retries: connection refused or dropped, or status 5xx."""


class AnswerTimeout(ServerUnavailable):
    """No answer, or no complete one, within the time limit."""


class RequestRefused(ServerError):
    """The server rejected the request (status 4xx); a retry cannot help."""


class InvalidAnswer(ServerError):
    """The answer is damaged or does not fit the request."""


class OutOfFiles(ServerError):
    """This process or its machine can open no more connections; this is not a fault of the server."""


class WrongPolicyVersion(InvalidAnswer):
    """A token was sampled with other weights than requested."""


def connection_error(server: str, request_id: str, error: BaseException) -> ServerError:
    """The ServerError for a connection that failed with `error`."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return OutOfFiles(server, request_id, "connection", named(error))
    return ServerUnavailable(server, request_id, "connection", named(error))


def named(error: BaseException) -> str:
    """The error's type and, if it has one, its message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
