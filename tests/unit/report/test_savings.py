import pytest

from hasten.bench.metrics import Percentiles, SpeedSummary, Spread
from hasten.errors import UsageError
from hasten.report.findings import savings_sentences
from hasten.report.savings import Prices, cost_per_million_tokens, savings


def speed(concurrency: int, rate: float, spread: float = 0.0) -> SpeedSummary:
    times, one = Percentiles(1, 1, 1, 1), Spread(1, 1, 1, 10)
    return SpeedSummary(
        concurrency=concurrency,
        output_throughput_per_s=Spread(rate, rate - spread, rate + spread, 10),
        requests_per_s=one,
        ttft_s=times,
        e2e_latency_s=times,
        itl_s=None,
        tpot_s=None,
        ttft_spread_s=one,
        tpot_spread_s=None,
        e2e_latency_spread_s=one,
        scaling_efficiency=None,
        mbu=None,
        cpu_cores=2.0,
        num_failed_requests=0,
    )


def test_one_machines_worth_is_a_fraction_of_a_machine_after() -> None:
    saved = savings((speed(1, 5), speed(8, 10)), (speed(1, 30), speed(8, 40)), Prices(0.36))
    assert saved is not None
    assert (saved.machines_before, saved.machines_after) == (1.0, 0.25)
    assert saved.cost_per_million_before == pytest.approx(0.36 / (10 * 3600) * 1e6)
    assert saved.cost_per_million_after == pytest.approx(2.5)
    assert saved.monthly_saving == pytest.approx(0.75 * 0.36 * 730)


def test_a_given_load_needs_whole_machines() -> None:
    saved = savings((speed(8, 10),), (speed(8, 40),), Prices(2.0, load_tokens_per_s=101))
    assert saved is not None
    assert (saved.machines_before, saved.machines_after) == (11, 3)
    assert saved.monthly_saving == pytest.approx(8 * 2.0 * 730)


def test_without_a_price_there_are_machines_but_no_money() -> None:
    saved = savings((speed(8, 10),), (speed(8, 40),), Prices())
    assert saved is not None
    assert saved.monthly_saving is None
    text = " ".join(savings_sentences(saved, "EUR", None))
    assert "100 machines become 25" in text
    assert "--price-per-hour" in text
    assert "EUR" not in text


def test_no_saving_is_claimed_for_a_tie() -> None:
    saved = savings((speed(8, 10, spread=3),), (speed(8, 12, spread=3),), Prices(1.0))
    assert saved is not None
    assert not saved.is_claimed
    assert "no saving is claimed" in " ".join(savings_sentences(saved, "EUR", 1.0))


def test_a_slower_candidate_costs_more() -> None:
    saved = savings((speed(1, 40),), (speed(1, 10),), Prices(1.0))
    assert "costs 2,190 EUR a month" in " ".join(savings_sentences(saved, "EUR", 1.0))


def test_without_measurements_there_is_nothing_to_save() -> None:
    assert savings((), (speed(1, 10),), Prices(1.0)) is None
    assert "No saving can be computed" in savings_sentences(None, "EUR", 1.0)[0]


def test_cost_of_a_million_tokens() -> None:
    assert cost_per_million_tokens(3.6, 1000) == pytest.approx(1.0)


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_a_price_must_be_above_zero(price: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        Prices(price)
