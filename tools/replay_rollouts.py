"""The command `minpro replay` as a file of a checkout: python tools/replay_rollouts.py ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the code of this checkout, in any environment

from minpro_megatron.__main__ import run_command

if __name__ == "__main__":
    sys.exit(run_command("replay", sys.argv[1:], "python tools/replay_rollouts.py"))
