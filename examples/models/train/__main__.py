"""Makes the shipped model from nothing but Debian packages: fetch, corpus, tokenizer, train, evaluate.

    python examples/models/train fetch --work build/tiny-llama
    python examples/models/train corpus --work build/tiny-llama
    python examples/models/train tokenizer --work build/tiny-llama
    python examples/models/train train --work build/tiny-llama
    python examples/models/train evaluate --work build/tiny-llama

`fetch` needs a Debian 12 with apt; `train` wants a GPU and also runs on a CPU. Everything is below --work: the
packages, corpus/, and model/, the finished Hugging Face folder.
"""

import argparse
import shutil
from dataclasses import fields
from pathlib import Path

PROMPTS = [
    "This module provides",
    "The kernel driver",
    "The following example shows how to",
    "class TestParser(unittest.TestCase):\n    def test_",
    "git commit records",
]
QUESTIONS = [
    "What does os.listdir do?",
    "What is the socket module for?",
    "Write a Python function that returns True if the path exists.",
]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["fetch", "corpus", "tokenizer", "train", "evaluate"])
    parser.add_argument("--work", type=Path, default=Path("build/tiny-llama"), help="folder for everything")
    parser.add_argument("--model", type=Path, help="evaluate: the model's folder, instead of the one in --work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-bytes", type=int, default=40_000_000, help="tokenizer: text to learn the merges from")
    for name in ("steps", "batch_size", "context_tokens", "learning_rate", "warmup_steps", "weight_decay", "device"):
        kind = {"learning_rate": float, "weight_decay": float, "device": str}.get(name, int)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help="train: see TrainConfig")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    corpus_folder, model_folder = arguments.work / "corpus", arguments.work / "model"
    # Imported here so that fetch and corpus run with the standard library alone.
    if arguments.command == "fetch":
        import sources

        sources.fetch(arguments.work)
    elif arguments.command == "corpus":
        import corpus

        corpus.build(arguments.work / "unpacked", corpus_folder, arguments.seed)
    elif arguments.command == "tokenizer":
        import corpus
        import tokenizer

        documents = corpus.load(corpus_folder / "train.jsonl.xz")
        tokenizer.write_tokenizer(documents, model_folder, arguments.sample_bytes, arguments.seed)
    elif arguments.command == "train":
        import corpus
        import train

        chosen = {field.name: getattr(arguments, field.name, None) for field in fields(train.TrainConfig)}
        config = train.TrainConfig(**{name: value for name, value in chosen.items() if value is not None})
        documents = corpus.load(corpus_folder / "train.jsonl.xz")
        validation = corpus.load(corpus_folder / "validation.jsonl.xz")
        train.train(documents, validation, model_folder, config)
        shutil.copy(corpus_folder / "heldout.txt", model_folder)
    else:
        import evaluate

        folder = arguments.model or model_folder
        text = (folder / "heldout.txt").read_text(encoding="utf-8")
        for part in (text, text[: evaluate.EXCERPT_CHARS]):
            result = evaluate.perplexity(folder, part)
            print(f"{result.num_bytes} bytes, {result.num_tokens} tokens: perplexity per token", end=" ")
            print(f"{result.per_token:.3f}, per byte {result.per_byte:.4f}; bits per byte {result.bits_per_byte:.4f}")
        evaluate.samples(folder, PROMPTS, QUESTIONS, new_tokens=80, seed=arguments.seed)


if __name__ == "__main__":
    main()
