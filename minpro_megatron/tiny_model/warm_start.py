"""A tiny Qwen3-MoE checkpoint in Hugging Face format, warm-started on a calculator task.

The warm start is supervised, on expressions of the calculator task with a deliberate fraction of wrong answers.
The model then knows most answers (greedy decoding is mostly correct) without giving them reliably (sampling is mostly
wrong), which reinforcement learning can improve. Held-out prompts are never trained on.
"""

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minpro_megatron.files.replacement import check_replaceable, new_folder
from minpro_megatron.prompt_sets import calculator_steps, products, rows
from minpro_megatron.prompt_sets.calculator import HELDOUT_FILE
from minpro_megatron.rewards import calculator

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-*/=(). ,:$%\n"
_TOKENS = re.compile(rf"{EOS}|[\s\S]")
IGNORED = -100  # the label that cross_entropy skips
LINES_EVERY_STEPS = 100  # steps between progress lines if there is no terminal for a live display

Pair = tuple[str, str]  # (prompt, answer), such as ("48/2=", "24")


@dataclass(frozen=True)
class WarmStart:
    """How the warm start is trained: on one machine type these settings decide the weights.

    The fraction of wrong answers (of wrong steps, if an answer has several) rises from 0 to `wrong_share` over the
    first `rise_share` of the steps. With wrong answers from the first step on, arithmetic is learned slowly; if all
    of them start at once later, most of it is forgotten.
    """

    seed: int
    steps: int
    batch_size: int = 128
    learning_rate: float = 2.5e-3
    warmup_steps: int = 30
    weight_decay: float = 0.1
    wrong_share: float = 0.5
    rise_share: float = 0.6

    def wrong_share_at(self, step: int) -> float:
        """The fraction (0 to 1) of the answers drawn at `step` (from 0) that are wrong."""
        return self.wrong_share * min(step / (self.rise_share * self.steps), 1)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then linear decay towards 0."""
        return self.learning_rate * min((step + 1) / self.warmup_steps, 1 - step / self.steps)


@dataclass(frozen=True)
class Accuracy:
    """Fractions (0 to 1) of held-out prompts solved, with standard errors over the prompts."""

    num_prompts: int
    sampled: float
    sampled_standard_error: float
    greedy: float
    greedy_standard_error: float


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer: 3 special tokens, then CHARACTERS; any other character becomes `<unk>`.

    It adds no begin and no end token: the prompt `48/2=` is exactly its five characters.
    """
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNK, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    # `[\s\S]` instead of `.`, because the newline is also a character of the vocabulary.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, seed: int) -> Qwen3MoeForCausalLM:
    """A randomly initialised float32 Qwen3-MoE whose heads, experts and layers divide by two in every way."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        moe_intermediate_size=hidden_size // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,  # pyright: ignore[reportCallIssue]: undeclared, but kept and read by the model
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=False,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    # transformers leaves the row of <pad> at zero. But a policy may sample <pad> and then read it: through the norms of
    # layer, queries and keys, each a factor of 1 / sqrt(1e-6) at zero, its gradient is 1e4 times that of the others.
    rows = model.model.embed_tokens.weight
    torch.nn.init.normal_(rows[tokenizer.convert_tokens_to_ids(PAD)], std=config.initializer_range)
    return model


def save_checkpoint(output: Path, model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the checkpoint files into the existing folder `output`, `config.json` last."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    config_path = output / "config.json"
    config = json.loads(config_path.read_text())
    config_path.unlink()
    # transformers 5 saves `num_local_experts`, `rope_parameters` and `dtype`; the published Qwen3-MoE checkpoints
    # have the older keys, and programs that read those must be able to read this one.
    config["num_experts"] = config.pop("num_local_experts")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_pairs(path: Path) -> list[Pair]:
    """The prompt and answer of every row of a prompt file; raises rows.DamagedRow with file, row, field and rule."""
    return [
        (rows.text_field(path, number, row, "prompt"), rows.text_field(path, number, row, "answer"))
        for number, row in rows.read_jsonl(path)
    ]


def synthetic_pairs(heldout: list[Pair]) -> list[Pair]:
    """Every expression of the task with its right answer, except the held-out prompts."""
    excluded = {prompt for prompt, _ in heldout}
    return [pair for pair in calculator.all_expressions() if pair[0] not in excluded]


def wrong_answer(answer: str, generator: random.Random) -> str:
    """One of the task's answers other than `answer`, all equally likely."""
    wrong = generator.randrange(calculator.MAX_ANSWER)
    return str(wrong if wrong < int(answer) else wrong + 1)


def spoiled_answer(pair: Pair, wrong_share: float, generator: random.Random) -> Pair:
    """The pair, with a different answer in the fraction `wrong_share` of all calls."""
    prompt, answer = pair
    wrong = generator.random() < wrong_share
    return prompt, wrong_answer(answer, generator) if wrong else answer


@dataclass(frozen=True)
class Task:
    """What a warm start teaches: prompts with correct answers, how they are made wrong, and the size of the model."""

    heldout_file: str
    pairs: Callable[[list[Pair]], list[Pair]]  # for everything except the held-out pairs
    spoiled: Callable[[Pair, float, random.Random], Pair]
    settings: WarmStart
    hidden_size: int
    chat_template: str | None = None  # of the tokenizer, for a task with an environment


