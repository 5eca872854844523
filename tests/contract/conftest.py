"""A tiny model with a tokenizer of its own, for the checks that every runtime must pass."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.request import Request, SamplingParams
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.registry import load_runtime

SHIPPED_MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
TEXT = ["The quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b\n", "naïve café, 東京 🚀"]


ENDING_PROMPT = (5, 50, 40, 30, 20, 10)


@pytest.fixture(scope="session")
def ending_prompt() -> tuple[int, ...]:
    """A prompt that the model ends after a few tokens."""
    return ENDING_PROMPT


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model where it is there, else one with random weights of the same family.

    Its end-of-sequence tokens are changed so that the continuation of ENDING_PROMPT has one.
    """
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    if (SHIPPED_MODEL / "model.safetensors").is_file():
        shutil.copytree(SHIPPED_MODEL, folder)
    else:
        write_random_model(folder)
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    ends = set()
    for name in ("transformers", "fake"):
        runtime = load_runtime(name, RuntimeConfig(folder, "fp32"))
        ends.add([event.token_id for event in runtime.generate([Request("r", ENDING_PROMPT, sampling)])][-1])
        runtime.close()
    path = folder / "generation_config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | {"eos_token_id": sorted(ends)}))
    return folder


def write_random_model(folder: Path) -> Path:
    """Writes a Llama of two layers with grouped-query attention, biased away from ties by its seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
