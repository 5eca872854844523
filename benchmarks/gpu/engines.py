"""One engine in a process of its own, told on stdin what to run: hasten's runtimes, or vLLM.

A time is wall clock around one call that takes all prompts of a batch, so scheduling and all
work of the CPU count, and no engine tokenizes or detokenizes. Greedy, end tokens ignored, every
prompt drawn anew, so that no prefix cache can help. Answers are JSON lines on stdout; whatever
the libraries print goes to stderr.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TextIO

Prompts = Sequence[tuple[int, ...]]

VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}


class Engine(Protocol):
    """A loaded model.

    Attributes:
        versions: of the libraries that it is.
        weight_bytes: that one decode step reads; None where it does not tell.
    """

    versions: dict[str, str]
    weight_bytes: int | None

    def generate(self, prompts: Prompts, new_tokens: int) -> tuple[float, int]:
        """Seconds for all prompts, and how many tokens came."""


class HastenEngine:
    """One of hasten's runtimes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        from hasten.request import Request, SamplingParams
        from hasten.runtimes.base import RuntimeConfig
        from hasten.runtimes.registry import load_runtime

        self._request, self._sampling = Request, SamplingParams
        config = RuntimeConfig(
            model=arguments.model,
            scheme=arguments.scheme,
            max_num_seqs=arguments.max_num_seqs,
            max_model_tokens=arguments.max_model_tokens,
            device=arguments.device,
        )
        self._runtime = load_runtime(arguments.engine, config)
        self.weight_bytes = self._runtime.weight_bytes_per_token
        self._num_calls = 0
        self.versions = {"torch": torch.__version__}
        if arguments.engine == "transformers":
            import transformers

            self.versions["transformers"] = transformers.__version__

    def generate(self, prompts: Prompts, new_tokens: int) -> tuple[float, int]:
        self._num_calls += 1
        sampling = self._sampling(max_tokens=new_tokens, ignore_eos=True)
        requests = [self._request(f"{self._num_calls}-{i}", prompt, sampling) for i, prompt in enumerate(prompts)]
        num_tokens = 0
        start_s = time.perf_counter()
        for event in self._runtime.generate(requests):
            if event.error is not None:
                raise RuntimeError(event.error)
            num_tokens += event.token_id is not None
        return time.perf_counter() - start_s, num_tokens


class VllmEngine:
    """vLLM's offline engine with its defaults, but for the prefix cache and a fixed cache size."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import torch
        import vllm

        self._sampling = vllm.SamplingParams
        options = {
            "model": str(arguments.model),
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": arguments.max_model_tokens,
            "max_num_seqs": arguments.max_num_seqs,
            "kv_cache_memory_bytes": arguments.kv_gib << 30,
            "gpu_memory_utilization": 0.2,  # only compared with what is free; the cache size is given
            "enable_prefix_caching": False,
            "generation_config": "vllm",
            "seed": 0,
            "disable_log_stats": True,
        }
        if arguments.scheme != "bf16":
            options["quantization"] = arguments.scheme
        self._llm = vllm.LLM(**options)
        self.versions = {"vllm": vllm.__version__, "torch": torch.__version__}
        self.weight_bytes = None

    def generate(self, prompts: Prompts, new_tokens: int) -> tuple[float, int]:
        sampling = self._sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        start_s = time.perf_counter()
        outputs = self._llm.generate(inputs, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start_s
        return seconds, sum(len(each.outputs[0].token_ids) for each in outputs)


def serve(engine: Engine, vocab_size: int, commands: TextIO, answers: TextIO) -> None:
    """Answers commands until stdin is closed."""

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer(ready=True, versions=engine.versions, weight_bytes=engine.weight_bytes)
    for line in commands:
        command = json.loads(line)
        draw = random.Random(command["seed"])
        top = min(vocab_size, 100_000)
        prompts = [
            tuple(draw.randrange(10, top) for _ in range(command["prompt_tokens"])) for _ in range(command["batch"])
        ]
        try:
            seconds, num_tokens = engine.generate(prompts, command["new_tokens"])
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}"[:400])
            raise
        wanted = command["batch"] * command["new_tokens"]
        if num_tokens == wanted:
            answer(seconds=seconds)
        else:
            answer(error=f"{num_tokens} tokens came, {wanted} were asked for")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("native", "transformers", "vllm"), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--max-model-tokens", type=int, required=True)
    parser.add_argument("--kv-gib", type=int, default=16, help="vLLM's KV cache")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    vocab_size = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    engine: Engine = VllmEngine(arguments) if arguments.engine == "vllm" else HastenEngine(arguments)
    serve(engine, vocab_size, sys.stdin, answers)


if __name__ == "__main__":
    main()
