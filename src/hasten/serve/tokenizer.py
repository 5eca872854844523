"""Prompts into tokens, chat messages into prompts, tokens into text: the model's tokenizer for a server.

Long texts are tokenized in a thread, so that one of them does not delay everybody's streams; the
Rust tokenizers give up the interpreter's lock while they work, and calls do not change them.
"""

import asyncio
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hasten.errors import RequestError
from hasten.runtimes.text import Detokenizer
from hasten.serve.pieces import RustDetokenizer

# tokenizing this many characters takes about a millisecond
LONG_TEXT_CHARS = 4096


class ServeTokenizer:
    """A tokenizer of `runtimes.text.load_tokenizer`.

    Args:
        lowercases: whether texts are put in lower case first, as some sentence-transformers models want it.
    """

    def __init__(self, tokenizer: Any, *, lowercases: bool = False) -> None:
        self._tokenizer = tokenizer
        self._lowercases = lowercases
        self._text_of: dict[int, str] = {}  # at most the vocabulary

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text, with those that the tokenizer puts around it unless told otherwise.

        Raises:
            RequestError: the text has characters that are none (lone surrogates).
        """
        if len(text) < LONG_TEXT_CHARS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    async def encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """As `encode`, of each text."""
        if sum(map(len, texts)) < LONG_TEXT_CHARS:
            return [self._encode(text, True) for text in texts]
        return await asyncio.to_thread(lambda: [self._encode(text, True) for text in texts])

    def check_tools(self, tools: Collection[Mapping[str, Any]]) -> None:
        """Raises RequestError if the chat template, or one of several, could not tell the model of tools."""
        if tools and self.has_chat_template and "tools" not in str(self._tokenizer.chat_template):
            raise RequestError("the model's chat template does not tell it of tools: leave them out")

    def check_options(self, options: Collection[str]) -> None:
        """Raises RequestError for what is no variable of the chat template alone, as enable_thinking of Qwen3's is."""
        if not options:
            return
        taken = {"messages", "conversations", *self._tokenizer.special_tokens_map}
        taken.update(inspect.signature(self._tokenizer.apply_chat_template).parameters)
        words = set(re.findall(r"\w+", str(self._tokenizer.chat_template)))
        for name in options:
            if name in taken or name not in words:
                raise RequestError(f"the model's chat template has no option {name[:64]!r}")

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> tuple[int, ...]:
        """Token ids of messages in the model's chat template.

        Args:
            tools, options: that were checked.

        Raises:
            RequestError: the model has no template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise RequestError("the model has no chat template: use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options or {},
            )
        except Exception as error:  # a template is a program of the model's and may raise anything
            raise RequestError(f"the model's chat template refuses the messages: {error}") from error
        return await self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def text_of(self, token_id: int) -> str:
        """Text of one token alone; bytes that are no character are replacement characters."""
        text = self._text_of.get(token_id)
        if text is None:
            text = self._text_of[token_id] = self.decode((token_id,))
        return text

    def detokenizer(self) -> Detokenizer | RustDetokenizer:
        """A fresh detokenizer for one continuation."""
        rust = getattr(self._tokenizer, "backend_tokenizer", None)
        return Detokenizer(self._tokenizer) if rust is None else RustDetokenizer(rust)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            text = text.lower() if self._lowercases else text
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError("the text holds characters that UTF-8 cannot express (lone surrogates)") from error
