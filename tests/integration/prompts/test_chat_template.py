"""Chat templates: the same text and tokens as transformers', and templates that misbehave end with one line."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.run import with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.prompts import template_process
from minpro_megatron.prompts.chat_template import ChatTemplate
from minpro_megatron.prompts.prompts import tokenize
from minpro_megatron.prompts.rendering import make_rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt
from minpro_megatron.roles import collect
from tests.support.chat_models import write_model
from tests.support.rollout_fakes import run_config, write_rows

# With everything that Qwen3's template uses: a default system turn, a namespace over a reversed loop, text cut out of
# turns, tojson, whitespace control, and a switch that fills the beginning of the answer.
QWEN_LIKE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant. ' + {'role': 'x<y'} | tojson + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" and '<tool_response>' in message.content %}
        {{- raise_exception('no tools here') }}
    {%- elif message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content|trim + '<|im_end|>' + '\\n' }}
    {%- else %}
        {% generation %}{{- message.content.split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
WITH_BEGIN = """\
{{ bos_token }}{% for message in messages %}
  {% if loop.first %}
[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}
  {% endif %}
{% endfor %}
{% if tools is none and documents is none %}none{% endif %}{{ pad_token }}{{ strftime_now('%Y')[:2] }}
"""
QUESTIONS = ["1+1=?", " two\nlines <|im_end|> & {{ braces }} ", "ü"]


def text_tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(str(folder), ModelFacts(vocabulary_size=128, stop_token_ids=(2,), max_position_embeddings=64))


def expected(folder: Path, questions: list[str], *, tokens: bool, **arguments: Any) -> Any:
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [[{"role": "user", "content": question}] for question in questions]
    return theirs.apply_chat_template(
        turns, tokenize=tokens, add_generation_prompt=True, return_dict=False, **arguments
    )


@pytest.mark.parametrize("template", [QWEN_LIKE, WITH_BEGIN], ids=["qwen", "begin"])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False, "eos_token": "end"}])
def test_text_and_tokens_are_those_of_transformers(tmp_path: Path, template: str, arguments: dict[str, Any]) -> None:
    model = write_model(tmp_path, template)
    data = DataConfig(train_file="", heldout_file="", chat_template=True, chat_template_arguments=arguments)
    rendering = make_rendering(data, str(model))
    prompts = [Prompt(id=str(n), source="s", text=text, answer="") for n, text in enumerate(QUESTIONS)]
    assert rendering.texts(prompts) == expected(model, QUESTIONS, tokens=False, **arguments)
    kept = tokenize(prompts, text_tokenizer(model), 500, "data.train_file", rendering)
    assert [one.token_ids.tolist() for one in kept] == expected(model, QUESTIONS, tokens=True, **arguments)
    begins = [tokenized.token_ids.tolist().count(1) for tokenized in kept]
    assert begins == ([1, 1, 1] if template == WITH_BEGIN else [0, 0, 0])  # never two, whatever the tokenizer adds


def test_a_system_message_comes_before_the_question(tmp_path: Path) -> None:
    model = write_model(tmp_path, QWEN_LIKE)
    prompts = [Prompt(id="0", source="s", text="1+1=?", answer="", system="Be brief.")]
    prompts += [Prompt(id="1", source="s", text="2+2=?", answer="")]
    turns = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1=?"}]]
    turns += [[{"role": "user", "content": "2+2=?"}]]
    theirs = PreTrainedTokenizerFast.from_pretrained(model)
    said = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, return_dict=False)
    data = DataConfig(train_file="", heldout_file="", chat_template=True)
    assert make_rendering(data, str(model)).texts(prompts) == said
    with pytest.raises(ValueError, match=r"data.chat_template = false: the prompt '0' has a system message"):
        make_rendering(DataConfig(train_file="", heldout_file=""), str(model)).texts(prompts)


def test_held_out_prompts_are_worded_as_training_ones(tmp_path: Path) -> None:
    """By the collector: instruction, then template; the held-out file is not filtered."""
    model = write_model(tmp_path / "hf", "<|im_start|>{{ messages[0].content }}<|im_end|>")
    for name in ("train", "heldout"):
        row = {"id": name, "source": "s", "prompt": f"{name}?", "answer": "", "pass_rate": 0.2 + (name == "train") / 2}
        write_rows(tmp_path / f"{name}.jsonl", [row])
    overrides = [f"data.{name}_file={tmp_path / name}.jsonl" for name in ("train", "heldout")]
    overrides += ["data.instruction=Q: {question}", "data.chat_template=true", "data.min_pass_rate=0.5"]
    overrides += [f"model.hf_path={model}", "sampling.max_prompt_tokens=40", "evaluation.num_prompts=1"]
    config = with_overrides(run_config(tmp_path), overrides)
    tokenizer = text_tokenizer(model)
    training, heldout, _ = collect._read_prompts(config, tokenizer)
    texts = [tokenizer.text(one.token_ids) for one in [*training, *heldout]]
    assert texts == ["<|im_start|>Q: train?<|im_end|>", "<|im_start|>Q: heldout?<|im_end|>"]


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": "config: {{ messages[0].content }}{{ eos_token }}"},
        {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "default {{ 1 }}"}]},
        {"eos_token": {"content": "<eos>", "__type": "AddedToken"}, "chat_template": "{{ eos_token }}|{{ pad_token }}"},
    ],
    ids=["text", "list", "token-object"],
)
def test_the_template_in_tokenizer_config_is_found(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = write_model(tmp_path, None, **settings)
    assert ChatTemplate(str(model), {}).render_all(["q"]) == expected(model, ["q"], tokens=False)


def test_special_tokens_of_the_older_file_count(tmp_path: Path) -> None:
    model = write_model(tmp_path, "{{ eos_token }}{{ bos_token }}{{ extra_special_tokens }}")
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "additional": ["x"]}')
    assert ChatTemplate(str(model), {}).render_all(["q"]) == expected(model, ["q"], tokens=False)
    assert ChatTemplate(str(model), {}).render_all(["q"]) == ["<|im_end|><bos>"]
    path = model / "tokenizer_config.json"
    newer = {"added_tokens_decoder": {"4": {"content": "<|im_end|>", "special": True}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | newer))
    assert ChatTemplate(str(model), {}).render_all(["q"]) == expected(model, ["q"], tokens=False) == ["<eos><bos>"]


def test_the_file_comes_before_the_config(tmp_path: Path) -> None:
    model = write_model(tmp_path, "from the file", chat_template="from the config")
    assert ChatTemplate(str(model), {}).render_all(["q"]) == expected(model, ["q"], tokens=False) == ["from the file"]


def test_a_model_without_template_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path, None)
    with pytest.raises(ValueError, match=r"data.chat_template = true: neither .*tokenizer_config.json .*; set"):
        ChatTemplate(str(model), {})
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template"')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not JSON"):
        ChatTemplate(str(model), {})


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{% for i in range(99999999) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_reaches_only_what_it_is_given(template: str, problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        template_process.render_all(template, {}, ["q"], [""])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ 'x' * 9999999999 }}", "MemoryError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"took more than 0.31 s"),
    ],
)
def test_a_template_that_fails_or_never_ends_is_one_line(tmp_path: Path, template: str, problem: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text(template)
    rule = rf"template in {tmp_path}/chat_template.jinja failed \(.*{problem}.*\); correct it, or set"
    with pytest.raises(ValueError, match=rule):
        ChatTemplate(str(tmp_path), {}).render_all(["q"], time_limit_s=0.3 if "took" in problem else 20)


def test_a_template_process_whose_collector_is_gone_ends_by_itself() -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    request = {"template": endless, "variables": {}, "questions": ["q"], "systems": [""]}
    request |= {"answer": None, "reply": None, "now": None, "memory_bytes": 2**31, "cpu_s": 1}
    command = [sys.executable, "-I", template_process.__file__]
    run = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=60)
    assert run.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


WITH_TOOLS = """\
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


@pytest.mark.parametrize("role", ["tool", "user"])
def test_an_answer_stands_between_the_templates_marks(tmp_path: Path, role: str) -> None:
    """The prompt, the response, and the answer between the two texts are the chat as transformers renders it."""
    folder = write_model(tmp_path, WITH_TOOLS)
    template = ChatTemplate(str(folder), {"enable_thinking": False})
    (prompt,) = template.render_all(["2+2?"])
    before, after = template.around_answer(role)
    assert before.startswith("<|im_end|>\n<|im_start|>user\n")
    chat = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "print(2+2)"},
        {"role": role, "content": "4"},
    ]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    first = prompt.removesuffix("<think>\n\n</think>\n\n")  # this template shows it only where a response is to come
    assert f"{first}print(2+2){before}4{after}" == expected
    assert after.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_template_that_does_not_show_answers_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "{% for message in messages %}{% if message.role != 'tool' %}{{ message.content }}"
                         "{% endif %}{% endfor %}")  # fmt: skip
    with pytest.raises(UserError, match="does not show a message of the role 'tool' as it is"):
        ChatTemplate(str(folder), {}).around_answer("tool")
