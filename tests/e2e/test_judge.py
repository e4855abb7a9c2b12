"""A run whose rewards come from a second SGLang server with a rubric: docs/examples/judge.py."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from docs.examples.judge import ACCEPT, REFUSE, judge_prompt
from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.prompts import load_prompts
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.serving.ports import free_ports
from tests.e2e.conftest import ROOT, SMALL_RUN, Launcher, TinyModel

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine's stand-ins are not for GPU machines"),
]

CONTEXT_TOKENS = 512
READY_WITHIN_S = 400


@pytest.fixture
def judge(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server of its own, which the run neither starts nor changes. Its model has random weights."""
    (port,) = free_ports("127.0.0.1", 1)
    options = {
        "--model-path": tiny_model.hf, "--port": port, "--device": "cpu", "--dtype": "float32",
        "--attention-backend": "torch_native", "--sampling-backend": "pytorch", "--context-length": CONTEXT_TOKENS,
        "--max-total-tokens": 8 * CONTEXT_TOKENS, "--max-running-requests": 8,
    }  # fmt: skip
    command = [sys.executable, "-m", "minpro_megatron.serving.sglang_main", "--skip-server-warmup", "--sleep-on-idle"]
    command += [str(part) for option in options.items() for part in option]
    environment = os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "judge.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(url, process, tmp_path / "judge.log")
            monkeypatch.setenv("JUDGE_URL", url)
            monkeypatch.setenv("JUDGE_MODEL", str(tiny_model.hf))
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_rewards_are_the_judges_probabilities(judge: str, tiny_model: TinyModel, launches: Launcher) -> None:
    """Those that transformers computes from the judge's weights."""
    settings = (*SMALL_RUN, "debug.trainer=timer", "debug.timer_step_s=0", "num_global_steps=2", "reward.timeout_s=60")
    run = launches("judged", *settings, "reward.function=docs.examples.judge:grade")
    status, output = run.wait(500)
    assert status == 0, output
    with JournalReader(run.run_dir) as reader:
        groups = [group for group in reader.groups() if group.state == "consumed"]
    assert len(groups) == 2 * 4
    prompts = {prompt.id: prompt for prompt in load_prompts(ROOT / "recipes/data/calculator_train.jsonl", "train")}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.hf)
    decoder = TextTokenizer(str(tiny_model.hf), read_model_facts(str(tiny_model.hf)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model.hf)
    accept, refuse = (tokenizer.encode(text, add_special_tokens=False)[0] for text in (ACCEPT, REFUSE))
    rewards = []
    for group in groups:
        prompt = prompts[group.prompt_id]
        for response in group.responses:
            assert response.token_ids is not None
            (text,) = decoder.response_texts([response.token_ids])
            asked = tokenizer(judge_prompt(prompt.text, prompt.answer, text), return_tensors="pt")
            with torch.no_grad():
                logits = model(**asked).logits[0, -1].double()
            expected = torch.sigmoid(logits[accept] - logits[refuse]).item()
            assert response.reward == pytest.approx(expected, abs=1e-4)
            rewards.append(response.reward)
    assert len(rewards) == 32
    assert max(rewards) - min(rewards) > 1e-3  # the judge's verdict depends on the response
