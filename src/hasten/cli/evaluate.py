"""`hasten eval`: how far a runtime and precision are from the transformers baseline."""

import typer

from hasten.cli import terminal
from hasten.cli.options import Json, verb
from hasten.errors import GateError
from hasten.pipeline.config import EvalConfig


def register(app: typer.Typer) -> None:
    @verb(app, "eval", arguments=["model"])
    def evaluate(config: EvalConfig, *, json: Json = False) -> None:
        """Measure perplexity, KL divergence and greedy agreement against the transformers baseline."""
        from hasten.pipeline.evaluate import evaluate_model

        with terminal.progress_bar() as on_progress:
            baseline, quality = evaluate_model(config, on_progress)
        increase = quality.perplexity / baseline.perplexity - 1
        if json:
            import msgspec

            values = {"baseline": baseline, "candidate": quality, "perplexity_increase": increase}
            terminal.result(msgspec.json.format(msgspec.json.encode(values), indent=1).decode())
        else:
            headers = ("", "perplexity", "bits per byte", "KL nats/token", "same top token", "greedy match")
            rows = [
                (
                    name,
                    f"{each.perplexity:.4f}",
                    f"{each.bits_per_byte:.4f}",
                    f"{each.mean_kl:.3g}",
                    f"{each.top1_agreement:.2%}",
                    f"{each.greedy_match_tokens:g} of {each.greedy_tokens}",
                )
                for name, each in (
                    (f"transformers {config.baseline}", baseline),
                    (f"{config.runtime} {config.scheme}", quality),
                )
            ]
            terminal.print_table(headers, rows)
            terminal.result(f"perplexity {increase:+.3%}, on {quality.num_tokens} tokens of {quality.text}")
        if config.max_perplexity_increase is not None and not increase <= config.max_perplexity_increase:
            raise GateError(f"perplexity rose by {increase:.3%}, {config.max_perplexity_increase:.3%} is allowed")
        if config.max_kl is not None and not quality.mean_kl <= config.max_kl:
            raise GateError(f"the KL divergence is {quality.mean_kl:.3g} nats a token, {config.max_kl:g} is allowed")
