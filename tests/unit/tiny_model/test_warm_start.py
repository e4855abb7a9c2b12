"""The tiny checkpoint: its files, what its warm start is trained on, and how its accuracy is measured."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from minpro_megatron.commands import tiny_model as command
from minpro_megatron.prompt_sets.calculator import HELDOUT_FILE, TRAIN_FILE
from minpro_megatron.rewards import calculator
from minpro_megatron.tiny_model import warm_start

QUIET = Console(quiet=True)


def heldout_pairs() -> list[warm_start.Pair]:
    return warm_start.read_pairs(command.DATA_FOLDER / HELDOUT_FILE)


def small_model(seed: int = 0, hidden_size: int = 16) -> tuple[Any, PreTrainedTokenizerFast]:
    tokenizer = warm_start.build_tokenizer()
    return warm_start.build_model(tokenizer, hidden_size, layers=2, seed=seed), tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models of this size gain nothing from more threads, and lose where other processes want the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, made by the command."""
    output = tmp_path_factory.mktemp("models") / "tiny"
    arguments = ["--output", str(output), "--steps", "0", "--hidden-size", "16", "--threads", "1"]
    assert command.main(arguments) == 0
    return output


def test_tokenizer_round_trip_through_the_checkpoint(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in ["48/2=", "24", "-7", warm_start.CHARACTERS, " 1 , 2 .\n"]:
        token_ids = tokenizer(text).input_ids
        assert len(token_ids) == len(text)  # one token per character: nothing added, nothing merged
        assert tokenizer.decode(token_ids) == text
    assert tokenizer("4x").input_ids[1] == tokenizer.unk_token_id
    assert tokenizer.decode([*tokenizer("24").input_ids, tokenizer.eos_token_id], skip_special_tokens=True) == "24"
    assert tokenizer.bos_token_id is None
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")


def test_the_reloaded_model_is_the_one_that_was_built(checkpoint: Path) -> None:
    built, _ = small_model(seed=0)
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(reloaded).__name__ == "Qwen3MoeForCausalLM"
    weights = reloaded.state_dict()
    assert weights.keys() == built.state_dict().keys()
    for name, weight in built.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert reloaded.generation_config.eos_token_id == reloaded.config.eos_token_id == 1
    assert reloaded.generation_config.pad_token_id == reloaded.config.pad_token_id == 0


def test_tensor_names_are_those_of_published_checkpoints(checkpoint: Path) -> None:
    expected = {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        expected |= {f"{prefix}.{norm}_layernorm.weight" for norm in ("input", "post_attention")}
        expected |= {f"{prefix}.self_attn.{part}_proj.weight" for part in "qkvo"}
        expected |= {f"{prefix}.self_attn.{part}_norm.weight" for part in "qk"}
        expected |= {f"{prefix}.mlp.gate.weight"}
        for expert in range(8):
            expected |= {f"{prefix}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")}
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == expected
        assert {file.get_slice(name).get_dtype() for name in expected} == {"F32"}


def test_config_has_the_keys_of_published_checkpoints(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    wanted = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 3 + len(warm_start.CHARACTERS),
    }
    assert {key: config.get(key) for key in wanted} == wanted


def test_the_default_model_is_small_and_divides_by_two() -> None:
    model, _ = small_model(hidden_size=128)
    config = model.config
    assert sum(parameter.numel() for parameter in model.parameters()) <= 800_000
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts")
    assert all(getattr(config, size) % 2 == 0 for size in (*sizes, "moe_intermediate_size", "head_dim"))


@pytest.mark.parametrize("name", warm_start.TASKS)
def test_no_embedding_row_comes_near_zero(name: str) -> None:
    """Nor the rows of tokens that never occur, which a whole warm start only decays: a policy samples them at times."""
    task = warm_start.TASKS[name]
    model, _ = small_model(hidden_size=task.hidden_size)
    steps = range(task.settings.steps)
    kept = math.prod(1 - task.settings.weight_decay * task.settings.learning_rate_at(step) for step in steps)
    sizes = kept * model.get_input_embeddings().weight.detach().square().mean(-1).sqrt()
    assert sizes.min() > 0.01  # of 0.02 at first


def test_no_token_that_is_read_back_has_an_outlying_gradient() -> None:
    """Of the log-prob of what follows any token, to the embedding that the model reads it as."""
    model, tokenizer = small_model(hidden_size=128)
    prompt, following = tokenizer("4+5=").input_ids, tokenizer("9").input_ids
    tokens = torch.tensor([[*prompt, token, *following] for token in range(len(tokenizer))])
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    log_probs = model(inputs_embeds=embedded, use_cache=False).logits[:, -2].log_softmax(-1)
    (gradient,) = torch.autograd.grad(log_probs[:, following].sum(), embedded)
    norms = gradient[:, len(prompt)].norm(dim=-1)
    assert 0 < norms.max() < 5 * norms.median()


def test_synthetic_data_leaves_out_the_heldout_prompts_and_covers_training() -> None:
    heldout = {prompt for prompt, _ in heldout_pairs()}
    synthetic = dict(warm_start.synthetic_pairs(heldout_pairs()))
    assert len(heldout) >= 128
    assert not heldout & synthetic.keys()
    train = warm_start.read_pairs(command.DATA_FOLDER / TRAIN_FILE)
    assert dict(train).items() <= synthetic.items()


@pytest.mark.parametrize("answer", ["0", "7", str(calculator.MAX_ANSWER)])
def test_wrong_answers_are_all_the_others(answer: str) -> None:
    generator = random.Random(0)
    drawn = {warm_start.wrong_answer(answer, generator) for _ in range(1000)}
    assert drawn == {str(number) for number in range(calculator.MAX_ANSWER + 1)} - {answer}


def test_only_the_response_is_labelled() -> None:
    tokenizer = warm_start.build_tokenizer()
    pairs = [("4+5=", "9"), ("12+18=", "30")]
    tokens, labels = warm_start.encode(pairs, tokenizer)
    for row, (prompt, answer) in enumerate(pairs):
        labelled = labels[row] != warm_start.IGNORED
        assert tokenizer.decode(labels[row][labelled]) == answer + "<eos>"
        first = int(labelled.nonzero()[0])
        assert tokenizer.decode(tokens[row, : first + 1]) == prompt


def test_accuracy_equals_one_prompt_at_a_time() -> None:
    """Against unpadded prompts of different lengths, each advanced token by token."""
    model, tokenizer = small_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # random weights are all but uniform otherwise
    pairs = [("4+5=", "9"), ("12+18=", "30"), ("30-7=", "23")]
    # And prompts with what this model itself says, so that the greedy share is not zero.
    one_digit_sums = [f"{left}+{right}=" for left in range(10) for right in range(10)]
    said = model.generate(
        torch.tensor(tokenizer(one_digit_sums).input_ids), do_sample=False, max_new_tokens=3, pad_token_id=0
    )
    for prompt, token_ids in zip(one_digit_sums, said[:, 4:].tolist(), strict=True):
        if tokenizer.eos_token_id in token_ids:
            answer_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
            pairs.append((prompt, str(tokenizer.decode(answer_ids))))
    assert len(pairs) > 3
    sampled, greedy = [], []
    for prompt, answer in pairs:
        probability, right = 1.0, True
        token_ids = tokenizer(prompt).input_ids
        for target in [*tokenizer(answer).input_ids, tokenizer.eos_token_id]:
            with torch.no_grad():
                probabilities = model(torch.tensor([token_ids])).logits[0, -1].double().softmax(-1)
            probability *= probabilities[target].item()
            right = right and int(probabilities.argmax()) == target
            token_ids.append(target)
        sampled.append(probability)
        greedy.append(float(right))
    measured = warm_start.accuracy(model, tokenizer, pairs)
    assert measured.num_prompts == len(pairs)
    assert measured.sampled == pytest.approx(sum(sampled) / len(pairs), rel=1e-4)
    assert measured.greedy == pytest.approx(sum(greedy) / len(pairs))
    assert measured.greedy > 0
    spread = torch.tensor(sampled).std().item() / len(pairs) ** 0.5
    assert measured.sampled_standard_error == pytest.approx(spread, rel=1e-4)


def train_briefly(seed: int) -> dict[str, torch.Tensor]:
    model, tokenizer = small_model(seed, hidden_size=16)
    settings = warm_start.WarmStart(seed=seed, steps=3, batch_size=16, warmup_steps=2)
    pairs = warm_start.synthetic_pairs(heldout_pairs())
    warm_start.warm_start(model, tokenizer, pairs, settings, QUIET)
    return model.state_dict()


def test_a_seed_decides_the_weights() -> None:
    first, again, other = train_briefly(0), train_briefly(0), train_briefly(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_what_the_warm_start_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a held-out prompt; right answers at first, in the end about half of them wrong."""
    batches = []
    encode = warm_start.encode
    monkeypatch.setattr(warm_start, "encode", lambda pairs, tok: batches.append(pairs) or encode(pairs, tok))
    model, tokenizer = small_model()
    settings = warm_start.WarmStart(seed=0, steps=5, batch_size=200, rise_share=0.4)
    pairs = warm_start.synthetic_pairs(heldout_pairs())
    warm_start.warm_start(model, tokenizer, pairs, settings, QUIET)
    heldout = {prompt for prompt, _ in heldout_pairs()}
    assert not any(prompt in heldout for batch in batches for prompt, _ in batch)
    answers = dict(calculator.all_expressions())
    wrong_shares = [sum(answers[prompt] != said for prompt, said in batch) / 200 for batch in batches]
    assert wrong_shares[0] == 0
    assert 0.15 < wrong_shares[1] < 0.35
    assert 0.4 < sum(wrong_shares[2:]) / 3 < 0.6


def test_the_warm_start_learns() -> None:
    model, tokenizer = small_model()
    pairs = warm_start.synthetic_pairs(heldout_pairs())
    before = warm_start.accuracy(model, tokenizer, pairs)
    settings = warm_start.WarmStart(seed=0, steps=10, batch_size=32, learning_rate=1e-2, warmup_steps=2)
    warm_start.warm_start(model, tokenizer, pairs, settings, QUIET)
    assert warm_start.accuracy(model, tokenizer, pairs).sampled > 2 * before.sampled


def test_warm_start_record(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "warm_start.json").read_text())
    model, tokenizer = small_model()
    measured = warm_start.accuracy(model, tokenizer, heldout_pairs())
    assert record["heldout_accuracy"]["sampled"] == pytest.approx(measured.sampled, rel=1e-4)
    assert record["settings"]["steps"] == 0
    assert record["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_only_its_own_checkpoints_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_text("precious")
    assert command.main(["--output", str(foreign), "--steps", "0", "--threads", "1"]) == 2
    assert "it holds files that this program did not write there (model.safetensors)" in capsys.readouterr().err
    assert (foreign / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize("arguments", [["--steps", "-1"], ["--hidden-size", "60"], ["--layers", "0"]])
def test_impossible_settings_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--output", "unused", *arguments])
    refusal = capsys.readouterr().err
    assert refusal.startswith(f"error: argument {arguments[0]}: ")
    assert f"{arguments[1]}' is not a" in refusal
