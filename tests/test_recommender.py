"""docs/examples/recommender.py: its readers, its stream, its learners and what it writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fusestep as fs

if TYPE_CHECKING:
    from types import ModuleType

PROGRAM = Path(__file__).parent.parent / "docs" / "examples" / "recommender.py"
FACTORS = 4
STREAM = {"interactions": 6000, "seed": 5, "users": 80, "items": 50}


def load() -> ModuleType:
    if not PROGRAM.exists():
        pytest.skip("not in a source tree", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("recommender", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look types up
    spec.loader.exec_module(module)
    return module


recommender = load()
FACTOR_MODELS = [name for name, kind in recommender.KINDS.items() if not kind.only_biases]


@pytest.fixture(scope="module")
def stream() -> Any:
    return recommender.synthetic(**STREAM)


def assert_same_streams(a: Any, b: Any) -> None:
    for name in ("users", "items", "ratings"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


# ---- files --------------------------------------------------------------------------------------

# Interactions as (user, item, rating, timestamp), not in order of time.
INTERACTIONS = [(7, 30, 4, 300), (9, 10, 3, 100), (7, 10, 5, 200), (2, 30, 1, 300)]
HEADERS = {"ratings.csv": "userId,movieId,rating,timestamp\n", "u.data": "", "ratings.dat": ""}
SEPARATORS = {"ratings.csv": ",", "u.data": "\t", "ratings.dat": "::"}


def write(directory: Path, name: str, rows: list[Any], newline: str = "\n") -> Path:
    lines = [SEPARATORS[name].join(map(str, row)) for row in rows]
    text = HEADERS[name] + "".join(line + "\n" for line in lines)
    (directory / name).write_bytes(text.replace("\n", newline).encode())
    return directory


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("name", HEADERS)
def test_reads_files_in_order_of_time(name: str, newline: str, tmp_path: Path) -> None:
    found = recommender.read(write(tmp_path, name, INTERACTIONS, newline))
    assert found.source == str(tmp_path / name)
    np.testing.assert_array_equal(found.users, [0, 1, 1, 2])  # 9, 7, 7, 2
    np.testing.assert_array_equal(found.items, [0, 0, 1, 1])  # 10, 10, 30, 30
    np.testing.assert_array_equal(found.ratings, np.float32([3, 5, 4, 1]))
    assert (found.n_users, found.n_items) == (3, 2)


def test_of_the_same_second_the_order_is_the_files(tmp_path: Path) -> None:
    rows = [(1, 1, i, i % 3) for i in range(999)]
    found = recommender.read(write(tmp_path, "ratings.csv", rows))
    np.testing.assert_array_equal(
        found.ratings, [*range(0, 999, 3), *range(1, 999, 3), *range(2, 999, 3)]
    )


def test_reads_half_stars(tmp_path: Path) -> None:
    found = recommender.read(write(tmp_path, "ratings.csv", [(1, 1, "3.5", 0)]))
    assert found.ratings.tolist() == [3.5]


def test_of_several_files_it_reads_one(tmp_path: Path) -> None:
    for name in HEADERS:
        write(tmp_path, name, INTERACTIONS)
    assert len(recommender.read(tmp_path)) == len(INTERACTIONS)


@pytest.mark.parametrize(
    "row",
    [
        ("1", "2", "3"),
        ("1", "2", "3", "4", "5"),
        ("1", "2", "good", "4"),
        ("1", "2", "nan", "4"),
        ("1", "2.5", "3", "4"),
        ("", "2", "3", "4"),
        (10**20, "2", "3", "4"),
        (),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", HEADERS)
def test_says_which_line_is_malformed(name: str, row: Any, tmp_path: Path) -> None:
    write(tmp_path, name, [*INTERACTIONS, row])
    line = 5 + bool(HEADERS[name])
    with pytest.raises(ValueError, match=rf"{name}, line {line}: expected four numbers") as error:
        recommender.read(tmp_path)
    assert SEPARATORS[name].join(map(str, row)) in str(error.value).replace("\\t", "\t")


def test_bytes_that_are_no_text_are_malformed(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_bytes(b"1\t2\t3\t4\n\xff\xfe\t2\t3\t4\n")
    with pytest.raises(ValueError, match=r"u\.data, line 2"):
        recommender.read(tmp_path)


def test_a_csv_file_must_have_the_header(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("1,2,3,4\n")
    with pytest.raises(ValueError, match=r"line 1: expected 'userId,movieId,rating,timestamp'"):
        recommender.read(tmp_path)


@pytest.mark.parametrize("name", HEADERS)
def test_a_file_without_interactions_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no interactions"):
        recommender.read(write(tmp_path, name, []))


def test_a_directory_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no ratings\.csv, u\.data, ratings\.dat"):
        recommender.read(tmp_path)


# ---- the synthetic stream -----------------------------------------------------------------------


def test_the_synthetic_stream_is_reproducible(stream: Any) -> None:
    assert_same_streams(stream, recommender.synthetic(**STREAM))
    other = recommender.synthetic(**{**STREAM, "seed": 6})
    assert not np.array_equal(stream.ratings, other.ratings)


@pytest.mark.parametrize("interactions", [1, 37, 6000])
def test_it_has_as_many_interactions_as_asked_for(interactions: int) -> None:
    stream = recommender.synthetic(interactions, 0)
    assert len(stream) == len(stream.users) == len(stream.items) == interactions
    assert set(stream.ratings) <= set(np.arange(1, 11) / 2)


def test_users_and_items_arrive_over_time() -> None:
    stream = recommender.synthetic(50_000, 0)
    first = stream[:5000]
    assert 0 < first.n_users < stream.n_users / 2
    assert 0 < first.n_items < stream.n_items / 2
    for ids in (stream.users, stream.items):  # whoever is new has the next number
        assert ids[0] == 0
        assert np.diff(np.maximum.accumulate(ids)).max() == 1


def test_few_items_have_most_of_the_interactions() -> None:
    counts = np.sort(np.bincount(recommender.synthetic(50_000, 0).items))[::-1]
    assert counts[: len(counts) // 10].sum() > counts.sum() / 2


def change_between_visits(stream: Any) -> tuple[float, float]:
    """Mean squared change of a user's rating of one item, soon after and long after."""
    pairs = stream.users * stream.n_items + stream.items
    order = np.argsort(pairs, kind="stable")
    again = np.diff(pairs[order]) == 0
    gap, change = np.diff(order)[again], np.diff(stream.ratings[order])[again] ** 2
    return change[gap < len(stream) / 20].mean(), change[gap > len(stream) / 4].mean()


