"""The torch classes in the hands of those who use torch.optim: transformers, Lightning, accelerate.

Each client trains one small model twice, from the same seed: with fusestep's class and with the
class of the same name in torch.optim. Loss curves and parameters must agree.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

torch = pytest.importorskip("torch")
nn = torch.nn

pytestmark = [
    # Lightning uses a function of torch's that torch has deprecated.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]

# Some dozen float32 steps in which both round, in another order: differences of some 1e-7 that
# training makes larger.
LOSS = {"rtol": 0, "atol": 1e-5}
WEIGHTS = {"rtol": 0, "atol": 5e-5}

# The gradient of a bias of attention's keys is nothing but rounding errors, and where eps is as
# small as they are, Adam makes whole steps of them.
EPS = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "NAG": {"lr": 0.05, "momentum": 0.9},
    "Adam": {"lr": 0.01, "eps": EPS},
    "AdamW": {"lr": 0.01, "eps": EPS, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "eps": EPS},
    "Adagrad": {"lr": 0.05},
}
SOME = ["SGD", "AdamW"]
NARROW = {f"{name} in 8 bits": OPTIONS[name] | {"state_dtype": "int8"} for name in SOME}
RESUMED = OPTIONS | NARROW


def fused(name: str) -> tuple[type, dict[str, Any]]:
    import fusestep.torch

    return getattr(fusestep.torch, name.split()[0]), RESUMED[name]


def plain(name: str) -> tuple[type, dict[str, Any]]:
    options = OPTIONS[name] | ({"nesterov": True} if name == "NAG" else {})
    return getattr(torch.optim, name.replace("NAG", "SGD")), options | {"foreach": False}


def assert_same(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    """Compare loss curves and parameters of two trainings."""
    (our_losses, our_weights), (their_losses, their_weights) = ours, theirs
    half = len(their_losses) // 2
    assert np.mean(their_losses[half:]) < np.mean(their_losses[:half])  # it does learn
    np.testing.assert_allclose(our_losses, their_losses, **LOSS)
    for name, weights in their_weights.items():
        np.testing.assert_allclose(our_weights[name], weights, **WEIGHTS, err_msg=name)


def weights_of(model: Any) -> dict[str, Any]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def warmup_and_decay(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, 1.0) * 0.98**step
    )


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tell the clients, before they are imported, to ask and to report nobody."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            environment.setenv(name, "1")
        environment.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        yield


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make a connection an error, and `tmp_path` the place of files that have no path."""

    def refuse(*address: Any) -> None:
        raise AssertionError(f"a test without a network connects to {address[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- transformers --------------------------------------------------------------------------------

BERT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "num_labels": 2,
}
TRAINER_STEPS = 30


