"""The command `minpro prefixes` as a file of a checkout: python tools/build_prefixes.py ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the code of this checkout, in any environment

from minpro_megatron.__main__ import run_command

if __name__ == "__main__":
    sys.exit(run_command("prefixes", sys.argv[1:], "python tools/build_prefixes.py"))
