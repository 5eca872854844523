"""What beside_vllm.py measures: one model with random weights, built once, loaded by every process.

vLLM comes up while the engine folder is built and hasten loads it, since it takes a minute or two.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servers import Server, VllmClient

from hasten.bench.endpoints import OpenAIEndpoint
from hasten.bench.http_stream import Address
from hasten.bench.load import LoadGenerator
from hasten.hardware import count_cpus
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.process import RuntimeProcess

SHAPES = Path(__file__).parents[1] / "gpu" / "shapes.py"
MODEL = "m"
MAX_NUM_SEQS = 256
MAX_MODEL_TOKENS = 768  # so that two engines of ours and vLLM fit into one GPU's memory
VLLM_CACHE_BYTES = 16 << 30


@dataclass
class Setup:
    """The processes, loaded but for vLLM, which may still be coming up.

    Attributes:
        model: the folder with the weights and the tokenizer.
        steps_s: what preparing took.
        vllm, client: None where there is no vLLM, or no more.
    """

    model: Path
    vocab_size: int
    hasten: Server
    offline: RuntimeProcess
    generator: LoadGenerator
    vllm: Server | None
    client: VllmClient | None
    steps_s: dict[str, float] = field(default_factory=dict)

    @property
    def servers(self) -> tuple[Server, ...]:
        return (self.hasten,) if self.vllm is None else (self.hasten, self.vllm)

    def drop_vllm(self) -> None:
        for each in (self.vllm, self.client):
            if each is not None:
                each.close()
        self.vllm = self.client = None


@contextlib.contextmanager
def prepared(
    folder: Path, logs: Path, shape: str, device: str, vllm: Mapping[str, Any] | None, timeout_s: float
) -> Iterator[Setup]:
    """Writes and builds the model and starts everything; ends it all afterwards.

    Args:
        vllm: how to start vLLM's processes, as options of servers.LoggedProcess; None is without them.

    Raises:
        ProcessError, HastenError, CalledProcessError: hasten could not be built or loaded.
    """
    end_s = time.monotonic() + timeout_s
    model, engine = folder / "model", folder / "engine"
    steps_s: dict[str, float] = {}

    def step(what: str, command: Sequence[str]) -> None:
        began_s = time.monotonic()
        with (logs / "steps.log").open("ab") as log:
            limit_s = end_s - began_s
            subprocess.run([sys.executable, *command], check=True, stdout=log, stderr=log, timeout=limit_s)
        steps_s[what] = round(time.monotonic() - began_s, 1)

    step("weights", [str(SHAPES), shape, str(model), device])
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    write_tokenizer(model, vocab_size)
    with contextlib.ExitStack() as stack:
        peers = _start_vllm(model, logs, vllm, stack.callback) if vllm is not None else (None, None)
        limits = ("--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-tokens", str(MAX_MODEL_TOKENS))
        build = ("-m", "hasten", "build", str(model), "--scheme", "bf16", "--profile", "throughput", *limits)
        step("build", [*build, "--device", device, "-o", str(engine)])
        serve = ("-m", "hasten", "serve", str(engine), "--device", device, "--served-model-name", MODEL)
        hasten = Server("hasten serve", serve, logs / "hasten.log", "/ready")
        stack.callback(hasten.close)
        config = RuntimeConfig(engine, "bf16", MAX_NUM_SEQS, MAX_MODEL_TOKENS, count_cpus(), device)
        offline = stack.enter_context(RuntimeProcess("native", config, logs / "offline.log"))
        steps_s["load offline"] = round(offline.load_s, 1)
        hasten.wait_until_ready(end_s - time.monotonic())
        address = Address.from_url(hasten.url)
        generator = stack.enter_context(LoadGenerator(address, OpenAIEndpoint(MODEL), count_cpus()))
        setup = Setup(model, vocab_size, hasten, offline, generator, *peers, steps_s)
        yield setup


def write_tokenizer(model: Path, vocab_size: int) -> None:
    """One word a token, so that prompts of text have exact lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # special tokens are found within words too, so no word may begin with one
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    vocabulary = [*special.values(), *(f"w{index}" for index in range(len(special), vocab_size))]
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(model)


def _start_vllm(
    model: Path, logs: Path, options: Mapping[str, Any], at_end: Callable[[Callable[[], object]], object]
) -> tuple[Server, VllmClient]:
    """vLLM with its defaults, but for the prefix cache, a fixed cache size and the limits that hasten has."""
    command = ["-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", MODEL]
    command += ["--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_TOKENS), "--no-enable-prefix-caching"]
    command += ["--max-num-seqs", str(MAX_NUM_SEQS), "--kv-cache-memory-bytes", str(VLLM_CACHE_BYTES)]
    # only compared with what is free, since the cache's size is given
    command += ["--gpu-memory-utilization", "0.2", "--generation-config", "vllm", "--host", "127.0.0.1"]
    server = Server("vllm serve", command, logs / "vllm.log", "/health", **options)
    at_end(server.close)
    client = VllmClient(logs / "vllm-client.log", **options)
    at_end(client.close)
    return server, client
