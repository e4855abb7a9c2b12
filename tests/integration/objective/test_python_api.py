"""The example of docs/python_api.md learns, in a process that imports nothing heavy but torch."""

import re
import subprocess
import sys

from tests.support.imports_of_files import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "training_loop.py"
PROGRAM = f"""
import runpy, sys, torch
before = set(sys.modules)
import minpro_megatron.objective
imported = {{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
runpy.run_path({str(EXAMPLE)!r})
print("imported", *sorted(imported))
print("heavy", *sorted({{"megatron", "sglang", "transformers"}} & set(sys.modules)))  # torch's optimizers import more
"""
LIGHT = {"minpro_megatron", "annotated_types", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection"}


def test_the_example_learns_and_imports_little() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rewards = [float(value) for value in re.findall(r"mean reward ([\d.]+)", done.stdout)]
    assert rewards[0] < 0.6 < 0.9 < rewards[-1]
    imported, heavy = (set(line.split()[1:]) for line in done.stdout.splitlines()[-2:])
    assert "minpro_megatron" in imported
    assert imported - LIGHT == heavy == set()
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 50
