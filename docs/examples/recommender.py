"""A recommender that learns from each interaction as it arrives.

Biased matrix factorization (Koren, Bell & Volinsky 2009) in plain NumPy: a rating is the mean of
all ratings, plus how far this user and this item are from it, plus how well their factors match.
Interactions come in order of time, B at once; each is predicted before it is learned from, which
makes the prequential error (Gama, Sebastião & Rodrigues 2013). Users and items that nobody has seen
before get rows in the tables (``opt.resize``), and a step moves the rows of the B interactions and
no others (``fs.Rows``), so its time does not depend on how many users there are.

``python docs/examples/recommender.py --data-dir ml-latest-small`` reads MovieLens's files (Harper &
Konstan 2015); without ``--data-dir`` the stream is synthetic.

References
----------
Koren, Bell & Volinsky (2009), "Matrix factorization techniques for recommender systems", equations
4 and 5; Gama, Sebastião & Rodrigues (2013), "On evaluating stream learning algorithms"; Harper &
Konstan (2015), "The MovieLens datasets: history and context".
"""

from __future__ import annotations

import argparse
import json
import sys
from array import array
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

import fusestep as fs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    Array = npt.NDArray[np.float32]
    Indices = npt.NDArray[np.int64]
    AsGradient = Callable[[Array, Indices, Array], Any]


# ---- interactions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Who rated what, in order of time.

    Attributes
    ----------
    source
        Where the interactions are from.
    users, items
        Row numbers, of shape [N], given in order of first appearance: whoever is new has the next
        one.
    ratings
        Of shape [N].
    """

    source: str
    users: Indices
    items: Indices
    ratings: Array

    def __len__(self) -> int:
        return len(self.ratings)

    def __getitem__(self, part: slice) -> Stream:
        return Stream(self.source, self.users[part], self.items[part], self.ratings[part])

    @property
    def n_users(self) -> int:
        """Users who have appeared by the last interaction."""
        return int(self.users.max(initial=-1)) + 1

    @property
    def n_items(self) -> int:
        """Items that have appeared by the last interaction."""
        return int(self.items.max(initial=-1)) + 1

    def batches(self, size: int) -> Iterator[Stream]:
        """Yield so many interactions at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def numbered(ids: npt.NDArray[Any]) -> Indices:
    """Return row numbers in place of ids, in order of first appearance.

    >>> numbered(np.array([7, 3, 7, 9]))
    array([0, 1, 0, 2])
    """
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


# ---- interactions that people had ---------------------------------------------------------------


class Format(NamedTuple):
    """How a file separates its columns, and its first line if that is not an interaction."""

    separator: str
    header: str | None = None


COLUMNS = "userId", "movieId", "rating", "timestamp"
FORMATS = {
    "ratings.csv": Format(",", ",".join(COLUMNS)),
    "u.data": Format("\t"),
    "ratings.dat": Format("::"),
}
"""MovieLens's files: since 2014, of 100K, and of 1M and 10M."""


def read(directory: Path) -> Stream:
    """Return the interactions of a MovieLens data set.

    Parameters
    ----------
    directory
        Where ``ratings.csv``, ``u.data`` or ``ratings.dat`` is; the first of these that is there.

    Raises
    ------
    FileNotFoundError
        None of them is there.
    ValueError
        A line is not an interaction; the message says which. There are no interactions.
    """
    for name, form in FORMATS.items():
        if (path := directory / name).is_file():
            return _by_time(path, *_read_columns(path, form))
    raise FileNotFoundError(f"there is no {', '.join(FORMATS)} in {directory}")


