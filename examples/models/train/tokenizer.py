"""Trains the byte-level BPE tokenizer and writes it in Hugging Face's format, chat template included.

Splits words as GPT-2 does, keeps every byte, and never adds a token by itself: decode(encode(text)) == text.
"""

import json
import random
from pathlib import Path

from corpus import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCAB_SIZE = 4096
MAX_CONTEXT_TOKENS = 2048

# A system message opens the first user turn: the model has no role of its own for it.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set state.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<|user|>' + state.system + message['content'] + '<|end|>' -}}
{%- set state.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|>' + message['content'] + '<|end|>' -}}
{%- else -%}
{{- raise_exception('The roles are system, user and assistant, not ' + message['role'] + '.') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def render_dialogue(text: str) -> str:
    """A dialogue of the corpus (JSON list of question and answer) as the chat template renders it."""
    turns = json.loads(text)
    return END_OF_TEXT + "".join(f"{USER}{question}{END}{ASSISTANT}{answer}{END}" for question, answer in turns)


def train_tokenizer(documents: list[Document], sample_bytes: int, seed: int) -> PreTrainedTokenizerFast:
    """Learns the merges from a random sample of the documents."""
    pool = [document for document in documents if document.kind != "chat"]
    random.Random(seed).shuffle(pool)
    sample, size = [], 0
    while pool and size < sample_bytes:
        sample.append(pool.pop().text)
        size += len(sample[-1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[USER, ASSISTANT, END],
        model_max_length=MAX_CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def write_tokenizer(documents: list[Document], out: Path, sample_bytes: int, seed: int) -> None:
    """Trains and writes the tokenizer's files into `out`."""
    tokenizer = train_tokenizer(documents, sample_bytes, seed)
    tokenizer.save_pretrained(out)
    print(f"{len(tokenizer)} tokens in {out}")
