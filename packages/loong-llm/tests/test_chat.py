"""Assistant-only masks, written out by hand for the common styles of chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loong_core.data.rows import RowError
from loong_core.errors import DataError
from loong_llm.chat import Chat
from loong_llm.conversation import Conversation

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "</s>",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Thinking of earlier turns is stripped, the last turn always has a thinking block, as in Qwen3.
STRIPS_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.index0 > ns.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + answer }}{% else %}{{ answer }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt already opens the thinking block, and every finished turn loses its thinking, as in QwQ and DeepSeek-R1.
PROMPT_THINKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per byte, plus special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def learned(tokenizer: Any, template: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    """The stretches of text whose tokens count."""
    tokenizer.chat_template = template
    result = Chat(tokenizer, None, {}, **{"last_turn_only": False, **options}).encode([Conversation(messages)])[0]
    if isinstance(result, RowError):
        raise result
    tokens, mask = result
    text = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert tokens.tolist() == text
    stretches: list[list[int]] = []
    previous = False
    for token, counted in zip(tokens.tolist(), mask.tolist(), strict=True):
        if counted and not previous:
            stretches.append([])
        if counted:
            stretches[-1].append(token)
        previous = counted
    return [tokenizer.decode(stretch) for stretch in stretches]


def talk(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (CHATML_TAGGED, "<|im_end|>"), (LLAMA3, "<|eot_id|>")]
)
def test_every_assistant_turn_counts_with_its_end_of_turn(
    tokenizer: Any, template: str, end: str, system: str | None
) -> None:
    messages = talk("Hi", "Hello é!", "And\n\nnow?", "Bye 你", system=system)
    assert learned(tokenizer, template, messages) == [f"Hello é!{end}", f"Bye 你{end}"]


def test_only_the_last_turn_on_request(tokenizer: Any) -> None:
    for template in (CHATML, CHATML_TAGGED):
        assert learned(tokenizer, template, talk("a", "b", "c", "d"), last_turn_only=True) == ["d<|im_end|>"]


def test_a_conversation_that_ends_with_the_user(tokenizer: Any) -> None:
    assert learned(tokenizer, CHATML, talk("a", "b", "c")) == ["b<|im_end|>"]


def test_a_conversation_that_the_assistant_opens(tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "Hi"}]
    assert learned(tokenizer, CHATML, messages) == ["Welcome<|im_end|>"]


def test_stripped_thinking_of_earlier_turns(tokenizer: Any) -> None:
    messages = talk("1?", "<think>\nhm\n</think>\n\none", "2?", "<think>\nwell\n</think>\n\ntwo")
    assert learned(tokenizer, STRIPS_THINKING, messages) == [
        "one<|im_end|>",
        "<think>\nwell\n</think>\n\ntwo<|im_end|>",
    ]


def test_a_template_that_adds_thinking_to_the_last_turn(tokenizer: Any) -> None:
    messages = talk("1?", "one", "2?", "two")
    assert learned(tokenizer, STRIPS_THINKING, messages) == ["one<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"]


def test_a_prompt_that_opens_a_thinking_block(tokenizer: Any) -> None:
    messages = talk("1?", "<think>hm</think>one", "2?", " two ")
    assert learned(tokenizer, PROMPT_THINKS, messages) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_template_that_ignores_the_generation_prompt(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}{{ '\n' }}{% endfor %}"
    )
    messages = talk("1?", "<think>hm</think>one", "2?", "two")
    assert learned(tokenizer, template, messages) == ["one\n", "two\n"]


def test_templates_that_refuse_incomplete_conversations(tokenizer: Any) -> None:
    assert learned(tokenizer, MISTRAL, talk("a", "b", "c", "d")) == [" b</s>", " d</s>"]
    with pytest.raises(RowError, match="refuses the conversation.*roles alternate"):
        learned(tokenizer, MISTRAL, talk("a", "b", system="no"))


def test_a_template_without_special_tokens(tokenizer: Any) -> None:
    assert learned(tokenizer, PLAIN, talk("a", "b c", "d", "e")) == [" b c\n", " e\n"]


def test_tool_calls_of_a_rewritten_turn_count(tokenizer: Any) -> None:
    template = STRIPS_THINKING.replace(
        "{{ '<|im_end|>\n' }}{% endfor %}",
        "{% if m.tool_calls %}{{ '<call>' + m.tool_calls[0].name }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}",
    )
    call = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nwait", "tool_calls": [{"name": "now"}]}
    messages = [{"role": "user", "content": "1?"}, call, *talk("2?", "two")]
    assert learned(tokenizer, template, messages) == [
        "wait<call>now<|im_end|>",
        "<think>\n\n</think>\n\ntwo<|im_end|>",
    ]


def test_tool_calls_count(tokenizer: Any) -> None:
    template = CHATML.replace("m.content +", "m.content + ('<call>' + m.tool_calls[0].name if m.tool_calls else '') +")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "now"}]}
    messages = [{"role": "user", "content": "time?"}, call, {"role": "tool", "content": "9"}]
    assert learned(tokenizer, template, messages) == ["<call>now<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "does not show"),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}", "every token"),
        ("{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}", "no token"),
    ],
)
def test_masks_that_teach_nothing_are_errors_that_show_the_text(tokenizer: Any, template: str, what: str) -> None:
    with pytest.raises(RowError, match=what) as caught:
        learned(tokenizer, template, talk("question", "answer"))
    assert "question" in str(caught.value) or "answer" in str(caught.value)


def test_a_batch_keeps_its_order_and_names_the_bad_one(tokenizer: Any) -> None:
    tokenizer.chat_template = MISTRAL
    chat = Chat(tokenizer, None, {}, last_turn_only=False)
    good, bad = Conversation(talk("a", "b")), Conversation(talk("a", "b", system="no"))
    kinds = [isinstance(item, RowError) for item in chat.encode([good, bad, good])]
    assert kinds == [False, True, False]


def test_no_template_says_what_to_do(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*task\.options\.chat_template"):
        Chat(tokenizer, None, {}, last_turn_only=False)


def test_a_template_file_and_its_variables(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ flavour }}" + CHATML, encoding="utf-8")
    tokenizer.chat_template = None
    chat = Chat(tokenizer, file, {"flavour": "mint"}, last_turn_only=False)
    assert chat.render(Conversation(talk("a", "b"))).startswith("mint<|im_start|>user")
