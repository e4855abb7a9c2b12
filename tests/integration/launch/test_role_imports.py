"""serve and collect start in a second and stay small because they never import torch."""

import subprocess
import sys


def test_serve_and_collect_never_import_torch() -> None:
    program = (
        "import sys, minpro_megatron.roles.serve, minpro_megatron.roles.collect, minpro_megatron.rewards.worker,"
        " minpro_megatron.serving.answer_worker\n"
        "heavy = {'torch', 'megatron', 'transformers', 'sglang'} & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
