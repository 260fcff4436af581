"""Chat templates written after those of well-known model families, with what is expected of each.

They are short: tools, images and documents are left out, and what remains behaves as in the family named.
"""

# ruff: noqa: E501  # a template is easier to read unbroken
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.builders import byte_level_bpe, sentencepiece_bpe


@dataclass(frozen=True)
class Family:
    """A chat template with the control tokens that its tokenizer knows.

    Attributes:
        template: In Jinja.
        tokens: Control tokens, besides ``<s>`` and ``</s>``.
        prompt: What a model is asked with instruction I, one demonstration (Q, A) and the query P; None if refused.
        end_of_answer: What ends an answer.
        refused: What the reason for a refusal names.
        trimmed: From what the template takes white space.
        first_turn: Whether the instruction opens the first query's turn.
        arguments: For the template.
        sentencepiece: Whether the tokenizer puts markers before words.
        eos: The tokenizer's end-of-sequence token.
    """

    template: str
    tokens: tuple[str, ...] = ()
    prompt: str | None = None
    end_of_answer: str = ""
    refused: str | None = None
    trimmed: tuple[str, ...] = ()
    first_turn: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sentencepiece: bool = False
    eos: str = "</s>"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A small tokenizer that knows the family's control tokens and has its template."""
        tokenizer = sentencepiece_bpe() if self.sentencepiece else byte_level_bpe()
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.tokens), "bos_token": "<s>"})
        tokenizer.eos_token = self.eos
        tokenizer.chat_template = self.template
        return tokenizer


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
IM_TOKENS = ("<|im_start|>", "<|im_end|>")

