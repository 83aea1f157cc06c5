"""One network learns one task after another: what it forgets, and what an anchor keeps.

Permuted digits, after Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural
networks", figure 2. Results and explanations are in continual_digits.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits  # comes with scikit-learn

import fusestep as fs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Array: TypeAlias = npt.NDArray[np.float32]
Arrays: TypeAlias = dict[str, Array]
Labels: TypeAlias = npt.NDArray[np.int64]
History: TypeAlias = list[list[float]]
"""After each task, the accuracy on every task so far."""

PIXELS, HIDDEN, CLASSES = 64, 1000, 10
TEST_SIZE, BATCH, LR = 500, 32, 0.2
LEARNERS = ("plain", "L2-SP", "EWC")
COLORS = dict(zip(LEARNERS, ("#a9b4c2", "#c98b2b", "#0b7a75"), strict=True))


# ---- the tasks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Images whose pixels have an order of their own, and which digits they show."""

    images: Array
    labels: Labels
    test_images: Array
    test_labels: Labels


def permuted_digits(rng: np.random.Generator, count: int) -> list[Task]:
    """Split the digits into training and test, and permute the pixels once for each task."""
    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images, labels = (pixels[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    test, train = slice(TEST_SIZE), slice(TEST_SIZE, None)
    tasks = []
    for _ in range(count):
        permuted = images[:, rng.permutation(PIXELS)]
        tasks.append(Task(permuted[train], labels[train], permuted[test], labels[test]))
    return tasks


def batches(size: int, rng: np.random.Generator) -> Iterator[Labels]:
    """Yield the positions of mini-batches, in random order."""
    order = rng.permutation(size)
    for start in range(0, size, BATCH):
        yield order[start : start + BATCH]


# ---- the network: a multi-layer perceptron 64-1000-10 -------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What backpropagation leaves of a layer: one row for each sample.

    The gradient that sample n has of the layer's weights is ``outer(inputs[n], errors[n])``, that
    of its biases ``errors[n]``.
    """

    inputs: Array
    errors: Array


def initial_parameters(rng: np.random.Generator) -> Arrays:
    """Draw weights as He et al. (2015), equation 10, do for ReLU; biases are zero."""
    return {
        "W1": rng.standard_normal((PIXELS, HIDDEN), np.float32) * np.float32((2 / PIXELS) ** 0.5),
        "b1": np.zeros(HIDDEN, np.float32),
        "W2": rng.standard_normal((HIDDEN, CLASSES), np.float32) * np.float32((2 / HIDDEN) ** 0.5),
        "b2": np.zeros(CLASSES, np.float32),
    }


def forward(params: Arrays, images: Array) -> tuple[Array, Array]:
    """Return the hidden layer and the probability of each class."""
    hidden = np.maximum(images @ params["W1"] + params["b1"], 0)
    scores = hidden @ params["W2"] + params["b2"]
    # Shifted so that the largest exponent is 0: exp cannot overflow.
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)


def backpropagate(params: Arrays, images: Array, labels: Labels) -> list[Layer]:
    """Return the layers with the errors of the cross-entropy, sample by sample."""
    hidden, errors = forward(params, images)
    # Of softmax followed by cross-entropy, the derivative is: what was said minus what is true.
    errors[np.arange(len(labels)), labels] -= 1
    hidden_errors = (errors @ params["W2"].T) * (hidden > 0)
    return [Layer(images, hidden_errors), Layer(hidden, errors)]


def mean_gradients(layers: list[Layer]) -> Arrays:
    """Return the gradient of the mean loss of the batch."""
    grads = {}
    for i, layer in enumerate(layers, start=1):
        grads[f"W{i}"] = layer.inputs.T @ layer.errors / np.float32(len(layer.errors))
        grads[f"b{i}"] = layer.errors.mean(axis=0)
    return grads


def sample_gradients(layers: list[Layer]) -> Arrays:
    """Return the gradient of each sample's loss: [N, *shape] for each parameter."""
    grads = {}
    for i, layer in enumerate(layers, start=1):
        grads[f"W{i}"] = layer.inputs[:, :, None] * layer.errors[:, None, :]
        grads[f"b{i}"] = layer.errors
    return grads


def accuracy(params: Arrays, task: Task) -> float:
    """Return the share of the test images that are recognised."""
    _, probabilities = forward(params, task.test_images)
    return float((probabilities.argmax(axis=1) == task.test_labels).mean())


# ---- learning -----------------------------------------------------------------------------------


def fisher_information(params: Arrays, images: Array, rng: np.random.Generator) -> Arrays:
    """Return the diagonal of the Fisher information of the network on some images.

    The expectation over the labels is that under the model, so they are drawn from its own
    predictions; those of the data would give the "empirical" Fisher information.
    """
    fisher = fs.Fisher(params)
    # In batches: the per-sample gradients of all images at once would take 300 MB.
    for batch in batches(len(images), rng):
        labels = drawn(forward(params, images[batch])[1], rng)
        fisher.add(sample_gradients(backpropagate(params, images[batch], labels)))
    importance: Arrays = fisher.importance
    return importance


def drawn(probabilities: Array, rng: np.random.Generator) -> Labels:
    """Draw a label for each row of probabilities."""
    cumulative = probabilities.cumsum(axis=1, dtype=np.float64)
    # The last entry is 1 only up to rounding.
    threshold = rng.random((len(probabilities), 1)) * cumulative[:, -1:]
    labels: Labels = (cumulative > threshold).argmax(axis=1)
    return labels


def learn(
    learner: str, tasks: list[Task], *, seed: int, epochs: int, strengths: dict[str, float]
) -> History:
    """Learn one task after the other.

    Parameters
    ----------
    learner
        One of `LEARNERS`.
    tasks
        In this order.
    seed
        Of the first parameters and of the order of the samples, which are the same for all
        learners.
    epochs
        Passes over the training images of each task.
    strengths
        Of the anchors: λ, by learner.

    Returns
    -------
    list
        After each task, the accuracy on the test images of every task so far.
    """
    streams = np.random.SeedSequence(seed).spawn(3)
    start, order, labels = (np.random.default_rng(stream) for stream in streams)
    params = initial_parameters(start)
    opt = fs.SGD(params, lr=LR)  # one for all tasks: it is the optimizer that has the anchor
    history = []
    for i, task in enumerate(tasks, start=1):
        train(params, opt, task, epochs, order)
        history.append([accuracy(params, known) for known in tasks[:i]])
        if learner == "L2-SP":
            opt.anchor(strengths[learner])
        elif learner == "EWC":
            importance = fisher_information(params, task.images, labels)
            opt.anchor(strengths[learner], importance=importance)
    return history


def train(
    params: Arrays, opt: fs.Optimizer, task: Task, epochs: int, rng: np.random.Generator
) -> None:
    """Learn one task."""
    for _ in range(epochs):
        for batch in batches(len(task.images), rng):
            layers = backpropagate(params, task.images[batch], task.labels[batch])
            opt.step(mean_gradients(layers))


# ---- what comes out -----------------------------------------------------------------------------


def earlier_and_last(histories: list[History]) -> tuple[float, float]:
    """Return the mean final accuracy on all tasks but the last one, and on the last one."""
    final = np.mean([history[-1] for history in histories], axis=0)
    return float(final[:-1].mean()), float(final[-1])


def print_results(console: Console, results: dict[str, list[History]]) -> None:
    """Print the accuracy after each task, and what is left in the end."""
    seeds, tasks = len(results["plain"]), len(results["plain"][0])
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("learner")
    for heading in ("after", *(f"task {i}" for i in range(1, tasks + 1)), "mean"):
        table.add_column(heading, justify="right")
    for learner, histories in results.items():
        for i in range(tasks):
            mean = np.mean([history[i] for history in histories], axis=0)
            cells = [f"{value:.1%}" for value in mean] + [""] * (tasks - 1 - i)
            name = learner if i == 0 else ""
            table.add_row(name, f"task {i + 1}", *cells, f"{mean.mean():.1%}")
        table.add_section()
    of_seeds = "one seed" if seeds == 1 else f"mean of {seeds} seeds"
    console.print(f"\nAccuracy on test images, {of_seeds}")
    console.print(table)
    console.print(f"\nAfter task {tasks}:")
    for learner, histories in results.items():
        earlier, last = earlier_and_last(histories)
        console.print(f"  {learner:6} earlier tasks {earlier:.1%}, last task {last:.1%}")


def draw(path: Path, results: dict[str, list[History]]) -> None:
    """Draw the results into a file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # Without pyplot: no window, no display and no global state.
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    tasks = len(results["plain"][0])
    for i, (learner, histories) in enumerate(results.items()):
        color, offset = COLORS[learner], 0.27 * (i - 1)
        means = np.array([[np.mean(stage) for stage in history] for history in histories])
        numbers = np.arange(1, tasks + 1)
        left.plot(numbers, means.mean(axis=0), color=color, lw=2, marker="o", label=learner)
        left.fill_between(numbers, means.min(axis=0), means.max(axis=0), color=color, alpha=0.2)
        final = np.mean([history[-1] for history in histories], axis=0)
        right.bar(numbers + offset, final, width=0.25, color=color, label=learner)
    left.set_title("Mean accuracy on the tasks so far (band: all seeds)", loc="left")
    left.set_xlabel("tasks learned")
    left.legend(loc="lower left", frameon=False)
    right.set_title(f"Accuracy on each task after task {tasks}", loc="left")
    right.set_xlabel("task")
    for axes in (left, right):
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Permuted digits, with and without anchors.")
    add = parser.add_argument
    shown = " (default: %(default)s)"
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help=f"one run each{shown}")
    add("--tasks", type=int, default=5, help=f"at least 2{shown}")
    add("--epochs", type=int, default=40, help=f"on each task{shown}")
    add("--l2sp", type=float, default=1e-4, help=f"strength of the anchor of L2-SP{shown}")
    add("--ewc", type=float, default=100.0, help=f"strength of the anchor of EWC{shown}")
    add("--plot", type=Path, metavar="FILE", help="draw the results")
    add("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    if options.tasks < 2 or options.epochs < 1:
        parser.error("there must be at least 2 tasks and 1 epoch")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all learners on all seeds; print, write and draw what comes out.

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
    strengths = {"L2-SP": options.l2sp, "EWC": options.ewc}
    results: dict[str, list[History]] = {learner: [] for learner in LEARNERS}
    console = Console(highlight=False)
    # Products of matrices this small gain nothing from a second thread, and lose when it is busy.
    with threadpool_limits(1):
        for seed in track(options.seeds, "learning", console=console, transient=True):
            tasks = permuted_digits(np.random.default_rng(seed), options.tasks)
            for learner, histories in results.items():
                histories.append(
                    learn(learner, tasks, seed=seed, epochs=options.epochs, strengths=strengths)
                )
    print_results(console, results)
    if options.json:
        content = {"seeds": options.seeds, "strengths": strengths, "accuracy": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(options.plot, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
