"""MinPRO and other policy objectives on Megatron-Core, with SGLang rollouts."""

import sys

__version__ = "0.1.0"

if sys.version_info < (3, 12):  # noqa: UP036 - otherwise the first file with newer syntax is reported as wrong
    _PROBLEM = (
        f"minpro-megatron needs Python 3.12 or later, and {sys.executable} is {sys.version.split()[0]}; "
        "activate the environment that make setup has made"
    )
    if sys.argv[0] != "-m":
        raise ImportError(_PROBLEM)
    print(f"error: {_PROBLEM}", file=sys.stderr)  # python -m minpro_megatron, which would print a traceback
    raise SystemExit(2)
