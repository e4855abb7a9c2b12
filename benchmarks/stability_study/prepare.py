"""The study's model and prompts, made once in artifacts/stability_study."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

from minpro_megatron.files.replacement import new_folder
from minpro_megatron.prompt_sets import calculator_steps, rows
from minpro_megatron.recipes import stability_study
from minpro_megatron.rewards.calculator_steps import worked

ROOT = Path(__file__).resolve().parents[2]
# Eight readings, each wrong in a sixth of the warm start's answers: about a fifth of the samples are correct overall.
# With the third of tools/make_tiny_model.py it is one in fifty, and four groups in five have no gradient.
WRONG_SHARE = 0.17
NUM_TRAINING, NUM_HELDOUT = 2000, 96


def prepare(folder: Path = stability_study.FOLDER) -> None:
    """Makes the model in both forms and the two prompt files if they are missing."""
    for name, count, held_out in (("train", NUM_TRAINING, False), ("heldout", NUM_HELDOUT, True)):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows.write_prompts(path, _rows(calculator_steps.draw(count, 1, held_out)))
    if not (folder / "hf" / "config.json").exists():
        _make_model(folder)
    if not (folder / "megatron" / "manifest.json").exists():
        convert = ["tools/convert_checkpoint.py", "to-megatron", "--hf", folder / "hf", "--output", folder / "megatron"]
        subprocess.run([sys.executable, *map(str, convert)], cwd=ROOT, check=True)


def fingerprint(folder: Path = stability_study.FOLDER) -> str:
    """16 hexadecimal digits of model and prompts: curves with different ones cannot be compared."""
    digest = sha256()
    for name in ("hf/model.safetensors", "train.jsonl", "heldout.jsonl"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def _rows(prompts: list[str]) -> list[dict[str, str]]:
    return [
        {
            "id": prompt.removesuffix("="),
            "source": "calculator-steps",
            "prompt": prompt,
            "answer": worked(prompt),
        }
        for prompt in prompts
    ]


def _make_model(folder: Path) -> None:
    """As tools/make_tiny_model.py does, with another share of wrong readings."""
    import torch
    from rich.console import Console

    from minpro_megatron.tiny_model import (
        warm_start as make_tiny_model,  # imports transformers, which takes seconds and is not needed to resume a study
    )

    torch.set_num_threads(1)
    task = make_tiny_model.TASKS["calculator_steps"]
    settings = replace(task.settings, wrong_share=WRONG_SHARE)
    heldout = make_tiny_model.read_pairs(folder / "heldout.jsonl")
    tokenizer = make_tiny_model.build_tokenizer()
    model = make_tiny_model.build_model(tokenizer, task.hidden_size, 2, settings.seed)
    with torch.no_grad():  # transformers' own choice, with which the stored curves were made; see stability_study.md
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(make_tiny_model.PAD)] = 0
    make_tiny_model.warm_start(model, tokenizer, task.pairs(heldout), settings, Console(), task.spoiled)
    measured = make_tiny_model.accuracy(model, tokenizer, heldout)
    record = {"settings": asdict(settings), "heldout_accuracy": asdict(measured)}
    with new_folder(folder / "hf") as partial:
        (partial / "warm_start.json").write_text(json.dumps(record, indent=2) + "\n")
        make_tiny_model.save_checkpoint(partial, model, tokenizer)