def test_tastes_drift() -> None:
    options = {"interactions": 20_000, "seed": 0, "users": 60, "items": 60}
    soon, late = change_between_visits(recommender.synthetic(**options, drift=0.1))
    assert late > 1.3 * soon
    soon, late = change_between_visits(recommender.synthetic(**options, drift=0.0))
    assert late < 1.1 * soon


def test_numbers_are_given_in_order_of_appearance() -> None:
    assert recommender.numbered(np.array([7, 3, 7, 9, 3])).tolist() == [0, 1, 0, 2, 1]


# ---- learning -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def courses(stream: Any) -> dict[str, Any]:
    return recommender.compare(stream, 16, FACTORS, 0)


@pytest.mark.parametrize("name", FACTOR_MODELS)
def test_factors_beat_biases_and_these_the_mean(name: str, courses: dict[str, Any]) -> None:
    rmse = {key: course.rmse for key, course in courses.items()}
    assert rmse[name] < 0.97 * rmse["biases only, Adam"]
    assert rmse["biases only, Adam"] < 0.97 * rmse["global mean"]


def test_exact_rows_do_what_dense_gradients_do(courses: dict[str, Any]) -> None:
    exact, dense = (courses[f"factors, Adam {mode}"].errors for mode in ("exact", "dense"))
    np.testing.assert_allclose(exact, dense, rtol=0, atol=1e-5)
    assert not np.allclose(exact, courses["factors, Adam lazy"].errors, atol=0.1)


def test_each_prediction_is_made_before_it_is_learned_from(stream: Any) -> None:
    batch = stream[:16]
    model = recommender.KINDS["factors, Adam lazy"].new(FACTORS, 0)
    before = model.test_then_train(batch)
    assert np.abs(before).mean() > np.abs(batch.ratings - model.predict(batch)).mean()
    # What is told of later ratings changes no earlier error.
    other = dataclasses.replace(stream, ratings=np.where(np.arange(len(stream)) < 64, 1, 5))
    another = dataclasses.replace(other, ratings=np.where(np.arange(len(stream)) < 64, 1, 0))
    first, second = (
        recommender.prequential(recommender.KINDS["factors, Adam exact"].new(FACTORS, 0), s, 16)
        for s in (other[:96], another[:96])
    )
    np.testing.assert_array_equal(first.errors[:64], second.errors[:64])
    assert (first.errors[64:80] - second.errors[64:80] == 5).all()


def test_the_global_mean() -> None:
    mean = recommender.GlobalMean()
    batch = recommender.Stream("", *np.zeros((2, 2), np.int64), np.float32([4, 5]))
    assert mean.test_then_train(batch).tolist() == [1, 2]  # from the middle of five stars
    assert mean.test_then_train(batch).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("name", recommender.KINDS)
