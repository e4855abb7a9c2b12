"""One check in this process: writes its result as JSON into a file.

    python -m minpro_megatron.gpu_checks.one_check NAME --device cuda --folder DIR --result FILE [--small]

`folder` is for the check's files. The runner starts this program (runner.py); it is not meant to be called by hand.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from minpro_megatron.gpu_checks.outcome import Outcome, Skipped
from minpro_megatron.gpu_checks.record import CheckResult
from minpro_megatron.gpu_checks.registry import BY_NAME, Check

_MAX_PROBLEM = 1000  # characters


def result_of(check: Check, device: str, small: bool, folder: Path) -> CheckResult:
    """Runs the check in this process."""
    start = time.monotonic()
    limits: list[str] = []
    figures, problems = {}, []
    try:
        outcome, limits = _outcome(check, device, small, folder)
        figures, problems = dict(outcome.figures), [problem[:_MAX_PROBLEM] for problem in outcome.problems]
        verdict = "failed" if problems else "passed"
    except Skipped as reason:
        verdict, problems = "skipped", [str(reason)]
    except Exception:  # the code that is checked: whatever it raises is a result
        verdict, problems = "error", traceback.format_exc().splitlines()[-12:]
    seconds = time.monotonic() - start
    return CheckResult(check.name, verdict, round(seconds, 2), check.limit_s, figures, limits, problems)


def _outcome(check: Check, device: str, small: bool, folder: Path) -> tuple[Outcome, list[str]]:
    if check.transformer_engine and find_spec("transformer_engine") is None:
        raise Skipped("Transformer Engine is not installed")
    if check.needs_gpu and device != "cuda":
        raise Skipped("it needs a GPU: Megatron moves only what is on one")
    for library in ("GLOO", "NCCL"):  # a machine without a network may not know its own name
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")  # what Megatron-Core says of itself at import
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    from minpro_megatron.gpu_checks import older_torch

    older_torch.install()
    module = importlib.import_module(f"minpro_megatron.gpu_checks.{check.module}")
    shapes, limits = module.SMALL if small else module.FULL
    shapes = replace(shapes, **check.options)
    shown = [str(limit) for limit in limits]
    tempfile.tempdir = str(folder)
    if not check.on_mesh:
        from minpro_megatron.parallel.device import select_device

        return module.check(select_device(device), shapes, limits), shown
    from minpro_megatron.config.parallel import ParallelConfig
    from minpro_megatron.parallel.mesh import open_mesh

    place = {"init_method": f"file://{folder}/rendezvous", "rank": 0, "world_size": 1}
    with open_mesh(ParallelConfig(), device, seed=1, **place) as mesh:
        return module.check(mesh, shapes, limits), shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(BY_NAME))
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    result = result_of(BY_NAME[options.name], options.device, options.small, options.folder)
    options.result.write_text(json.dumps(asdict(result)), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # a thread may wait for ever in what was found not to return


if __name__ == "__main__":
    main()
