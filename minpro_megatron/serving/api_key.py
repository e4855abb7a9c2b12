"""The servers' API key: from the environment into every request, and never into a command line, a file or a log."""

import os
from collections.abc import Mapping

from minpro_megatron.config.rollout import ServerConfig
from minpro_megatron.errors import UserError


def api_key(server: ServerConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in the environment variable that server.api_key_variable names; None if it names none.

    Raises ValueError if the variable is not set, or holds what no HTTP header can carry.
    """
    variable = server.api_key_variable
    if not variable:
        return None
    key = environment.get(variable, "")
    if not key:
        raise UserError(
            f"server.api_key_variable = {variable!r}: this environment variable is not set; export it for every role, "
            "or set server.api_key_variable to '' for servers without a key"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"server.api_key_variable = {variable!r}: the key must be printable ASCII without spaces; look for a line "
            "break at its end"
        )
    return key


def authorization(server: ServerConfig, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The headers that every request to a server needs, empty without a key. Raises ValueError as `api_key` does."""
    key = api_key(server, environment)
    return {} if key is None else {"Authorization": f"Bearer {key}"}