class Sentences(torch.utils.data.Dataset):
    """Random tokens; the label says whether the first is among the lowest quarter."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(60, (96, 10), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[i], "labels": (self.tokens[i, 0] < 15).long()}


def make_trainer(
    folder: Path, give: Callable[..., Any], cls: type, options: Any, **more: Any
) -> Any:
    """Return a Trainer of a small BERT; `give` says how it comes by its optimizer."""
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
    defaults = {
        "learning_rate": options["lr"],
        "logging_steps": 1,
        "max_steps": TRAINER_STEPS,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "use_cpu": True,
        "warmup_steps": 5,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder), report_to="none", disable_tqdm=True, **(defaults | more)
        ),
        train_dataset=Sentences(),
        **give(model, cls, options),
    )


def result_of(trainer: Any) -> tuple[list[float], dict[str, Any]]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, weights_of(trainer.model)


def as_optimizer(model: Any, cls: type, options: dict[str, Any]) -> dict[str, Any]:
    return {"optimizers": (cls(model.parameters(), **options), None)}


def with_scheduler(model: Any, cls: type, options: dict[str, Any]) -> dict[str, Any]:
    optimizer = cls(model.parameters(), **options)
    return {"optimizers": (optimizer, warmup_and_decay(optimizer))}


def as_class(model: Any, cls: type, options: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (cls, options)}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("give", [as_optimizer, with_scheduler, as_class])
def test_transformers(tmp_path: Path, name: str, give: Callable[..., Any]) -> None:
    results = []
    for cls, options in (fused(name), plain(name)):
        trainer = make_trainer(tmp_path, give, cls, options)
        trainer.train()
        results.append(result_of(trainer))
    assert_same(*results)


def test_transformers_with_clipping_in_the_step(tmp_path: Path) -> None:
    cls, options = fused("AdamW")
    trainer = make_trainer(
        tmp_path, as_optimizer, cls, {**options, "max_norm": 0.2}, max_grad_norm=0.0
    )
    trainer.train()
    other = make_trainer(tmp_path, as_optimizer, *plain("AdamW"), max_grad_norm=0.2)
    other.train()
    assert_same(result_of(trainer), result_of(other))


@pytest.mark.parametrize("name", RESUMED)
def test_transformers_resumes_from_a_checkpoint(tmp_path: Path, name: str) -> None:
    half = TRAINER_STEPS // 2
    cls, options = fused(name)
    trainer = make_trainer(tmp_path, as_class, cls, options, save_strategy="steps", save_steps=half)
    trainer.train()
    resumed = make_trainer(tmp_path, as_class, cls, options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{half}"))
    for name, weights in weights_of(trainer.model).items():
        np.testing.assert_array_equal(weights_of(resumed.model)[name], weights, err_msg=name)


# ---- Lightning -----------------------------------------------------------------------------------

LIGHTNING_EPOCHS = 4


def samples() -> Any:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(80, 6, generator=generator)
    return torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())


def network() -> Any:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))


def make_module(cls: type, options: dict[str, Any]) -> Any:
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = nn.functional.mse_loss(self.network(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = cls(self.parameters(), **options)
            scheduler = {"scheduler": warmup_and_decay(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return Module()


def make_lightning_trainer(**options: Any) -> Any:
    import lightning.pytorch as lightning

    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        **{"max_epochs": LIGHTNING_EPOCHS, "gradient_clip_val": 0.1, **options},
    )


def fit(module: Any, trainer: Any, **options: Any) -> tuple[list[float], dict[str, Any]]:
    loader = torch.utils.data.DataLoader(samples(), batch_size=8)
    trainer.fit(module, loader, **options)
    return module.losses, weights_of(module)


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch")


@pytest.mark.usefixtures("lightning")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(name: str, accumulate: int) -> None:
    trainings = [
        fit(make_module(*of), make_lightning_trainer(accumulate_grad_batches=accumulate))
        for of in (fused(name), plain(name))
    ]
    assert_same(*trainings)


@pytest.mark.usefixtures("lightning")
def test_lightning_with_clipping_in_the_step() -> None:
    cls, options = fused("Adam")
    ours = make_module(cls, {**options, "max_norm": 0.1})
    trainer = make_lightning_trainer(gradient_clip_val=None)
    assert_same(fit(ours, trainer), fit(make_module(*plain("Adam")), make_lightning_trainer()))


@pytest.mark.usefixtures("lightning")
@pytest.mark.parametrize("name", RESUMED)
def test_lightning_resumes_from_a_checkpoint(tmp_path: Path, name: str) -> None:
    _, expected = fit(make_module(*fused(name)), make_lightning_trainer())
    checkpoint = tmp_path / "half.ckpt"
    trainer = make_lightning_trainer(max_epochs=LIGHTNING_EPOCHS // 2)
    fit(make_module(*fused(name)), trainer)
    trainer.save_checkpoint(checkpoint)
    _, weights = fit(make_module(*fused(name)), make_lightning_trainer(), ckpt_path=str(checkpoint))
    for key, value in expected.items():
        np.testing.assert_array_equal(weights[key], value, err_msg=key)


# ---- accelerate ----------------------------------------------------------------------------------

EPOCHS = 4


class Loop:
    """A training loop as accelerate's documentation writes it."""

    def __init__(self, cls: type, options: dict[str, Any]) -> None:
        from accelerate import Accelerator

        self.losses: list[float] = []
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        optimizer = cls(model.parameters(), **options)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model,
            optimizer,
            warmup_and_decay(optimizer),
            torch.utils.data.DataLoader(samples(), batch_size=4),
        )

    def run(self, epochs: int, max_norm: float | None = 0.5) -> Loop:
        for x, y in [batch for _ in range(epochs) for batch in self.loader]:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(x), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and max_norm is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self

    @property
    def result(self) -> tuple[list[float], dict[str, Any]]:
        return self.losses, weights_of(self.model)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize("name", OPTIONS)
def test_accelerate(name: str) -> None:
    assert_same(Loop(*fused(name)).run(EPOCHS).result, Loop(*plain(name)).run(EPOCHS).result)


@pytest.mark.usefixtures("accelerate")
def test_accelerate_with_clipping_in_the_step() -> None:
    cls, options = fused("Adam")
    ours = Loop(cls, {**options, "max_norm": 0.5}).run(EPOCHS, max_norm=None)
    assert_same(ours.result, Loop(*plain("Adam")).run(EPOCHS).result)


@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize("name", RESUMED)
def test_accelerate_saves_and_loads(tmp_path: Path, name: str) -> None:
    expected = Loop(*fused(name)).run(EPOCHS).result[1]
    Loop(*fused(name)).run(EPOCHS // 2).accelerator.save_state(str(tmp_path / "half"))
    resumed = Loop(*fused(name))
    resumed.accelerator.load_state(str(tmp_path / "half"))
    for key, value in resumed.run(EPOCHS - EPOCHS // 2).result[1].items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
