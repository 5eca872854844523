"""`generate`: prompts in, text out, on any runtime."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.errors import RequestError, TokenizerError, UsageError
from hasten.hardware import count_cpus
from hasten.pipeline.config import GenerateConfig
from hasten.pipeline.device import resolve_device
from hasten.pipeline.target import prepared, resolve_target
from hasten.request import Completion, Request
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.registry import load_runtime
from hasten.runtimes.text import complete, load_tokenizer

MAX_NUM_SEQS = 32

OnText = Callable[[int, str], object]


def generate(config: GenerateConfig, on_text: OnText = lambda index, piece: None) -> list[Completion]:
    """Continues every prompt; `on_text` gets the number of the prompt and each piece of text as it comes.

    With n above 1, only the first continuation is streamed; all are returned.

    Raises:
        UsageError: no prompt, or both a prompt and a file of them.
        ModelError, RequestError: the model or a prompt cannot be used.
    """
    prompts = read_prompts(config)
    target = resolve_target(config.model, config.runtime, config.scheme)
    device = resolve_device(config.device, target.candidate.runtime)
    tokenizer = load_tokenizer(target.source)
    requests = [
        Request(str(index), _token_ids(prompt, config, tokenizer), config.sampling)
        for index, prompt in enumerate(prompts)
    ]

    def stream(request_id: str, index: int, piece: str) -> None:
        if index == 0:
            on_text(int(request_id), piece)

    with tempfile.TemporaryDirectory(prefix="hasten-generate-") as folder:
        runtime_config = RuntimeConfig(
            model=prepared(target, Path(folder) / "artifact"),
            scheme=target.candidate.scheme,
            max_num_seqs=min(len(requests) * config.n, MAX_NUM_SEQS),
            max_model_tokens=max(len(request.prompt_token_ids) for request in requests) + config.max_tokens,
            num_threads=config.threads or count_cpus(),
            device=device,
        )
        runtime = load_runtime(target.candidate.runtime, runtime_config)
        try:
            return complete(runtime, requests, tokenizer, stream)
        finally:
            runtime.close()


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompt, or the lines of the file of prompts that are not empty.

    Raises:
        UsageError: neither or both are given, the file cannot be read, or it is empty.
    """
    if (config.prompt is None) == (config.file is None):
        raise UsageError("give one prompt, or a file of prompts with --file")
    if config.prompt is not None:
        return [config.prompt]
    assert config.file is not None
    try:
        text = sys.stdin.read() if config.file == Path("-") else config.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompts in {config.file}: {error}") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"{config.file} holds no prompt: write one a line")
    return prompts


def _token_ids(prompt: str, config: GenerateConfig, tokenizer: Any) -> tuple[int, ...]:
    if not config.chat:
        if config.system is not None:
            raise UsageError("--system needs --chat")
        return tuple(tokenizer.encode(prompt))
    if not tokenizer.chat_template:
        raise TokenizerError("the model has no chat template: leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of the model's and may raise anything
        raise RequestError(f"the model's chat template refuses the messages: {error}") from error
    return tuple(tokenizer.encode(text, add_special_tokens=False))
