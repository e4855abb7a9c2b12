"""A command whose options are settings under other names: its messages name the options."""

from pathlib import Path

import pytest

from minpro_megatron.__main__ import main
from tests.support.hf_models import MIXTURE, make_model


@pytest.mark.parametrize("command", ["compare-logits --text 48/2=", "convert to-megatron --output OUT", "convert plan"])
def test_a_missing_model_folder_is_named_by_its_option(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command.replace("OUT", str(tmp_path / "out")).split()
    assert main([*arguments, "--hf", f"{tmp_path}/none"]) == 2
    line = f"error: --hf = {tmp_path}/none: there is no config.json; give a Hugging Face model folder\n"
    assert capsys.readouterr().err == line


def test_a_missing_megatron_folder_is_found_before_ranks_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    status = main(["compare-logits", "--hf", str(hf), "--megatron", f"{tmp_path}/none", "--ids", "1,2"])
    assert (status, capsys.readouterr().err) == (
        2,
        f"error: {tmp_path}/none: there is no manifest.json, so this is not a complete Megatron checkpoint; run "
        "`minpro convert`\n",
    )
