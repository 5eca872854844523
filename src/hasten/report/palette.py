"""One colour for each runtime, one shade, hatch and marker for each scheme, in every picture.

The hues are Okabe and Ito's, which readers with any common colour blindness can tell apart; the
scheme is told by shade, hatch and marker, so nothing depends on colour alone.
"""

from dataclasses import dataclass
from zlib import crc32

RUNTIME_COLORS = {
    "transformers": "#6E6E6E",
    "native": "#0072B2",
    "onnxruntime": "#D55E00",
    "llama_cpp": "#009E73",
    "vllm": "#CC79A7",
    "tensorrt_llm": "#E69F00",
}
OTHER_COLORS = ("#56B4E9", "#8C6BB1", "#B8860B", "#00868B")
GROUP_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C6BB1")
REST_COLOR = "#999999"
DASHES = {"fp32": "2 3", "bf16": "6 3", "fp16": "6 3 2 3", "w8a16": "", "w4a16": "10 3"}


@dataclass(frozen=True)
class SchemeStyle:
    """How one scheme differs from the others of its runtime.

    Args:
        tint: share of white (above 0) or black (below 0) mixed into the runtime's colour.
        hatch, marker, linestyle: in matplotlib's spelling.
    """

    tint: float
    hatch: str
    marker: str
    linestyle: str


SCHEME_STYLES = {
    "fp32": SchemeStyle(0.62, "", "o", ":"),
    "bf16": SchemeStyle(0.40, "///", "s", "--"),
    "fp16": SchemeStyle(0.40, "\\\\\\", "P", "-."),
    "w8a16": SchemeStyle(0.0, "", "D", "-"),
    "w4a16": SchemeStyle(-0.30, "...", "^", "-"),
}
OTHER_SCHEME = SchemeStyle(0.2, "xxx", "v", "-.")


def runtime_color(runtime: str) -> str:
    """The runtime's hue as #rrggbb; the same name has the same hue in every report."""
    return RUNTIME_COLORS.get(runtime) or OTHER_COLORS[crc32(runtime.encode()) % len(OTHER_COLORS)]


def scheme_style(scheme: str) -> SchemeStyle:
    return SCHEME_STYLES.get(scheme, OTHER_SCHEME)


def candidate_color(runtime: str, scheme: str) -> str:
    return mix(runtime_color(runtime), scheme_style(scheme).tint)


def candidate_color_dark(runtime: str, scheme: str) -> str:
    """The same on a dark ground: lighter throughout, the order of the shades kept."""
    return mix(runtime_color(runtime), 0.30 + scheme_style(scheme).tint * 0.55)


def group_color(index: int, is_rest: bool) -> str:
    """The colour of a group of operators in a profile; `is_rest` is what no operator accounts for."""
    return REST_COLOR if is_rest else GROUP_COLORS[index % len(GROUP_COLORS)]


def mix(color: str, tint: float) -> str:
    """Mixes #rrggbb with white (tint above 0) or black (below 0)."""
    target = 255 if tint > 0 else 0
    channels = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (target - channel) * abs(tint)):02X}" for channel in channels)
