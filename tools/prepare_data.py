"""The command `minpro prepare` as a file of a checkout: python tools/prepare_data.py ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the code of this checkout, in any environment

from minpro_megatron.__main__ import run_command

if __name__ == "__main__":
    sys.exit(run_command("prepare", sys.argv[1:], "python tools/prepare_data.py"))
