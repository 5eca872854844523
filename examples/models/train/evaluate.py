"""Measures the saved model on its held-out text and writes sample continuations.

Perplexity is over disjoint windows of WINDOW_TOKENS tokens. Each window is preceded by <|endoftext|>, so every token of
the text is scored exactly once, and bits per byte do not depend on the tokenizer. Weights are read as saved (bf16);
arithmetic is float32 on the CPU.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW_TOKENS = 1024
EXCERPT_CHARS = 16_000  # what a quick check scores
GREEDY = {"do_sample": False, "repetition_penalty": 1.15}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


@dataclass(frozen=True)
class Perplexity:
    """How well a text is predicted."""

    num_tokens: int
    num_bytes: int
    nats: float

    @property
    def per_token(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(self.nats / self.num_tokens)

    @property
    def per_byte(self) -> float:
        """exp of the mean negative log-likelihood of a byte."""
        return math.exp(self.nats / self.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        """Mean negative log2-likelihood of a byte."""
        return self.nats / self.num_bytes / math.log(2)


@torch.inference_mode()
def perplexity(folder: Path, text: str) -> Perplexity:
    """Scores `text` with the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nats = 0.0
    for start in range(0, len(token_ids), WINDOW_TOKENS):
        window = torch.tensor([tokenizer.bos_token_id, *token_ids[start : start + WINDOW_TOKENS]])
        logits = model(input_ids=window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return Perplexity(len(token_ids), len(text.encode()), nats)


@torch.inference_mode()
def samples(folder: Path, prompts: list[str], questions: list[str], new_tokens: int, seed: int) -> None:
    """Prints a greedy and a sampled continuation of each prompt, and an answer to each question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    for prompt in [*prompts, *chats]:
        inputs = tokenizer(prompt, return_tensors="pt")
        for options in (GREEDY, SAMPLED):
            torch.manual_seed(seed)
            output = model.generate(**inputs, max_new_tokens=new_tokens, **options)
            text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"--- {'sampled' if options['do_sample'] else 'greedy'}: {prompt!r}\n{text}\n")
