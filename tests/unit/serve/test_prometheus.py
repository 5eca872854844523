"""The metrics' names, units and counts, and that the dashboard asks for none that does not exist."""

import json
import re
from pathlib import Path

from fake_encoder import FakeEncoderClient, encoder_service
from fake_engine import FakeEngineClient, make_service
from prometheus_client.parser import text_string_to_metric_families
from test_openai_api import post, served

from hasten.serve.prometheus import Histogram
from hasten.serve.service import Service

DASHBOARD = Path(__file__).parents[3] / "examples" / "grafana" / "hasten.json"
DOCS = Path(__file__).parents[3] / "docs" / "serving.md"


def samples_of(service: Service) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = served(service, lambda http: http.get("/metrics")).text
    return {
        (
            sample.name,
            tuple(sorted((name, value) for name, value in sample.labels.items() if name != "model_name")),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_and_the_engine_are_counted() -> None:
    service = make_service(FakeEngineClient())
    body = {"prompt": [5, 6, 7], "max_tokens": 4}
    for _ in range(2):
        assert served(service, lambda http: http.post("/v1/completions", json=body)).status_code == 200
    served(service, lambda http: http.post("/v1/completions", json={}))
    found = samples_of(service)
    assert found["hasten:request_success_total", (("finished_reason", "length"),)] == 2
    assert found["hasten:request_errors_total", (("kind", "missing_parameter"),)] == 1
    assert found["hasten:time_to_first_token_seconds_count", ()] == 2
    assert found["hasten:inter_token_latency_seconds_count", ()] == 6
    assert found["hasten:e2e_request_latency_seconds_bucket", (("le", "+Inf"),)] == 2
    assert found["hasten:request_prompt_tokens_sum", ()] == 6
    assert found["hasten:kv_cache_usage_perc", ()] == 0.25
    assert found["hasten:prefix_cache_hits_total", ()] == 4
    assert found["hasten:engine_ready", ()] == 1


def test_an_encoder_has_no_figures_of_a_cache() -> None:
    names = {name for name, _ in samples_of(encoder_service(FakeEncoderClient()))}
    assert {"hasten:prompt_tokens_total", "hasten:engine_ready"} <= names
    assert not {name for name in names if "cache" in name or "preemption" in name}


def test_an_error_in_the_middle_of_a_stream_is_counted() -> None:
    service = make_service(FakeEngineClient(fails_after=3, dies=True))
    served(service, lambda http: http.post("/v1/completions", json={"prompt": "x", "stream": True}))
    assert service.metrics.errors == {"engine_unavailable": 1}
    assert service.metrics.finished["error"] == 1


def test_buckets_include_their_upper_bound_and_add_up() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert histogram.sum == 8


def test_dashboard_and_documentation_name_metrics_that_exist() -> None:
    service = make_service(FakeEngineClient())
    service.metrics.errors["x"] = 1
    names = {name for name, _ in samples_of(service)}
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked = set(re.findall(r"hasten:\w+", target["expr"]))
            assert asked
            assert asked <= names, f"{panel['title']}: {asked - names}"
    described = set(re.findall(r"^\| (`.*?`) \| (?:histogram|gauge|counter)", DOCS.read_text(), re.MULTILINE))
    documented = {name for cell in described for name in re.findall(r"`(\w+)", cell)}
    families = {re.sub(r"_(bucket|count|sum)$", "", name.removeprefix("hasten:")) for name in names}
    assert documented == families


def test_a_scrape_is_prometheus_text() -> None:
    answer = served(make_service(FakeEngineClient()), lambda http: http.get("/metrics"))
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert post("/metrics", {}).status_code == 405