def _read_columns(path: Path, form: Format) -> tuple[array[int], array[int], array[float], Any]:
    users, items, ratings, times = array("q"), array("q"), array("d"), array("q")
    with path.open(encoding="utf-8", errors="replace") as lines:
        if form.header is not None and (header := next(lines, "").rstrip("\r\n")) != form.header:
            raise ValueError(f"{path}, line 1: expected {form.header!r}, found {header!r}")
        try:
            for line in lines:
                user, item, rating, time = line.split(form.separator)
                ratings.append(_finite(rating))
                users.append(int(user))
                items.append(int(item))
                times.append(int(time))
        except (ValueError, OverflowError):
            number = len(times) + (1 if form.header is None else 2)
            raise ValueError(
                f"{path}, line {number}: expected four numbers, "
                f"{form.separator.join(COLUMNS)!r}, found {line.rstrip()!r}"
            ) from None
    return users, items, ratings, times


def _finite(text: str) -> float:
    number = float(text)
    if not np.isfinite(number):
        raise ValueError(f"{text} is not a rating")
    return number


def _by_time(path: Path, users: Any, items: Any, ratings: Any, times: Any) -> Stream:
    if not times:
        raise ValueError(f"{path} has no interactions")
    # Stable: of the same second, in the order of the file.
    order = np.argsort(np.asarray(times), kind="stable")
    return Stream(
        str(path),
        numbered(np.asarray(users)[order]),
        numbered(np.asarray(items)[order]),
        np.asarray(ratings)[order].astype(np.float32),
    )


# ---- interactions that nobody had ---------------------------------------------------------------

SLICES = 200
"""Tastes stand still within a slice of the stream."""
TASTES = 4
MEAN, BIAS, MATCH, NOISE = 3.4, 0.4, 0.7, 0.4
"""The mean rating, and the standard deviations of what else a rating is made of."""


