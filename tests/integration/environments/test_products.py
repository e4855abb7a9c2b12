"""The turns of the task of products, as the warm start and as an episode write them."""

from pathlib import Path

from transformers import AutoTokenizer

from minpro_megatron.commands import tiny_model
from minpro_megatron.environments.framing import Framing
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.chat_template import ChatTemplate
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.tiny_model import warm_start


def test_the_model_reads_its_turns_as_an_episode_presents_them(tmp_path: Path) -> None:
    """The chat template frames the calculator's answer with the same tokens as the warm start's text."""
    output = str(tmp_path / "hf")
    arguments = ["--task", "products", "--output", output, "--steps", "0", "--hidden-size", "16"]
    assert tiny_model.main(arguments) == 0
    template, facts = ChatTemplate(output, {}), read_model_facts(output, [])
    framing = Framing.of(template, TextTokenizer(output, facts), facts.stop_token_ids, "tool", 16)
    assert template.render_all(["347*581="]) == ["347*581="]
    ids = AutoTokenizer.from_pretrained(output)("347*581=347*581<eos>:201607=").input_ids
    read, written = "347*581=347*581<eos>:201607=", "201607"
    tokens, labels = warm_start.encode([(read, written)], warm_start.build_tokenizer())
    assert tokens[0, : len(ids)].tolist() == ids
    assert (labels[0] != warm_start.IGNORED).tolist() == [False] * (len(ids) - 1) + [True] * 7
    assert ids[-len(framing.framed("201607")) :] == framing.framed("201607").tolist()
    assert ids[-len(framing.framed("201607")) - 1] in facts.stop_token_ids
