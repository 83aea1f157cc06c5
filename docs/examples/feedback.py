"""Linear models that learn from what their users say, while what they see changes.

Each answer is shown before it is learnt from. Whoever gets a wrong one corrects it, which weighs
more than silent consent to a right one. On the way, the instruments change. Results and
explanations are in feedback.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.ndimage import rotate
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from fusestep.linear import Classifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Array: TypeAlias = npt.NDArray[np.float64]
Labels: TypeAlias = npt.NDArray[np.int64]

BATCH = 10
"""Answers that are shown before the feedback on them comes back."""
CONSENT = 0.5
"""Share of the users who let it be seen that a right answer was of use."""
WINDOWS = 15
"""Equal parts of a stream that are scored by themselves."""
METRICS = ("accuracy", "precision", "recall", "F1")


# ---- the streams --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Samples in the order in which users bring them.

    Attributes
    ----------
    samples
        Of shape [N, features], standardised by what has been seen so far.
    labels
        What the user of each sample knows, of shape [N].
    consents
        Whether its user lets it be seen that a right answer was of use, of shape [N].
    """

    samples: Array
    labels: Labels
    consents: npt.NDArray[np.bool_]

    @property
    def classes(self) -> Labels:
        """All labels there are."""
        return np.unique(self.labels)


def stream_of(samples: Array, labels: Labels, rng: np.random.Generator) -> Stream:
    """Standardise samples, and draw who consents."""
    return Stream(standardized(samples), labels, rng.random(len(labels)) < CONSENT)


def standardized(samples: Array) -> Array:
    """Scale each batch by means and deviations of all samples up to and with it.

    Samples are there before they are answered, so nothing is used that would not be known.
    """
    scaler = StandardScaler()
    batches = [samples[part] for part in parts(len(samples))]
    return np.concatenate([scaler.partial_fit(batch).transform(batch) for batch in batches])


def parts(size: int) -> list[slice]:
    """Return the batches of a stream."""
    return [slice(start, start + BATCH) for start in range(0, size, BATCH)]


def breast_cancer(seed: int) -> Stream:
    """Shuffle the measurements of 569 tumours; change the microscope, then the camera.

    From one third on, a lens magnifies one and a half times as much, and nobody tells the program:
    radii and perimeters are 1.5 times as long, areas 2.25 times as large, as the cells look to it;
    shapes stay. From two thirds on, a camera has 0.6 times the contrast, and so has the texture,
    which is the standard deviation of the grey values. Label 1 is malignant.
    """
    rng = np.random.default_rng(seed)
    data = load_breast_cancer()
    order = rng.permutation(len(data.target))
    samples, labels = data.data[order], 1 - data.target[order].astype(np.int64)
    lens, camera = len(order) // 3, 2 * len(order) // 3
    for word, begin, factor in (
        ("radius", lens, 1.5),
        ("perimeter", lens, 1.5),
        ("area", lens, 1.5**2),
        ("texture", camera, 0.6),
    ):
        columns = [word in name for name in data.feature_names]
        samples[begin:, columns] *= factor
    return stream_of(samples, labels, rng)


def digits(seed: int) -> Stream:
    """Shuffle 1,797 digits of 8 x 8 pixels; the camera turns, bit by bit, in the middle third.

    In the end it has turned by 60 degrees.
    """
    rng = np.random.default_rng(seed)
    data = load_digits()
    order = rng.permutation(len(data.target))
    angles = np.interp(np.arange(len(order)), len(order) * np.array([1, 2]) / 3, [0, 60])
    images = [
        rotate(image, angle, reshape=False, order=1)
        for image, angle in zip(data.images[order], angles, strict=True)
    ]
    return stream_of(np.reshape(images, (len(order), -1)), data.target[order].astype(np.int64), rng)


class Kind(NamedTuple):
    """A kind of stream.

    Attributes
    ----------
    title
        For people.
    new
        From a seed to a stream.
    loss
        Of `Classifier`.
    average
        Of the metrics: of label 1 ("binary"), or the mean over the classes ("macro").
    thirds
        What the thirds of the stream are.
    """

    title: str
    new: Callable[[int], Stream]
    loss: str
    average: str
    thirds: tuple[str, str, str]


KINDS = {
    "breast cancer": Kind(
        "Breast cancer: another lens, then another camera",
        breast_cancer,
        "logistic",
        "binary",
        ("at first", "new lens", "new camera"),
    ),
    "digits": Kind(
        "Digits: the camera turns",
        digits,
        "softmax",
        "macro",
        ("at first", "turning", "turned"),
    ),
}


