"""A model folder whose chat template and special tokens can be chosen."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_model(folder: Path, template: str | None, **settings: Any) -> Path:
    """A tokenizer that knows characters, and writes <bos> before every text if it is let."""
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
    for character in map(chr, [10, *range(32, 127)]):
        vocabulary[character] = len(vocabulary)
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<unk>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"])
    saved = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", add_bos_token=True, chat_template=template
    )
    saved.save_pretrained(folder)
    if settings:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder
