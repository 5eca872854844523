"""Results of runs as Markdown: one table a model, with each speed beside its peer of the same run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    ("batch_1", "batch 1"),
    ("batch_8", "8"),
    ("batch_64", "64"),
    ("batch_256", "256"),
    ("ttft_128", "TTFT 128"),
    ("prefill_2048", "TTFT 2048"),
    ("decode_32k", "decode at 32k"),
)
ORDER = ("transformers", "vllm", "native")
PEER_SCHEME = {"bf16": "bf16", "fp16": "bf16", "w8a16": "fp8", "fp8": "fp8"}


def markdown(paths: Sequence[Path]) -> str:
    """All results of the files; a row is one engine and precision in one run."""
    runs = [json.loads(path.read_text()) for path in paths]
    lines: list[str] = []
    for number, run in enumerate(runs, 1):
        versions = ", ".join(f"{name} {version}" for name, version in sorted(run.get("versions", {}).items()))
        lines.append(f"Run {number}: {run['created_at']}, {run['gpu']}, driver {run['driver']}, {versions}.")
        if ceilings := run.get("ceilings"):
            rates = [f"copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s"]
            rates.append(f"read {ceilings['read_bytes_per_s'] / 1e12:.2f} TB/s")
            rates += [
                f"{name} {ceilings[key] / 1e12:.0f} TFLOP/s"
                for name, key in (("bf16", "bf16_flop_per_s"), ("fp8", "fp8_flop_per_s"))
                if key in ceilings
            ]
            lines.append(f"Ceilings of run {number}: {', '.join(rates)}.")
    models = list(dict.fromkeys(entry["model"] for run in runs for entry in run.get("measurements", ())))
    for model in models:
        lines += ["", f"### {model}, random weights", "", *_table(model, runs)]
    notes = [f"Run {number}: {note['text']}" for number, run in enumerate(runs, 1) for note in run.get("notes", ())]
    return "\n".join([*lines, "", *notes]).strip()


def _table(model: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"| | {' | '.join(title for _, title in COLUMNS)} | batch 1 of the limit | ready | run |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    rows = []
    for number, run in enumerate(runs, 1):
        found = [entry for entry in run.get("measurements", ()) if entry["model"] == model]
        for engine, scheme in dict.fromkeys((entry["engine"], entry["scheme"]) for entry in found):
            cells = [_cell(found, engine, scheme, case) for case, _ in COLUMNS]
            loads = [
                each
                for each in run.get("ready", ())
                if (each["model"], each["engine"], each["scheme"]) == (model, engine, scheme)
            ]
            cells.append(_share(run, loads, found, engine, scheme))
            cells.append(", ".join(f"{each['s']:.1f}" for each in loads) + " s" if loads else "")
            row = f"| {engine} {scheme} | {' | '.join(cells)} | {number} |"
            rows.append((ORDER.index(engine), scheme, number, row))
    return lines + [row for *_, row in sorted(rows)]


def _share(
    run: dict[str, Any], loads: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], engine: str, scheme: str
) -> str:
    """Bytes of weights read a second at batch 1, the prompt's time included, as a share of the read bandwidth."""
    weight_bytes = next((each["weight_bytes"] for each in loads if each["weight_bytes"]), None)
    bandwidth = run.get("ceilings", {}).get("read_bytes_per_s")
    speeds = [
        entry["median"]
        for entry in found
        if (entry["engine"], entry["scheme"], entry["name"]) == (engine, scheme, "batch_1")
    ]
    if not (weight_bytes and bandwidth and speeds):
        return ""
    return f"{speeds[0] * weight_bytes / bandwidth:.0%}"


def _cell(entries: Sequence[dict[str, Any]], engine: str, scheme: str, case: str) -> str:
    """A median with its extremes; for hasten, how many times better than vLLM beside it."""
    own = [entry for entry in entries if (entry["engine"], entry["scheme"], entry["name"]) == (engine, scheme, case)]
    if not own:
        return ""
    samples = sorted(sample for entry in own for sample in entry["samples"])
    median = samples[len(samples) // 2] if len(samples) % 2 else sum(samples[len(samples) // 2 - 1 :][:2]) / 2
    digits = 0 if median >= 1000 else 1
    text = f"{median:.{digits}f} ({samples[0]:.{digits}f}-{samples[-1]:.{digits}f})"
    text += " ms" if own[0]["unit"] == "ms" else ""
    peer_name = f"vllm {PEER_SCHEME.get(scheme)}"
    peers = [
        entry
        for entry in entries
        if f"{entry['engine']} {entry['scheme']}" == peer_name
        and entry["name"] == case
        and f"{engine} {scheme}" in entry["beside"]
    ]
    if engine == "native" and peers:
        ratio = own[0]["median"] / peers[0]["median"]
        text += f", {1 / ratio if own[0]['unit'] == 'ms' else ratio:.2f} x"
    return text