TASKS = {
    "calculator": Task(HELDOUT_FILE, synthetic_pairs, spoiled_answer, WarmStart(seed=0, steps=1400), 128),
    # Each of eight steps is wrong in a third of the samples, so rarely all are correct.
    "calculator_steps": Task(
        calculator_steps.HELDOUT_FILE,
        calculator_steps.synthetic_pairs,
        calculator_steps.spoiled,
        WarmStart(seed=0, steps=400, batch_size=64, learning_rate=5e-3, wrong_share=0.35),
        64,
    ),
    # Half of the first turns are calls and the others answers at once. The measured accuracy is of answers at once.
    "products": Task(
        products.HELDOUT_FILE,
        products.synthetic_pairs,
        products.spoiled,
        WarmStart(seed=0, steps=1000, batch_size=64, learning_rate=5e-3),
        64,
        products.CHAT_TEMPLATE,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TinyModelOptions:
    """The options of the command line; None: the task's own value."""

    output: Path
    task: str = "calculator"
    seed: int = 0
    steps: int | None = None
    hidden_size: int | None = None
    layers: int = 2
    data: Path


def encode(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and next-token labels, both int64 [pairs, longest - 1]; only answers and end tokens have labels.

    Rows are padded on the right, where causal attention keeps the padding out of every labelled position.
    """
    # One character is one token: looking characters up is some 50 times faster than calling the tokenizer.
    vocabulary = tokenizer.get_vocab()

    def ids(text: str) -> list[int]:
        return [vocabulary[token] for token in _TOKENS.findall(text)]

    parts = [(ids(prompt), ids(answer + EOS)) for prompt, answer in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in parts)
    padding = [longest - len(prompt) - len(answer) for prompt, answer in parts]
    tokens = torch.tensor(
        [[*one, *two, *[vocabulary[PAD]] * left] for (one, two), left in zip(parts, padding, strict=True)]
    )
    labels = torch.tensor(
        [[IGNORED] * len(one) + two + [IGNORED] * left for (one, two), left in zip(parts, padding, strict=True)]
    )
    return tokens[:, :-1], labels[:, 1:]


@contextmanager
def training_progress(console: Console, num_steps: int) -> Iterator:
    """Yields `report(step, loss)`: a live line on a terminal, else one plain line every LINES_EVERY_STEPS."""
    started = time.monotonic()
    columns = (
        TextColumn("warm start"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.1f} steps/s  left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=num_steps, loss=math.nan, rate=0.0)

        def report(step: int, loss: float) -> None:
            rate = step / max(time.monotonic() - started, 1e-9)
            progress.update(task, completed=step, loss=loss, rate=rate)
            if not console.is_terminal and (step % LINES_EVERY_STEPS == 0 or step == num_steps):
                left_s = (num_steps - step) / rate
                console.print(f"step {step}/{num_steps}  loss {loss:.3f}  {rate:.1f} steps/s  {left_s:.0f} s left")

        yield report


def warm_start(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Pair],
    settings: WarmStart,
    console: Console,
    spoiled: Callable[[Pair, float, random.Random], Pair] = spoiled_answer,
) -> None:
    """Train `model` in place on prompts drawn from `pairs`, answered as `spoiled` says."""
    generator = random.Random(settings.seed)
    # grouped_mm, the default, is not faster at this size, and far slower if other processes use the same cores.
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True)
    model.train()
    with training_progress(console, settings.steps) as report:
        for step in range(settings.steps):
            drawn = generator.choices(pairs, k=settings.batch_size)
            batch = [spoiled(pair, settings.wrong_share_at(step), generator) for pair in drawn]
            tokens, labels = encode(batch, tokenizer)
            logits = model(tokens, use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            optimizer.step()
            report(step + 1, loss.item())
    model.eval()


@torch.no_grad()
def accuracy(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> Accuracy:
    """The fraction of prompts that one response solves, sampled at temperature 1 and decoded greedily.

    The sampled fraction is the mean probability of the correct answer and its end token: the limit of infinitely many
    samples per prompt, so that its standard error has no sampling part.
    """
    tokens, labels = encode(pairs, tokenizer)
    log_probs = model(tokens, use_cache=False).logits.float().log_softmax(-1)
    response = labels != IGNORED
    token_log_probs = log_probs.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    sampled = (token_log_probs * response).sum(dim=1).exp()
    greedy = ((log_probs.argmax(-1) == labels) | ~response).all(dim=1).float()
    root = math.sqrt(len(pairs))
    return Accuracy(
        num_prompts=len(pairs),
        sampled=sampled.mean().item(),
        sampled_standard_error=sampled.std().item() / root,
        greedy=greedy.mean().item(),
        greedy_standard_error=greedy.std().item() / root,
    )


def make_checkpoint(options: TinyModelOptions, console: Console) -> Accuracy:
    """Builds, trains, measures and saves the model that `options` describe."""
    check_replaceable(options.output)
    task = TASKS[options.task]
    heldout = read_pairs(options.data / task.heldout_file)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = task.chat_template
    hidden_size = task.hidden_size if options.hidden_size is None else options.hidden_size
    model = build_model(tokenizer, hidden_size, options.layers, options.seed)
    steps = task.settings.steps if options.steps is None else options.steps
    settings = replace(task.settings, seed=options.seed, steps=steps)
    started, started_cpu = time.monotonic(), time.process_time()
    if settings.steps:
        warm_start(model, tokenizer, task.pairs(heldout), settings, console, task.spoiled)
    measured = accuracy(model, tokenizer, heldout)
    record = {
        "settings": asdict(settings),
        "heldout_accuracy": asdict(measured),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(time.process_time() - started_cpu, 1),
    }
    with new_folder(options.output) as folder:
        (folder / "warm_start.json").write_text(json.dumps(record, indent=2) + "\n")
        save_checkpoint(folder, model, tokenizer)
        for path in folder.iterdir():  # safetensors files are private to their owner; others on a cluster need them too
            path.chmod(0o644)
    return measured
