"""The run folder: what is resumed, what is refused, and how the winner is kept and found."""

from pathlib import Path

import pytest

from hasten.bench.result import Candidate
from hasten.errors import ResultError, UsageError
from hasten.pipeline.run_folder import open_run_folder, read_winner


def test_an_equal_run_is_resumed(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "run", {"model": "a", "concurrency": (1, 2)}, {"config": {}})
    run = open_run_folder(tmp_path / "run", {"model": "a", "concurrency": (1, 2)}, {"config": {"runs": 20}})
    assert '"runs": 20' in run.plan_path.read_text()


def test_another_run_in_the_folder_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "run", {"model": "a", "seed": 0}, {})
    before = (tmp_path / "run" / "plan.json").read_text()
    with pytest.raises(UsageError, match="a run with another seed: choose another folder with -o"):
        open_run_folder(tmp_path / "run", {"model": "a", "seed": 1}, {})
    assert (tmp_path / "run" / "plan.json").read_text() == before


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear to me")
    with pytest.raises(UsageError, match="is not a run of hasten"):
        open_run_folder(tmp_path, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        open_run_folder(tmp_path / "run", {}, {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": 3}', "null"])
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match="choose another folder"):
        open_run_folder(tmp_path, {"model": "a"}, {})


def test_a_converted_winner_moves_to_engine_and_is_found_again(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "run", {}, {})
    artifact = run.candidate_path("native-w8a16")
    artifact.mkdir(parents=True)
    (artifact / "engine.json").write_text("{}")
    run.keep_winner(Candidate("native", "w8a16"), artifact, tmp_path / "model")
    run.clean()
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    winner = read_winner(moved)
    assert winner is not None
    assert (winner.candidate.name, winner.artifact) == ("native-w8a16", moved / "engine")
    assert (winner.artifact / "engine.json").is_file()
    assert not (moved / "candidates").exists()


def test_a_winner_that_needs_no_conversion_stays_where_it_is(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "run", {}, {})
    run.keep_winner(Candidate("transformers", "bf16"), tmp_path / "model", tmp_path / "model")
    winner = read_winner(run.path)
    assert winner is not None
    assert winner.artifact == tmp_path / "model"


def test_a_folder_without_a_winner_has_none_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    assert read_winner(tmp_path) is None
    (tmp_path / "winner.json").write_text('{"runtime": "native"}')
    with pytest.raises(ResultError, match="run hasten optimize again"):
        read_winner(tmp_path)
