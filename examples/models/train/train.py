"""Trains the model on the corpus and writes it, in bf16, as a Hugging Face folder.

A plain loop over transformers' LlamaForCausalLM: float32 master weights, bf16 autocast, Muon beside AdamW (arXiv
2502.16982, whose learning-rate scale it uses), linear warm-up and cosine decay, windows at random offsets of one long
token stream. The weights with the lowest validation loss are the ones that are saved. A run is repeatable from its seed
up to the order of floating-point sums on the device.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import Document
from tokenizer import END, END_OF_TEXT, MAX_CONTEXT_TOKENS, render_dialogue
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainConfig:
    """What `train` takes; the defaults made the shipped model."""

    steps: int = 9_000
    batch_size: int = 32  # sequences a step
    context_tokens: int = 2048
    learning_rate: float = 5e-3
    warmup_steps: int = 400
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    validate_every: int = 500  # steps
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shipped shape: grouped-query attention, tied head; every width suits int4 groups of 128."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )


def token_stream(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """[num_tokens] int32 token ids: every document once, in random order."""
    backend = tokenizer.backend_tokenizer
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), 2000):
        chunk = documents[start : start + 2000]
        texts = [render_dialogue(d.text) if d.kind == "chat" else END_OF_TEXT + d.text for d in chunk]
        pieces.extend(np.array(encoding.ids, dtype=np.int32) for encoding in backend.encode_batch_fast(texts))
    order = np.random.default_rng(seed).permutation(len(pieces))
    return torch.from_numpy(np.concatenate([pieces[index] for index in order]))


def _windows(stream: torch.Tensor, config: TrainConfig, generator: torch.Generator) -> torch.Tensor:
    """[batch_size, context_tokens + 1] int64: one batch at random offsets."""
    width = config.context_tokens + 1
    offsets = torch.randint(len(stream) - width, (config.batch_size, 1), generator=generator, device=stream.device)
    return stream[offsets + torch.arange(width, device=stream.device)].long()


def _learning_rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _optimizers(model: LlamaForCausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embeddings and the norms' gains."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    embeddings = [weight for name, weight in model.named_parameters() if "embed" in name]
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": embeddings, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=config.device == "cuda",
    )
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def _loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def _validation_loss(model: LlamaForCausalLM, stream: torch.Tensor, config: TrainConfig) -> float:
    """Nats per token over the validation documents, in whole windows."""
    width = config.context_tokens + 1
    windows = stream[: len(stream) // width * width].view(-1, width).long()
    return sum(_loss(model, batch).item() * len(batch) for batch in windows.split(16)) / len(windows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes weights in bf16 and the configs into the folder that holds the tokenizer."""
    stop = [tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TEXT, END)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)


def train(documents: list[Document], validation: list[Document], out: Path, config: TrainConfig) -> None:
    """Trains from random weights with the tokenizer that lies in `out`, and saves the model there."""
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(out)
    stream = token_stream(documents, tokenizer, config.seed).to(config.device)
    heldout = token_stream(validation, tokenizer, config.seed).to(config.device)
    model = LlamaForCausalLM(model_config(tokenizer)).to(config.device).train()
    print(f"{asdict(config)}\n{model.num_parameters()} parameters, {len(stream)} training tokens", flush=True)
    loss_of = torch.compile(_loss) if config.device == "cuda" else _loss
    optimizers = _optimizers(model, config)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    start_s, best, best_weights = time.perf_counter(), math.inf, {}
    for step in range(config.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, config)
        loss = loss_of(model, _windows(stream, config, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            validation_loss = _validation_loss(model, heldout, config)
            elapsed_s = time.perf_counter() - start_s
            print(f"step {step + 1} loss {loss.item():.4f} validation {validation_loss:.4f} ", end="")
            print(f"nats per token after {elapsed_s:.1f} s", flush=True)
            if validation_loss < best:
                best, best_weights = validation_loss, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_weights)
    save(model, tokenizer, out)
