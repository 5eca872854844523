"""What a decoder is, as data: sizes and flags read from a Hugging Face config.json.

One description covers Llama 2/3/3.1/3.2, Qwen2/2.5, Qwen3 and Mistral. Both spellings of the
rotary settings are read: `rope_theta` with `rope_scaling`, and transformers 5's
`rope_parameters`. A feature that the decoder does not compute is refused here, before any
weight is read; nothing is ignored that changes the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import ModelError, UnsupportedModelError
from hasten.models.fields import read_flag, read_number, read_size
from hasten.models.rotary import RotaryConfig, read_rotary


@dataclass(frozen=True)
class Family:
    """What an architecture fixes without saying so in its config.

    Args:
        qkv_bias: whether q, k and v have biases; None reads `attention_bias`.
        o_bias: the same for the output projection.
        windows: which layers have the sliding window: "none", "all", or "listed" for
            `layer_types` and `max_window_layers`.
        head_dim: what an absent `head_dim` means; None is hidden_size / num_heads.
        kv_heads: what an absent `num_key_value_heads` means; None is as many as heads.
        context: what an absent `max_position_embeddings` means.
    """

    qkv_bias: bool | None
    o_bias: bool | None
    windows: str
    has_mlp_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None
    context: int = 32768


FAMILIES = {
    "LlamaForCausalLM": Family(qkv_bias=None, o_bias=None, windows="none", has_mlp_bias=True, context=2048),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False, windows="all", kv_heads=8, context=131072),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False, windows="listed"),
    "Qwen3ForCausalLM": Family(qkv_bias=None, o_bias=None, windows="listed", qk_norm=True, head_dim=128),
}

MAX_LAYERS = 4096

UNSUPPORTED_FEATURES = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "num_experts",
    "num_local_experts",
    "vision_config",
    "quantization_config",
)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with RMSNorm, rotary positions and a gated MLP.

    Args:
        layer_windows: one a layer; tokens that a query sees, itself included, or None for all.
        tied_head: the head's weight is the embedding table.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    rms_norm_eps: float
    rotary: RotaryConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    layer_windows: tuple[int | None, ...]

    @property
    def sliding_window(self) -> int | None:
        """The window if every layer has it, so that older keys are never read again; else None."""
        windows = set(self.layer_windows)
        return windows.pop() if len(windows) == 1 else None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a parsed config.json.

        Raises:
            UnsupportedModelError: an architecture or feature that the decoder does not have.
            ModelError: a value that is missing, of the wrong type or out of range.
        """
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        _refuse_unsupported(config, architecture)
        hidden_size = read_size(config, "hidden_size")
        num_heads = read_size(config, "num_attention_heads")
        num_layers = read_size(config, "num_hidden_layers", high=MAX_LAYERS)
        num_kv_heads = read_size(config, "num_key_value_heads", family.kv_heads or num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        if config.get("head_dim") is None and family.head_dim is None and hidden_size % num_heads:
            raise ModelError(
                f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
            )
        head_dim = read_size(config, "head_dim", family.head_dim or hidden_size // num_heads)
        if head_dim % 2:
            raise ModelError(f"config.json: head_dim must be even for rotary positions, got {head_dim}")
        max_context = read_size(config, "max_position_embeddings", family.context)
        attention_bias = read_flag(config, "attention_bias", False)
        return cls(
            architecture=architecture,
            vocab_size=read_size(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read_size(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_context_tokens=max_context,
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6, low=0.0),
            rotary=read_rotary(config, head_dim, max_context),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=family.has_mlp_bias and read_flag(config, "mlp_bias", False),
            qk_norm=family.qk_norm,
            tied_head=read_flag(config, "tie_word_embeddings", False),
            layer_windows=_windows(config, family, num_layers),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    supported = ", ".join(FAMILIES)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnsupportedModelError(f"config.json names no architecture; supported: {supported}")
    if names[0] not in FAMILIES:
        raise UnsupportedModelError(f"unsupported architecture {names[0]}; supported: {supported}")
    return names[0]


def _refuse_unsupported(config: Mapping[str, Any], architecture: str) -> None:
    for key in UNSUPPORTED_FEATURES:
        if config.get(key) not in (None, False, 0):
            cure = "give the unquantized model" if key == "quantization_config" else f"{architecture} runs without it"
            raise UnsupportedModelError(f"config.json sets {key}, which the native engine does not compute; {cure}")
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UnsupportedModelError(f"config.json: hidden_act {act!r} is not supported; supported: silu")


def _windows(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.windows == "none":
        return (None,) * num_layers
    has_window = config.get("sliding_window") is not None
    if family.windows == "all":
        return ((read_size(config, "sliding_window") if has_window else None),) * num_layers
    uses_window = read_flag(config, "use_sliding_window", False)
    window = read_size(config, "sliding_window", 4096) if uses_window and config.get("sliding_window", 4096) else None
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = read_size(config, "max_window_layers", 28, low=0)
        return tuple(window if index >= first else None for index in range(num_layers))
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ModelError(f"config.json: layer_types must list {num_layers} layers, got {layer_types!r:.80}")
    for layer_type in layer_types:
        if layer_type not in allowed:
            raise UnsupportedModelError(f"config.json: layer type {layer_type!r}; supported: {', '.join(allowed)}")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
