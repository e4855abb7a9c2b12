"""The servers' API key: sent with every request, and never in a command line or a log.

Servers started by the run get a random key, in a file of the run folder that only this user may read. A key that the
user gives in an environment variable has precedence. External servers (server.urls) have the user's key or none.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import write_secret

KEY_FILE = "endpoints/server.key"


def make_api_key(config: RunConfig) -> None:
    """Creates a new key for the servers that this start of the run will start, unless the user gives one. Called once
    per start, before its roles."""
    if not config.server.api_key_variable and not config.server.urls:
        write_secret(config.run_dir / KEY_FILE)


def has_key(config: RunConfig) -> bool:
    """Whether this start of the run has created a key."""
    return (config.run_dir / KEY_FILE).exists()


def api_key(config: RunConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that the run's servers require. None if they require none: external servers without
    server.api_key_variable, and servers of a role that was started by hand in a folder without a key.

    Raises UserError as `given_api_key` does, and if the key's file cannot be read.
    """
    key = given_api_key(config.server, environment)
    if key is not None or config.server.urls:
        return key
    path = Path(config.run_dir) / KEY_FILE
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; all roles of the run must be started by one user") from None


def given_api_key(server: ServerConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in the environment variable that server.api_key_variable names; None if it names none.

    Raises UserError if the variable is not set, or if its value cannot be sent in an HTTP header.
    """
    variable = server.api_key_variable
    if not variable:
        return None
    key = environment.get(variable, "")
    if not key:
        raise UserError(
            f"server.api_key_variable = {variable!r}: this environment variable is not set; export it for every role, "
            "or set server.api_key_variable to '' for servers without a key of yours"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"server.api_key_variable = {variable!r}: the key must be printable ASCII without spaces; look for a line "
            "break at its end"
        )
    return key


def authorization(config: RunConfig, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The headers that every request to a server needs, empty without a key. Raises UserError as `api_key` does."""
    key = api_key(config, environment)
    return {} if key is None else {"Authorization": f"Bearer {key}"}