# ---- those who answer ---------------------------------------------------------------------------


def from_feedback(model: Any, stream: Stream, correction: float) -> Labels:
    """Show answers, and learn from what their users say.

    Parameters
    ----------
    model
        A classifier with ``predict`` and ``partial_fit`` that has not learnt anything.
    stream
        Who consents to right answers is in it; whoever gets a wrong one corrects it.
    correction
        How much a correction weighs. Consent weighs 1, and silence 0.

    Returns
    -------
    ndarray
        The answers, each of which was given before anything was known of its label.
    """
    samples, labels = stream.samples, stream.labels
    answers = np.full_like(labels, stream.classes[0])  # of a model that has not learnt anything
    has_learnt = False
    for now in parts(len(labels)):
        if has_learnt:
            answers[now] = model.predict(samples[now])
        is_wrong = answers[now] != labels[now]
        weights = np.where(is_wrong, correction, stream.consents[now])
        if weights.any():  # scikit-learn refuses samples that all weigh nothing
            model.partial_fit(
                samples[now],
                labels[now],
                classes=None if has_learnt else stream.classes,
                sample_weight=weights,
            )
            has_learnt = True
    return answers


def from_every_label(model: Classifier, stream: Stream, _correction: float) -> Labels:
    """Learn from the label of every sample right after its answer, with the same weight for all.

    Weights that do not depend on answers need but one call.
    """
    answers: Labels = model.partial_fit_predict(
        stream.samples, stream.labels, classes=stream.classes
    )
    return answers


class Contender(NamedTuple):
    """Who answers.

    Attributes
    ----------
    new
        From the loss and the learning rate to a model.
    color, line
        In the plot.
    learn
        From the model, a stream and the weight of corrections to the answers.
    """

    new: Callable[[str, float], Any]
    color: str = ""
    line: str = "-"
    learn: Callable[[Any, Stream, float], Labels] = from_feedback


def new_fusestep(loss: str, rate: float, **options: Any) -> Classifier:
    """Return fusestep's model."""
    return Classifier(loss, learning_rate=rate, **options)


def new_sklearn(_loss: str, rate: float) -> SGDClassifier:
    """Return scikit-learn's model: logistic loss, one against all others if there are several.

    In the order of the stream, with a constant learning rate, which is what drift asks for.
    """
    return SGDClassifier(
        loss="log_loss", penalty=None, learning_rate="constant", eta0=rate, shuffle=False
    )


CONTENDERS = {
    "importance-aware SGD": Contender(partial(new_fusestep, optimizer="sgd"), "#0b7a75"),
    "importance-aware Adagrad": Contender(new_fusestep, "#c98b2b"),
    "plain SGD": Contender(
        partial(new_fusestep, optimizer="sgd", importance_aware=False), "#a9b4c2"
    ),
    "SGDClassifier": Contender(new_sklearn, "#d1495b", "--"),
}
REFERENCE = "every label, at once"
"""What could be had if all users told all they know."""
EVERYBODY = CONTENDERS | {
    REFERENCE: Contender(partial(new_fusestep, optimizer="sgd"), learn=from_every_label)
}


# ---- what comes out -----------------------------------------------------------------------------


class Grid(NamedTuple):
    """What is tried, and on which streams the best learning rate is chosen."""

    rates: Sequence[float]
    weights: Sequence[float]
    tuning_seeds: Sequence[int]


FULL = Grid(
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0),
    weights=(1.0, 5.0, 20.0, 100.0, 1000.0),
    tuning_seeds=(100, 101),
)
QUICK = Grid(rates=(0.003, 0.03, 100.0), weights=(1000.0,), tuning_seeds=(100,))


@dataclass(frozen=True)
class Outcome:
    """How one contender did on one kind of stream.

    Attributes
    ----------
    rate
        The learning rate with the highest accuracy on the streams for tuning.
    by_rate, by_weight
        The answers on the stream of each seed, for each learning rate, and for each weight of
        corrections with the chosen rate.
    """

    rate: float
    by_rate: dict[float, list[Labels]]
    by_weight: dict[float, list[Labels]]

    @property
    def answers(self) -> list[Labels]:
        """The answers with the chosen rate."""
        return self.by_rate[self.rate]