def test_growing_tables_keep_what_was_learned(name: str, stream: Any) -> None:
    stream = stream[:2000]
    growing = recommender.KINDS[name].new(FACTORS, 0)
    ample = recommender.KINDS[name].new(FACTORS, 0)
    ample.grow(stream.n_users, stream.n_items)
    a, b = (recommender.prequential(model, stream, 16) for model in (growing, ample))
    np.testing.assert_array_equal(a.errors, b.errors)
    np.testing.assert_array_equal(growing.predict(stream), ample.predict(stream))
    for table in growing.tables:
        np.testing.assert_array_equal(growing.tables[table], ample.tables[table])


def test_gradients_are_those_of_the_loss(stream: Any) -> None:
    """Of half the squared errors and the penalty, by differences in float64."""
    batch = stream[:40]
    model = recommender.Recommender(fs.SGD, FACTORS, penalty=0.1)
    model.grow(batch.n_users, batch.n_items)
    rng = np.random.default_rng(0)
    for table in model.tables.values():
        table[...] = rng.standard_normal(table.shape)
    tables = {name: table.astype(np.float64) for name, table in model.tables.items()}

    def loss() -> float:
        p, q = tables["users"][batch.users], tables["items"][batch.items]
        biases = tables["user_bias"][batch.users] + tables["item_bias"][batch.items]
        errors = batch.ratings - (model.mean.value + biases + (p * q).sum(axis=1))
        return (errors**2).sum() / 2 + 0.05 * ((p**2).sum() + (q**2).sum())

    gradients = model._gradients(batch, batch.ratings - model.predict(batch))
    for name, table in tables.items():
        rows = gradients[name]
        found = recommender.dense(model.tables[name], rows.indices, rows.values)
        for _ in range(5):
            index = tuple(rng.integers(0, size) for size in table.shape)
            value = table[index]
            table[index] = value + 1e-5
            above = loss()
            table[index] = value - 1e-5
            below = loss()
            table[index] = value
            assert found[index] == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-3)


# ---- what it says -------------------------------------------------------------------------------


def a_course(errors: list[float], batch: int = 1) -> Any:
    seconds = np.full(-(-len(errors) // batch), 2e-6)
    return recommender.Course(np.float32(errors), seconds, seconds / 2, batch)


def test_a_course_sums_up() -> None:
    course = a_course([3, -4, 0, 0])
    assert course.rmse == 2.5
    np.testing.assert_allclose(course.rolling_rmse(2), [np.sqrt(12.5), np.sqrt(8), 0])
    assert course.microseconds == pytest.approx(2)
    assert course.median_microseconds(course.optimizer_seconds, 2) == pytest.approx([1, 1])
    batches = a_course([0] * 5, batch=2)  # the last one is half as long
    assert batches.median_microseconds(batches.seconds, 10) == pytest.approx([1, 1, 2])


def test_the_report_the_json_and_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    results, plot = tmp_path / "results.json", tmp_path / "plot.png"
    arguments = ["--interactions", "1000", "--batch", "32", "--factors", "3", "--seed", "1"]
    recommender.main([*arguments, "--json", str(results), "--plot", str(plot)])

    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "1,000 interactions, SYNTHETIC" in printed
    found = json.loads(results.read_text())
    assert {key: found[key] for key in ("source", "interactions", "batch", "factors", "seed")} == {
        "source": "synthetic",
        "interactions": 1000,
        "batch": 32,
        "factors": 3,
        "seed": 1,
    }
    assert list(found["learners"]) == ["global mean", *recommender.KINDS]
    for name, learner in found["learners"].items():
        assert f"{name:24}{learner['rmse']:8.4f}" in printed
        assert learner["us_per_interaction"] > 0
        assert len(learner["median_us_by_tenth"]) == len(learner["optimizer_us_by_tenth"]) == 10
        assert len(learner["rolling_rmse"]) == 20
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_it_learns_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "u.data", INTERACTIONS)
    results = tmp_path / "results.json"
    options = ["--no-dense", "--interactions", "3", "--json", str(results)]
    recommender.main(["--data-dir", str(tmp_path), *options])
    assert f"3 interactions, from {tmp_path / 'u.data'}" in capsys.readouterr().out
    found = json.loads(results.read_text())
    assert (found["users"], found["items"]) == (2, 2)
    assert "factors, Adam dense" not in found["learners"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--batch", "0"], "0 is not a positive whole number"),
        (["--seed", "-1"], "-1 is not a whole number from 0"),
        (["--plot", "no/such/directory/a.png"], "there is no directory no/such/directory"),
    ],
)
def test_a_wrong_option_is_refused_at_once(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        recommender.main(arguments)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^there is no ratings\.csv"):
        recommender.main(["--data-dir", str(tmp_path)])
