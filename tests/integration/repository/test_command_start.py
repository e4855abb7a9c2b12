"""A command imports no torch before it has parsed its arguments: help and mistakes take no seconds."""

import subprocess
import sys

CODE = """
import sys
from docs.generator.commands import parser_of
from minpro_megatron.__main__ import COMMANDS

for name in COMMANDS:
    parser_of(name)
    assert "torch" not in sys.modules, name
"""


def test_no_command_imports_torch_to_parse_its_arguments() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