def compete(
    contender: Contender, kind: Kind, streams: list[Stream], grid: Grid, correction: float
) -> Outcome:
    """Choose a learning rate on other streams, then answer on these."""

    def answers(rate: float, weight: float, streams: list[Stream]) -> list[Labels]:
        return [contender.learn(contender.new(kind.loss, rate), one, weight) for one in streams]

    tuning = [kind.new(seed) for seed in grid.tuning_seeds]
    tuned = {
        rate: np.mean(accuracies(tuning, answers(rate, correction, tuning))) for rate in grid.rates
    }
    best = max(tuned, key=lambda rate: tuned[rate])
    by_rate = {rate: answers(rate, correction, streams) for rate in grid.rates}
    by_weight = {
        weight: by_rate[best] if weight == correction else answers(best, weight, streams)
        for weight in sorted({*grid.weights, correction})
    }
    return Outcome(best, by_rate, by_weight)


def accuracies(streams: list[Stream], answers: list[Labels]) -> list[float]:
    """Return the share of right answers on each stream."""
    return [
        float(accuracy_score(stream.labels, given))
        for stream, given in zip(streams, answers, strict=True)
    ]


def scores(labels: Labels, answers: Labels, average: str) -> dict[str, float]:
    """Return accuracy, precision, recall and F1."""
    *others, _ = precision_recall_fscore_support(labels, answers, average=average, zero_division=0)
    values = (accuracy_score(labels, answers), *others)
    return {name: float(value) for name, value in zip(METRICS, values, strict=True)}


def in_parts(
    streams: list[Stream], answers: list[Labels], average: str, count: int
) -> dict[str, Array]:
    """Return each metric on so many equal parts of the streams, of shape [streams, parts]."""
    found = [
        [
            scores(stream.labels[part], given[part], average)
            for part in np.array_split(np.arange(len(given)), count)
        ]
        for stream, given in zip(streams, answers, strict=True)
    ]
    return {
        name: np.array([[part[name] for part in stream] for stream in found]) for name in METRICS
    }


def print_results(
    console: Console, kind: Kind, streams: list[Stream], outcomes: dict[str, Outcome]
) -> None:
    """Print the metrics over whole streams, and F1 on each third."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("learner")
    for heading in ("rate", *METRICS):
        table.add_column(heading, justify="right")
    thirds = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    thirds.add_column("F1 in each third")
    for heading in kind.thirds:
        thirds.add_column(heading, justify="right")
    for name, outcome in outcomes.items():
        whole = in_parts(streams, outcome.answers, kind.average, 1)
        cells = [mean_and_deviation(whole[metric][:, 0]) for metric in METRICS]
        table.add_row(name, f"{outcome.rate:g}", *cells)
        third = in_parts(streams, outcome.answers, kind.average, 3)["F1"]
        thirds.add_row(name, *map(mean_and_deviation, third.T))
    seeds = "one seed" if len(streams) == 1 else f"{len(streams)} seeds"
    console.print(f"\n{kind.title}\n{len(streams[0].labels):,} samples, {seeds}, percent\n")
    console.print(table)
    console.print()
    console.print(thirds)
    theirs = np.array(accuracies(streams, outcomes["SGDClassifier"].answers))
    console.print("\nAccuracy above SGDClassifier's, seed by seed, percentage points:")
    for name in list(CONTENDERS)[:-1]:
        ours = np.array(accuracies(streams, outcomes[name].answers))
        console.print(f"  {name:26}", *(f"{100 * gain:+.1f}" for gain in ours - theirs))


def mean_and_deviation(values: Iterable[float]) -> str:
    """Return mean ± standard deviation in percent; of one value, the value."""
    percent = 100 * np.array(list(values))
    mean = f"{percent.mean():.1f}"
    return mean if len(percent) == 1 else f"{mean} ±{percent.std(ddof=1):.1f}"


def as_json(kind: Kind, streams: list[Stream], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Return the results of one kind of stream as what `json` can write."""

    def all_accuracies(answers: dict[float, list[Labels]]) -> dict[float, list[float]]:
        return {value: accuracies(streams, given) for value, given in answers.items()}

    def metrics(outcome: Outcome, parts: int) -> dict[str, Any]:
        found = in_parts(streams, outcome.answers, kind.average, parts)
        return {name: values.tolist() for name, values in found.items()}

    return {
        name: {
            "rate": outcome.rate,
            "whole": {metric: [v for (v,) in rows] for metric, rows in metrics(outcome, 1).items()},
            "windows": metrics(outcome, WINDOWS),
            "by_rate": all_accuracies(outcome.by_rate),
            "by_weight": all_accuracies(outcome.by_weight),
        }
        for name, outcome in outcomes.items()
    }


