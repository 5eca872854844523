"""Measures every CPU runtime on a real model's shape with random weights, in one interleaved run.

    python benchmarks/cpu/measure.py --shape qwen2.5-0.5b --out benchmarks/results/cpu-qwen2.5-0.5b

Speed does not depend on the weights' values, so the figures hold for the real model; quality
does, and is not claimed from this. llama.cpp is measured beside the others where
`pip install 'hasten[llama-cpp]'` has been done. Writes one result file a candidate and the
report; `hasten compare OUT` prints the table again.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from hasten import OptimizeConfig, optimize
from hasten.cli.terminal import print_comparison, progress_bar

TOKENIZER = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
SHAPES: dict[str, PretrainedConfig] = {
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
}
ANY_QUALITY = 1e9  # random weights say nothing about quality, so nothing is refused for it


def write_random_model(shape: str, out: Path) -> Path:
    """A Hugging Face folder in bf16 with normal weights and the shipped model's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "heldout.txt"):
        shutil.copyfile(TOKENIZER / name, out / name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist, or an interrupted run")
    parser.add_argument("--runtimes", default="transformers,native,onnxruntime,llama_cpp")
    parser.add_argument("--schemes", default="fp32,bf16,w8a16,w4a16")
    parser.add_argument("--concurrency", default="1")
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hasten-model-") as folder:
        config = OptimizeConfig(
            model=str(write_random_model(arguments.shape, Path(folder) / f"{arguments.shape}-random")),
            runtimes=tuple(arguments.runtimes.split(",")),
            schemes=tuple(arguments.schemes.split(",")),
            concurrency=tuple(int(each) for each in arguments.concurrency.split(",")),
            runs=arguments.runs,
            max_perplexity_increase=ANY_QUALITY,
            max_kl=ANY_QUALITY,
            output=arguments.out,
        )
        with progress_bar() as on_progress:
            outcome = optimize(config, on_progress)
    print_comparison(outcome.results, outcome.decision)


if __name__ == "__main__":
    main()
