"""A candidate behind a server, beside itself without one."""

from dataclasses import dataclass

from hasten.bench.result import BenchResult


@dataclass(frozen=True)
class Served:
    """Two measurements of one candidate; after each run of the first came one of the second.

    Args:
        over_http: its `failure` says why nothing was measured; then `offline` is from before.
        offline: without a server.
    """

    over_http: BenchResult
    offline: BenchResult