def draw(
    path: Path, results: dict[str, tuple[list[Stream], dict[str, Outcome]]], correction: float
) -> None:
    """Draw the accuracy over the streams, and for each rate and weight, into a file."""
    from matplotlib.figure import Figure

    # Without pyplot: no window, no display and no global state.
    figure = Figure(figsize=(13, 7.4), dpi=100, layout="constrained")
    rows = figure.subplots(len(results), 3, width_ratios=(1.4, 1, 1))
    for row, (name, (streams, outcomes)) in zip(rows, results.items(), strict=True):
        windows, rates, weights = row
        draw_windows(windows, KINDS[name], streams, outcomes)
        weights.sharey(rates)
        for contender in CONTENDERS:
            outcome = outcomes[contender]
            draw_range(rates, contender, streams, outcome.by_rate, chosen=outcome.rate)
            draw_range(weights, contender, streams, outcome.by_weight, chosen=correction)
        rates.set_title("Accuracy by learning rate (dots: chosen)", loc="left")
        rates.set_xlabel("learning rate")
        weights.set_title("Accuracy by weight of corrections", loc="left")
        weights.set_xlabel(f"weight, with the learning rate chosen for {correction:g}")
    rows[0][0].legend(loc="lower right", frameon=False, fontsize="small")
    figure.savefig(path)


def draw_windows(
    axes: Any, kind: Kind, streams: list[Stream], outcomes: dict[str, Outcome]
) -> None:
    """Draw the accuracy in windows of the stream."""
    size = len(streams[0].labels)
    middles = (np.arange(WINDOWS) + 0.5) * size / WINDOWS
    for name, (_, color, line, _) in CONTENDERS.items():
        found = in_parts(streams, outcomes[name].answers, kind.average, WINDOWS)["accuracy"]
        axes.plot(middles, found.mean(axis=0), label=name, color=color, ls=line, lw=2)
    for third, what in enumerate(kind.thirds):
        axes.axvline(third * size / 3, color="#30394a", lw=0.8, ls=":")
        axes.text((third + 0.5) / 3, 1, what, transform=axes.transAxes, ha="center", va="top")
    axes.set_title(kind.title, loc="left")
    axes.margins(y=0.08)  # room for what the thirds are
    axes.set(xlabel="samples", xlim=(0, size), ylabel=f"accuracy in {WINDOWS} windows")
    finish(axes)


def draw_range(
    axes: Any,
    name: str,
    streams: list[Stream],
    answers: dict[float, list[Labels]],
    chosen: float,
) -> None:
    """Draw the accuracy against what it may depend on."""
    _, color, line, _ = CONTENDERS[name]
    means = {value: np.mean(accuracies(streams, given)) for value, given in answers.items()}
    axes.plot(list(means), list(means.values()), color=color, ls=line, lw=2)
    axes.plot(chosen, means[chosen], "o", color=color)
    axes.set_xscale("log")
    finish(axes)


def finish(axes: Any) -> None:
    """Set what all panels have in common."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


# ---- the command line ---------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Drift, and feedback that weighs.")
    add = parser.add_argument
    shown = " (default: %(default)s)"
    add("--seeds", type=int, default=5, metavar="N", help=f"how many: 0 to N - 1{shown}")
    add("--correction", type=float, default=5.0, help=f"how much a correction weighs{shown}")
    add("--quick", action="store_true", help="try few learning rates and weights")
    add("--plot", type=Path, metavar="FILE", help="draw the results")
    add("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or not 0 < options.correction < np.inf:
        parser.error("there must be at least 1 seed, and corrections that weigh more than 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all contenders on all streams; print, write and draw what comes out.

    Parameters
    ----------
    arguments
        In place of ``sys.argv[1:]``.

    Returns
    -------
    int
        The exit status.
    """
    options = parse(arguments)
    grid = QUICK if options.quick else FULL
    console = Console(highlight=False)
    results: dict[str, tuple[list[Stream], dict[str, Outcome]]] = {
        name: ([kind.new(seed) for seed in range(options.seeds)], {})
        for name, kind in KINDS.items()
    }
    runs = [(name, contender) for name in KINDS for contender in EVERYBODY]
    # Products of matrices this small gain nothing from a second thread, and lose when it is busy.
    with threadpool_limits(1):
        for name, contender in track(runs, "learning", console=console, transient=True):
            streams, outcomes = results[name]
            outcomes[contender] = compete(
                EVERYBODY[contender], KINDS[name], streams, grid, options.correction
            )
    for name, result in results.items():
        print_results(console, KINDS[name], *result)
    if options.json:
        content = {name: as_json(KINDS[name], *result) for name, result in results.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(options.plot, results, options.correction)
    return 0


if __name__ == "__main__":
    sys.exit(main())
