"""A run whose checkpoint was damaged while it was stored is refused once, with what to do; and goes on after that."""

import re
from pathlib import Path

import pytest

from minpro_megatron.checkpoints.resume_point import read_latest
from tests.e2e.conftest import SMALL_RUN, Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(480)]


def test_a_flipped_bit_is_refused_with_status_2_and_the_checkpoint_to_go_on_from(launches: Launcher) -> None:
    settings = (*SMALL_RUN, "checkpoint.every_steps=1")
    first = launches("stored", *settings, "num_global_steps=3")
    status, output = first.wait(170)
    assert status == 0, output
    checkpoints = first.run_dir / "checkpoints"
    shard: Path = checkpoints / "step-000003" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    status, output = launches("stored", *settings, "num_global_steps=5").wait(170)
    assert status == 2, output
    (reason,) = re.findall(r"^  \| (.*)$", output, re.MULTILINE)
    assert reason == (
        f"train: {shard}: its SHA-256 is not the one in manifest.json; step-000002 is intact: write this name into "
        f"{checkpoints / 'latest'} to resume from it"
    )
    assert "\ncorrect that, then launch again; " in output
    assert "same command" not in output

    (checkpoints / "latest").write_text("step-000002\n")
    status, output = launches("stored", *settings, "num_global_steps=5").wait(170)
    assert status == 0, output
    latest = read_latest(first.run_dir)
    assert latest is not None
    assert latest.policy_version == 5