QWEN_25 = """{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}\
{% else %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}\
{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) or m.role == 'assistant' %}\
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN_3 = """{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}\
{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}\
{% elif m.role == 'assistant' %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}\
{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}\
{{ content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

QWEN_3_MENDED = QWEN_3.replace("{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}", "")

LLAMA_2 = """{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}\
{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set turns = messages %}\
{% set system = '' %}{% endif %}{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% set content = system + m.content if loop.index0 == 0 else m.content %}{% if m.role == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}\
{% endif %}{% endfor %}"""

LLAMA_3 = """{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' \
+ m.content | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}\
{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

LLAMA_31 = """{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}\
{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}\
{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}\
{% else %}{% set system = '' %}{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}\
{{ 'Cutting Knowledge Date: December 2023\n' }}{{ 'Today Date: ' + date_string + '\n\n' }}{{ system }}{{ '<|eot_id|>' }}\
{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA_2 = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}\
{% set role = m.role %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")

GEMMA_3 = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}\
{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}{% for m in turns %}\
{% set role = 'model' if m.role == 'assistant' else m.role %}\
{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ m.content | trim }}{{ '<end_of_turn>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL_1 = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}\
{% endfor %}"""

MISTRAL_3 = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}\
{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}\
{% if m.role == 'user' %}{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}\
{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}\
{% endfor %}"""

MISTRAL_7 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}\
{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% else %}\
{{ m.content + eos_token }}{% endif %}{% endfor %}"""

PHI_3 = """{% for m in messages %}{% if m.role == 'system' and m.content %}{{ '<|system|>\n' + m.content + '<|end|>\n' }}\
{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}{% elif m.role == 'assistant' %}\
{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}\
{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI_4 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

VICUNA = """{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set turns = messages[1:] %}{% else %}\
{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}{% set turns = messages %}{% endif %}\
{% for m in turns %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}\
{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

TULU = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '<|system|>\n' + m.content + '\n' }}\
{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}{% elif not loop.last %}\
{{ '<|assistant|>\n' + m.content + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

COMMAND_R = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}\
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0].content + '<|END_OF_TURN_TOKEN|>' }}{% else %}\
{% set turns = messages %}{% endif %}{% for m in turns %}\
{{ '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>') + m.content.strip() \
+ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""
COMMAND_R_TOKENS = (
    "<|START_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
)

GRANITE = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}\
{% else %}{% set system = "Knowledge Cutoff Date: April 2024.\nToday's Date: " + strftime_now('%B %d, %Y') \
+ '.\nYou are Granite.' %}{% set turns = messages %}{% endif %}\
{{ '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}{% for m in turns %}\
{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

DEEPSEEK_V2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}\
{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

DEEPSEEK_R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}\
{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}\
{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

HARMONY = """{{ '<|start|>system<|message|>You are a large language model.\nCurrent date: ' + strftime_now('%Y-%m-%d') \
+ '\n\nReasoning: medium<|end|>' }}{% for m in messages %}{% if m.role == 'system' %}\
{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}{% elif m.role == 'user' %}\
{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% elif loop.last %}\
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% else %}\
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# Keeps only the newest question and what it was told before, as some retrieval models do.
FORGETFUL = """{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}\
{% for m in messages[-2:] %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

TRIMS_ALL_BUT_THE_LAST = """{% for m in messages %}\
{{ '<|im_start|>' + m.role + '\n' + (m.content if loop.last else m.content | trim) + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TRIMS_THE_LAST_QUERY = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}\
{% if not (loop.last and m.role == 'user') %}{{ '\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

ALPACA = """{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}\
{{ '\n\n### Instruction:\n' + m.content }}{% else %}{{ '\n\n### Response:\n' + m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"""

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
KEEPS_THE_NEWEST_TEN = "{% for m in messages[-10:] %}" + TURN + "{% endfor %}" + PROMPT
NUMBERS_LATE_TURNS = (
    "{% for m in messages %}{% if loop.index0 > 9 %}{{ 'Round ' ~ loop.index0 }}{% endif %}"
    + TURN
    + "{% endfor %}"
    + PROMPT
)
ENDS_AT_TWENTY = "{% if messages|length > 20 %}{{ raise_exception('too long') }}{% endif %}" + CHATML

NO_PROMPT = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"""

ALL_THREE = ("answer", "instruction", "query")

FAMILIES: dict[str, Family] = {
    "ChatML (Yi, InternLM2)": Family(
        CHATML,
        IM_TOKENS,
        "<|im_start|>system\nI<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "Qwen2.5": Family(
        QWEN_25,
        IM_TOKENS,
        "<|im_start|>system\nI<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "Qwen3": Family(QWEN_3, IM_TOKENS, refused="think block"),
    "Qwen3 without thinking": Family(QWEN_3, IM_TOKENS, refused="think block", arguments={"enable_thinking": False}),
    "Llama 2": Family(
        LLAMA_2,
        (),
        "<s>[INST] <<SYS>>\nI\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] P [/INST]",
        " </s>",
        trimmed=("answer", "query"),
        sentencepiece=True,
    ),
    "Llama 3": Family(
        LLAMA_3,
        LLAMA_3_TOKENS,
        "<s><|start_header_id|>system<|end_header_id|>\n\nI<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nP<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        trimmed=ALL_THREE,
        eos="<|eot_id|>",
    ),
    "Llama 3.1": Family(
        LLAMA_31, LLAMA_3_TOKENS, refused="today's date; fix one with format.template_arguments.date_string"
    ),
    "Llama 3.1 with a fixed date": Family(
        LLAMA_31,
        LLAMA_3_TOKENS,
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nI<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nP<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        trimmed=ALL_THREE,
        arguments={"date_string": "26 Jul 2024"},
        eos="<|eot_id|>",
    ),
    "Gemma 2": Family(
        GEMMA_2,
        GEMMA_TOKENS,
        "<s><start_of_turn>user\nI\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nP<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
        trimmed=ALL_THREE,
        first_turn=True,
        sentencepiece=True,
    ),
    "Gemma 3": Family(
        GEMMA_3,
        GEMMA_TOKENS,
        "<s><start_of_turn>user\nI\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nP<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
        trimmed=("answer", "query"),
        sentencepiece=True,
    ),
    "Mistral v0.1": Family(
        MISTRAL_1, (), "<s>[INST] I\n\nQ [/INST]A</s>[INST] P [/INST]", "</s>", first_turn=True, sentencepiece=True
    ),
    "Mistral v0.3, its system prompt in the last turn": Family(
        MISTRAL_3,
        ("[INST]", "[/INST]"),
        "<s>[INST] I\n\nQ[/INST] A</s>[INST] P[/INST]",
        "</s>",
        trimmed=("answer",),
        first_turn=True,
        sentencepiece=True,
    ),
    "Mistral Small 3": Family(
        MISTRAL_7,
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "<s>[SYSTEM_PROMPT]I[/SYSTEM_PROMPT][INST]Q[/INST]A</s>[INST]P[/INST]",
        "</s>",
    ),
    "Phi-3": Family(
        PHI_3,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|system|>\nI<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nP<|end|>\n<|assistant|>\n",
        "<|end|>",
        sentencepiece=True,
    ),
    "Phi-4": Family(
        PHI_4,
        (*IM_TOKENS, "<|im_sep|>"),
        "<|im_start|>system<|im_sep|>I<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|>"
        "<|im_start|>assistant<|im_sep|>A<|im_end|><|im_start|>user<|im_sep|>P<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "Zephyr": Family(
        ZEPHYR,
        (),
        "<|system|>\nI</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n<|user|>\nP</s>\n<|assistant|>\n",
        "</s>",
        sentencepiece=True,
    ),
    "Vicuna": Family(VICUNA, (), "I USER: Q ASSISTANT: A</s>USER: P ASSISTANT:", "</s>", sentencepiece=True),
    "Tulu 3, OLMo 2": Family(
        TULU,
        (),
        "<s><|system|>\nI\n<|user|>\nQ\n<|assistant|>\nA</s>\n<|user|>\nP\n<|assistant|>\n",
        "</s>",
    ),
    "Command R": Family(
        COMMAND_R,
        COMMAND_R_TOKENS,
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>I<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q"
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>P<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        trimmed=("answer", "query"),
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "DeepSeek-V2": Family(DEEPSEEK_V2, (), "<s>I\n\nUser: Q\n\nAssistant: A</s>User: P\n\nAssistant:", "</s>"),
    "DeepSeek-R1": Family(DEEPSEEK_R1, ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>"), refused="think block"),
    "Granite 3": Family(
        GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), refused="it reads today's date"
    ),
    "gpt-oss (Harmony)": Family(
        HARMONY, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), refused="it reads today's date"
    ),
    "a template that keeps only the newest turn": Family(
        FORGETFUL, (), refused="leaves out, repeats or moves the sentinel"
    ),
    "a template that trims all turns but the last": Family(
        TRIMS_ALL_BUT_THE_LAST,
        IM_TOKENS,
        "<|im_start|>system\nI<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        trimmed=ALL_THREE,
    ),
    "a template that trims the end of the last query's turn": Family(
        TRIMS_THE_LAST_QUERY, IM_TOKENS, refused="white space is in some turns and not in others"
    ),
    "Alpaca, where nothing ends an answer": Family(ALPACA, (), refused="no text ends every answer"),
    "a template that keeps the newest ten messages": Family(
        KEEPS_THE_NEWEST_TEN, IM_TOKENS, refused="changes with its place or its text"
    ),
    "a template that numbers its turns from the tenth on": Family(
        NUMBERS_LATE_TURNS, IM_TOKENS, refused="changes with its place or its text"
    ),
    "a template that ends at twenty messages": Family(
        ENDS_AT_TWENTY, IM_TOKENS, refused="fails on a conversation of 511 messages: too long"
    ),
    "a template in lower case": Family(
        CHATML.replace("m.content", "m.content | lower"), IM_TOKENS, refused="changes with its place or its text"
    ),
    "a template that cuts long texts": Family(
        CHATML.replace("m.content", "m.content[:100]"), IM_TOKENS, refused="changes with its place or its text"
    ),
    "a template that joins lines": Family(
        CHATML.replace("m.content", "m.content | replace('\n', ' ')"), IM_TOKENS, refused="its text"
    ),
    "a template that draws by lot": Family(
        "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | random }}" + CHATML,
        IM_TOKENS,
        refused="fails on a conversation of 8 messages: no filter named",
    ),
    "a template that calls itself": Family(
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", IM_TOKENS, refused="it fails on a conversation"
    ),
    "a line break that opens and ends an answer": Family(
        "{% for m in messages %}{{ m.role + ':\n' + m.content|trim + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        refused="ends an answer and opens it, too",
    ),
    "a template without a generation prompt": Family(
        NO_PROMPT, IM_TOKENS, refused="its generation prompt ends before '<|im_start|>assistant"
    ),
}