def synthetic(
    interactions: int,
    seed: int,
    *,
    users: int | None = None,
    items: int | None = None,
    drift: float = 0.1,
) -> Stream:
    """Make up interactions.

    Activity of users and popularity of items are Zipf's. A tenth of both is there from the start;
    the others arrive one by one, busy and idle, hits and flops alike. Tastes of users wander: a
    stationary random walk. A user may rate an item again, and may then say something else.

    Parameters
    ----------
    interactions
        How many.
    seed
        The same seed makes the same stream.
    users, items
        How many there may be at the end (some never show up); None: 1 for 20 interactions, and 1
        for 50.
    drift
        How far tastes move from one of 200 slices of the stream to the next, in standard
        deviations.
    """
    rng = np.random.default_rng(seed)
    users = users or max(interactions // 20, 10)
    items = items or max(interactions // 50, 10)
    user_bias, item_bias = rng.normal(0, BIAS, users), rng.normal(0, BIAS, items)
    tastes = rng.standard_normal((users, TASTES))
    traits = rng.normal(0, MATCH / np.sqrt(TASTES), (items, TASTES))
    activity, popularity = _zipf(users, 0.7, rng), _zipf(items, 1.0, rng)

    parts = []
    for now in np.array_split(np.arange(interactions), SLICES):
        share = 0.1 + 0.9 * (now[-1] + 1) / interactions if len(now) else 0.1
        u = _draw(activity[: int(np.ceil(share * users))], len(now), rng)
        i = _draw(popularity[: int(np.ceil(share * items))], len(now), rng)
        match = np.einsum("nd,nd->n", tastes[u], traits[i])
        opinion = MEAN + user_bias[u] + item_bias[i] + match + rng.normal(0, NOISE, len(now))
        parts.append((u, i, np.clip(np.round(2 * opinion) / 2, 0.5, 5)))  # half stars
        _wander(tastes, drift, rng)
    u, i, ratings = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Stream("synthetic", numbered(u), numbered(i), ratings.astype(np.float32))


def _zipf(size: int, exponent: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return how often each is drawn: as Zipf's law has it, in random order."""
    return rng.permutation(np.arange(1, size + 1) ** -exponent)


def _draw(weights: npt.NDArray[np.float64], size: int, rng: np.random.Generator) -> Indices:
    return rng.choice(len(weights), size, p=weights / weights.sum())


def _wander(tastes: npt.NDArray[np.float64], drift: float, rng: np.random.Generator) -> None:
    """Move tastes a little, and keep their variance: else ratings would spread more and more."""
    tastes *= np.sqrt(1 - drift**2)
    tastes += drift * rng.standard_normal(tastes.shape)


# ---- those who predict --------------------------------------------------------------------------


class Learner(Protocol):
    """What is tested and trained on a stream.

    Attributes
    ----------
    optimizer_seconds
        Time spent in its optimizer so far.
    """

    optimizer_seconds: float

    def test_then_train(self, batch: Stream) -> Array:
        """Return the errors of predictions that were made before learning from the batch."""


class GlobalMean:
    """Predicts the mean of all ratings so far."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0
        self.optimizer_seconds = 0.0  # it has none

    @property
    def value(self) -> float:
        """The mean; before there is any rating, the middle of five stars."""
        return self.sum / self.count if self.count else 3.0

    def add(self, ratings: Array) -> None:
        """Count more ratings."""
        self.sum += float(ratings.sum(dtype=np.float64))
        self.count += len(ratings)

    def test_then_train(self, batch: Stream) -> Array:
        """Return the errors of predictions that were made before learning from the batch."""
        errors = batch.ratings - np.float32(self.value)
        self.add(batch.ratings)
        return errors


def sparse(_table: Array, rows: Indices, values: Array) -> fs.Rows:
    """Return the gradient of some rows of a table; those listed twice are added up in the step."""
    return fs.Rows(rows, values)


def dense(table: Array, rows: Indices, values: Array) -> Array:
    """Return the gradient of the whole table: what a step takes without ``fs.Rows``."""
    gradient = np.zeros_like(table)
    np.add.at(gradient, rows, values)
    return gradient


class Recommender:
    r"""Biased matrix factorization.

    .. math:: r_{ui} = μ + b_u + c_i + p_u · q_i

    Parameters
    ----------
    new_optimizer
        From a dict of parameters to an optimizer.
    factors
        How many columns p and q have; with 0, biases are all there is.
    seed
        Of the factors that new users and items start with.
    as_gradient
        From a table, the rows that a batch reads and their gradients to what the step is given.
    penalty
        λ: each interaction also adds :math:`\tfrac{λ}{2} (|p_u|^2 + |q_i|^2)` to its half squared
        error.

    Attributes
    ----------
    optimizer
        Its parameters are the tables.
    optimizer_seconds
        Time spent in the optimizer's ``catch_up`` and ``step`` so far.
    """

    def __init__(
        self,
        new_optimizer: Callable[[dict[str, Array]], fs.Optimizer],
        factors: int,
        seed: int = 0,
        as_gradient: AsGradient = sparse,
        penalty: float = 0.02,
    ) -> None:
        tables = {"user_bias": np.empty(0, np.float32), "item_bias": np.empty(0, np.float32)}
        if factors:
            tables["users"] = np.empty((0, factors), np.float32)
            tables["items"] = np.empty((0, factors), np.float32)
        self.optimizer = new_optimizer(tables)
        self.mean = GlobalMean()
        self.optimizer_seconds = 0.0
        self._as_gradient, self._penalty = as_gradient, np.float32(penalty)
        # One generator a table: what a row starts with depends on its number, not on when it came.
        self._rngs = {"users": np.random.default_rng([seed, 0])}
        self._rngs["items"] = np.random.default_rng([seed, 1])

    @property
    def tables(self) -> dict[str, Array]:
        """The parameters. Asked for anew each time, since a table that grows moves."""
        tables: dict[str, Array] = self.optimizer.params
        return tables

    def grow(self, n_users: int, n_items: int) -> None:
        """Have rows for so many users and items."""
        for name, table in self.tables.items():
            rows = n_users if name.startswith("user") else n_items
            if rows > len(table):
                self.optimizer.resize(name, rows, init=partial(self._new_rows, name))

    def predict(self, batch: Stream) -> Array:
        """Return what the users will think of the items; all of them must have rows."""
        # Rows that were not listed for a while have missed steps, if the optimizer is exact.
        self._timed(self.optimizer.catch_up, self._rows(batch))
        tables, u, i = self.tables, batch.users, batch.items
        ratings = np.float32(self.mean.value) + tables["user_bias"][u] + tables["item_bias"][i]
        if "users" in tables:
            ratings += np.einsum("nk,nk->n", tables["users"][u], tables["items"][i])
        return ratings

    def test_then_train(self, batch: Stream) -> Array:
        """Return the errors of predictions that were made before learning from the batch."""
        self.grow(batch.n_users, batch.n_items)
        errors = batch.ratings - self.predict(batch)
        self._timed(self.optimizer.step, self._gradients(batch, errors))
        self.mean.add(batch.ratings)
        return errors

    def _timed(self, call: Callable[[Any], None], argument: Any) -> None:
        began = perf_counter()
        call(argument)
        self.optimizer_seconds += perf_counter() - began

    def _rows(self, batch: Stream) -> dict[str, Indices]:
        return {
            name: batch.users if name.startswith("user") else batch.items for name in self.tables
        }

    def _gradients(self, batch: Stream, errors: Array) -> dict[str, Any]:
        """Return the gradients of the batch's loss; who is in it twice is listed twice."""
        tables = self.tables
        values = {"user_bias": -errors, "item_bias": -errors}
        if "users" in tables:
            p, q, e = tables["users"][batch.users], tables["items"][batch.items], errors[:, None]
            # The penalty is here, not the optimizer's weight_decay: that would, with exact rows,
            # pull in each step at everybody, and at those who come once a year most.
            values["users"] = self._penalty * p - e * q
            values["items"] = self._penalty * q - e * p
        return {
            name: self._as_gradient(tables[name], rows, values[name])
            for name, rows in self._rows(batch).items()
        }

    def _new_rows(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self._rngs:
            return np.zeros(shape, np.float32)
        # Not zeros: where p and q both are, so are both their gradients.
        return self._rngs[name].standard_normal(shape, np.float32) * np.float32(0.1)


@dataclass(frozen=True)
class Kind:
    """A recommender and its optimizer.

    Attributes
    ----------
    new_optimizer
        From parameters to an optimizer.
    only_biases
        Whether it has no factors.
    as_gradient
        What a step is given: :func:`sparse` or :func:`dense`.
    """

    new_optimizer: Callable[[dict[str, Array]], fs.Optimizer]
    only_biases: bool = False
    as_gradient: AsGradient = sparse

    def new(self, factors: int, seed: int) -> Recommender:
        """Return one that has learned nothing yet."""
        factors = 0 if self.only_biases else factors
        return Recommender(self.new_optimizer, factors, seed, self.as_gradient)


KINDS = {
    "biases only, Adam": Kind(partial(fs.Adam, lr=0.01), only_biases=True),
    "factors, Adam lazy": Kind(partial(fs.Adam, lr=0.01)),
    "factors, Adam exact": Kind(partial(fs.Adam, lr=0.005, rows="exact")),
    "factors, RowwiseAdagrad": Kind(partial(fs.RowwiseAdagrad, lr=0.2)),
    "factors, Adam dense": Kind(partial(fs.Adam, lr=0.005), as_gradient=dense),
}
"""Learning rates are the best of ..., 1, 2, 5, 10, ... on synthetic streams of seeds 1 and 2."""


# ---- test, then train ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """How a learner did.

    Attributes
    ----------
    errors
        Rating minus prediction of each interaction.
    seconds
        Time of each batch: room for who is new, prediction, gradients, step.
    optimizer_seconds
        The part of it that was spent in the optimizer's ``catch_up`` and ``step``.
    batch
        Interactions in a batch.
    """

    errors: Array
    seconds: npt.NDArray[np.float64]
    optimizer_seconds: npt.NDArray[np.float64]
    batch: int

    @property
    def rmse(self) -> float:
        """Root of the mean squared error over the whole stream."""
        return float(np.sqrt(np.mean(np.square(self.errors, dtype=np.float64))))

    def rolling_rmse(self, window: int) -> npt.NDArray[np.float64]:
        """Return the RMSE of each `window` interactions in a row."""
        sums = np.cumsum(np.square(self.errors, dtype=np.float64))
        sums = np.concatenate([[0.0], sums])
        rolling: npt.NDArray[np.float64] = np.sqrt((sums[window:] - sums[:-window]) / window)
        return rolling

    @property
    def microseconds(self) -> float:
        """Mean time of an interaction."""
        return float(self.seconds.sum()) / len(self.errors) * 1e6

    def median_microseconds(self, seconds: npt.NDArray[np.float64], parts: int) -> list[float]:
        """Return the median time of an interaction in each of so many equal parts of the stream."""
        # The median: some batches are held up by other programs, and one in thousands by a table
        # that moves. The mean above has both.
        starts = np.arange(0, len(self.errors), self.batch)
        sizes = np.diff(starts, append=len(self.errors))  # the last batch may be a small one
        chunks = np.array_split(seconds / sizes, min(parts, len(seconds)))
        return [float(np.median(chunk)) * 1e6 for chunk in chunks]


def prequential(learner: Learner, stream: Stream, batch: int) -> Course:
    """Test and train a learner on each batch of a stream in turn."""
    errors, clocks = [], [(perf_counter(), learner.optimizer_seconds)]
    for part in stream.batches(batch):
        errors.append(learner.test_then_train(part))
        clocks.append((perf_counter(), learner.optimizer_seconds))
    seconds, optimizer_seconds = np.diff(clocks, axis=0).T
    return Course(np.concatenate(errors), seconds, optimizer_seconds, batch)


def compare(
    stream: Stream, batch: int, factors: int, seed: int, *, with_dense: bool = True
) -> dict[str, Course]:
    """Return the course of each kind of learner over the same stream, by its name."""
    courses = {"global mean": prequential(GlobalMean(), stream, batch)}
    for name, kind in KINDS.items():
        if with_dense or kind.as_gradient is not dense:
            courses[name] = prequential(kind.new(factors, seed), stream, batch)
    return courses


# ---- what is shown ------------------------------------------------------------------------------


def report(stream: Stream, courses: dict[str, Course]) -> Iterator[str]:
    """Yield the lines that are printed."""
    first = stream[: max(len(stream) // 10, 1)]
    yield f"{len(stream):,} interactions, {_described(stream)}"
    yield (
        f"rows in the tables: {first.n_users:,} users and {first.n_items:,} items after a tenth, "
        f"{stream.n_users:,} and {stream.n_items:,} at the end"
    )
    yield ""
    yield f"{'':32}  us per interaction      of which catch_up, step"
    yield f"{'':24}{'RMSE':>8}{'mean':>8}{'first':>8}{'last':>8}{'first':>13}{'last':>8} tenth"
    for name, course in courses.items():
        yield f"{name:24}{course.rmse:8.4f}{course.microseconds:8.2f}{_tenths(course)}"


def _described(stream: Stream) -> str:
    if stream.source == "synthetic":
        return "SYNTHETIC: tastes wander, popularity is Zipf's, users and items arrive"
    return f"from {stream.source}"


def _tenths(course: Course) -> str:
    whole = course.median_microseconds(course.seconds, 10)
    optimizer = course.median_microseconds(course.optimizer_seconds, 10)
    text = f"{whole[0]:8.2f}{whole[-1]:8.2f}"
    return text + f"{optimizer[0]:13.2f}{optimizer[-1]:8.2f}" if any(optimizer) else text


def as_json(stream: Stream, courses: dict[str, Course], options: argparse.Namespace) -> str:
    """Return the results as JSON."""
    results = {
        "source": stream.source,
        "interactions": len(stream),
        "users": stream.n_users,
        "items": stream.n_items,
        "batch": options.batch,
        "factors": options.factors,
        "seed": options.seed,
        "learners": {name: _summary(course) for name, course in courses.items()},
    }
    return json.dumps(results, indent=2)


def _summary(course: Course) -> dict[str, Any]:
    window = _window(course)
    return {
        "rmse": course.rmse,
        "us_per_interaction": course.microseconds,
        "median_us_by_tenth": course.median_microseconds(course.seconds, 10),
        "optimizer_us_by_tenth": course.median_microseconds(course.optimizer_seconds, 10),
        "rolling_rmse": course.rolling_rmse(window)[::window].tolist(),
    }


def _window(course: Course) -> int:
    return max(len(course.errors) // 20, 1)


COLORS = dict(
    zip(
        ["global mean", *KINDS],
        ["#a9b4c2", "#6b7785", "#0b7a75", "#d1495b", "#edae49", "#30394a"],
        strict=True,
    )
)


def draw(path: Path, stream: Stream, courses: dict[str, Course]) -> None:
    """Draw the error and the time of a step over the stream into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    # Without pyplot: no window, no display and no global state.
    figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"An online recommender, {_described(stream)}", weight="bold")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_errors(left, courses)
    _draw_times(right, stream, courses)
    for axes in (left, right):
        axes.set(xlabel="interactions", xlim=(0, len(stream)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _draw_errors(axes: Any, courses: dict[str, Course]) -> None:
    window = _window(next(iter(courses.values())))
    axes.set_title(f"RMSE of the last {window:,}, test then train", loc="left")
    for name, course in courses.items():
        rmse = course.rolling_rmse(window)
        every = max(len(rmse) // 500, 1)
        seen = np.arange(len(rmse))[::every] + window
        # Exact and dense are the same curve: dots on a line show both.
        style = {"ls": ":", "lw": 2.5} if name.endswith("dense") else {"lw": 2}
        axes.plot(seen, rmse[::every], color=COLORS[name], label=name, **style)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.3 * (top - bottom))  # room for the legend
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")


def _draw_times(axes: Any, stream: Stream, courses: dict[str, Course]) -> None:
    axes.set_title("Time of catch_up and step, µs per interaction", loc="left")
    for name, course in courses.items():
        times = course.median_microseconds(course.optimizer_seconds, 40)
        middles = (np.arange(len(times)) + 0.5) * len(stream) / len(times)
        if any(times):
            axes.plot(middles, times, color=COLORS[name], lw=2)
    axes.set_ylim(bottom=0)


# ---- the command line ---------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; on a mistake, say so and exit."""
    parser = argparse.ArgumentParser(description="An online recommender, tested then trained.")
    add, shown = parser.add_argument, " (default: %(default)s)"
    add("--data-dir", type=Path, help="with MovieLens's files (default: a synthetic stream)")
    add("--interactions", type=_count, help="how many (default: all; of a synthetic stream 300000)")
    add("--batch", type=_count, default=64, help=f"interactions a step learns from{shown}")
    add("--factors", type=_count, default=16, help=f"of each user and each item{shown}")
    add("--seed", type=_seed, default=0, help=f"of everything that is random{shown}")
    add("--no-dense", action="store_true", help="leave out the dense gradients, which take long")
    add("--plot", type=_file, metavar="FILE", help="draw the error and the time of a step")
    add("--json", type=_file, metavar="FILE", help="write the results")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return int(text)


def _file(text: str) -> Path:
    """Refuse now what could not be written after all the work is done."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path


def open_stream(options: argparse.Namespace) -> Stream:
    """Return the stream that the user asked for."""
    if options.data_dir is None:
        return synthetic(options.interactions or 300_000, options.seed)
    return read(options.data_dir)[: options.interactions]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    try:
        stream = open_stream(options)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    courses = compare(
        stream, options.batch, options.factors, options.seed, with_dense=not options.no_dense
    )
    print(*report(stream, courses), sep="\n")
    if options.json is not None:
        options.json.write_text(as_json(stream, courses, options) + "\n", encoding="utf-8")
    if options.plot is not None:
        draw(options.plot, stream, courses)


if __name__ == "__main__":
    main()
