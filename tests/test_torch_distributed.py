"""The torch classes under torch.distributed: processes joined by gloo on the loopback device.

Most tests train one small network, in float64, twice: by fusestep on two ranks, and by torch.optim
in one process on the whole batch. The two must agree. Functions whose first argument is `rank` run
on every rank; the rest runs in the test's own process.
"""

from __future__ import annotations

import os
import time
import traceback
import warnings
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch is built without torch.distributed or gloo", allow_module_level=True)
nn = torch.nn
dcp = pytest.importorskip("torch.distributed.checkpoint")
dcp_state = pytest.importorskip("torch.distributed.checkpoint.state_dict")
dtensor = pytest.importorskip("torch.distributed.tensor")
fsdp = pytest.importorskip("torch.distributed.fsdp")

WORLD = 2
STEPS = 20
PATIENCE = 60.0  # seconds until a test that hangs is a test that fails

# float64 on both sides; only the order differs in which sums over the batch are taken. And torch
# keeps NAdam's product of momenta in float32.
EXACT, EXACT_NADAM = 1e-10, 1e-8

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "NAG": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.05},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "NAdam": {"lr": 0.05},
    "Adagrad": {"lr": 0.1},
}
SOME = ["SGD", "Adam", "AdamW"]
MAX_NORM = 0.02  # below the norm of every gradient here: see `train_alone`


# ---- processes -----------------------------------------------------------------------------------


class Ranks:
    """The processes of one gloo group, started when first needed, that run functions together."""

    def __init__(self, folder: Path, world: int) -> None:
        self._folder = folder
        self._world = world
        self._starts = 0
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what `function(rank, *args)` returned on each rank.

        The test fails if a rank raises, dies, or takes too long. The processes are then ended:
        one that waits for the other would wait for ever.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + PATIENCE
        while len(answers) < self._world:
            waiting = {p: r for r, p in enumerate(self._pipes) if r not in answers}
            ready = connection.wait(list(waiting), deadline - time.monotonic())
            if not ready:
                self._fail(f"no answer of rank {[*waiting.values()]} in {PATIENCE} s")
            for pipe in ready:
                answers[waiting[pipe]] = self._receive(waiting[pipe], pipe)
        return [answers[rank] for rank in range(self._world)]

    def _start(self) -> None:
        self._starts += 1
        rendezvous = str(self._folder / f"rendezvous{self._starts}")
        context = get_context("spawn")
        for rank in range(self._world):
            here, there = context.Pipe()
            args = (rank, self._world, there, rendezvous)
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def _receive(self, rank: int, pipe: Any) -> Any:
        try:
            good, answer = pipe.recv()
        except EOFError:
            good, answer = False, "the process has died"
        if not good:
            self._fail(f"rank {rank}: {answer}")
        return answer

    def _fail(self, message: str) -> None:
        self.stop()
        pytest.fail(message, pytrace=False)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def serve(rank: int, world: int, pipe: Any, rendezvous: str) -> None:
    """Join the group, then run whatever comes through the pipe, until it is closed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as pytest does in its own process
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch's ZeRO
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    store = dist.FileStore(rendezvous, world)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    with suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                answer = (True, function(rank, *args))
            except Exception:
                answer = (False, traceback.format_exc())
            pipe.send(answer)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(tmp_path_factory.mktemp("ranks"), WORLD)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """For what has two dimensions."""
    processes = Ranks(tmp_path_factory.mktemp("four_ranks"), 4)
    yield processes
    processes.stop()


# ---- one problem, one loop -----------------------------------------------------------------------


def fused(name: str, params: Iterable[Any], **more: Any) -> Any:
    import fusestep.torch

    return getattr(fusestep.torch, name)(params, **OPTIONS[name], **more)


def plain(name: str, params: Iterable[Any]) -> Any:
    options = OPTIONS[name] | ({"nesterov": True} if name == "NAG" else {})
    return getattr(torch.optim, name.replace("NAG", "SGD"))(params, foreach=False, **options)


def network(wide: int = 3) -> Any:
    """Return a network whose shapes do not divide by two; of the last bias one rank has nothing."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, wide), nn.Tanh(), nn.Linear(wide, 1)).double()


def batches(steps: range = range(STEPS)) -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(STEPS, 8, 4, generator=generator, dtype=torch.float64)
    targets = inputs.sum(2, keepdim=True).sin() + 2
    return [(inputs[i], targets[i]) for i in steps]


def backward(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x).to(y.dtype), y).backward()


def train(
    model: Any, optimizer: Any, part: slice = slice(None), steps: range = range(STEPS)
) -> Any:
    """Train on `part` of each batch."""
    for x, y in batches(steps):
        backward(model, optimizer, x[part], y[part])
        optimizer.step()
    return values(model)


def of(rank: int) -> slice:
    """Return the part of a batch that is this rank's."""
    return slice(rank, None, WORLD)


def train_alone(
    name: str, max_norm: float | None = None, leave_out: int | None = None, wide: int = 3
) -> Any:
    """Train with torch.optim in one process."""
    model = network(wide)
    optimizer = plain(name, model.parameters())
    for i, (x, y) in enumerate(batches()):
        if i == leave_out:
            continue
        backward(model, optimizer, x, y)
        if max_norm is not None:
            assert nn.utils.clip_grad_norm_(model.parameters(), max_norm) > max_norm
        optimizer.step()
    return values(model)


def whole(tensor: Any) -> Any:
    """Return a tensor without its distribution; all ranks must call it."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, dtensor.DTensor) else tensor
    return tensor.numpy().copy()


def values(model: Any) -> dict[str, Any]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, dtensor.DTensor) else tensor


def assert_same(actual: dict[str, Any], expected: dict[str, Any], atol: float = EXACT) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=atol, err_msg=key)


def exactness(name: str) -> float:
    return EXACT_NADAM if name == "NAdam" else EXACT


# ---- DistributedDataParallel ---------------------------------------------------------------------


def train_ddp(rank: int, name: str, bucket_views: bool, max_norm: float | None) -> Any:
    model = nn.parallel.DistributedDataParallel(network(), gradient_as_bucket_view=bucket_views)
    return train(model, fused(name, model.parameters(), max_norm=max_norm), of(rank))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("bucket_views", [False, True])
@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_ddp(ranks: Ranks, name: str, bucket_views: bool, max_norm: float | None) -> None:
    expected = train_alone(name, max_norm)
    for trained in ranks.run(train_ddp, name, bucket_views, max_norm):
        assert_same(trained, expected)


def train_fused_layers(rank: int) -> Any:
    import fusestep.torch

    model = nn.parallel.DistributedDataParallel(fusestep.torch.fuse_linear(network()))
    with pytest.raises(TypeError, match="exchange gradients"):
        fusestep.torch.fuse_linear(model)
    return train(model, fused("Adam", model.parameters()), of(rank))


def test_fused_layers_are_ordinary_ones(ranks: Ranks) -> None:
    for trained in ranks.run(train_fused_layers):
        assert_same(trained, train_alone("Adam"))


# ---- fully_shard: what a step does ---------------------------------------------------------------


def sharded(model: Any, mesh: Any = None, **options: Any) -> Any:
    mesh = mesh or dist.init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fsdp.fully_shard(layer, mesh=mesh, **options)
    return fsdp.fully_shard(model, mesh=mesh, **options)


def train_fsdp(rank: int, name: str, max_norm: float | None) -> Any:
    model = sharded(network())
    sizes = [local(p).numel() for p in model.parameters()]
    return sizes, train(model, fused(name, model.parameters(), max_norm=max_norm), of(rank))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_fully_shard(ranks: Ranks, name: str, max_norm: float | None) -> None:
    (sizes0, trained0), (sizes1, trained1) = ranks.run(train_fsdp, name, max_norm)
    assert sizes0 == [8, 2, 3, 1]  # the shards are uneven, and some are empty
    assert sizes1 == [4, 1, 0, 0]
    expected = train_alone(name, max_norm)
    assert_same(trained0, expected, exactness(name))
    assert_same(trained1, expected, exactness(name))


def train_hybrid(rank: int, shape: tuple[int, int]) -> Any:
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    model = sharded(network(), mesh)
    return train(model, fused("AdamW", model.parameters(), max_norm=MAX_NORM), of(rank))


@pytest.mark.parametrize("shape", [(WORLD, 1), (1, WORLD)], ids=["replicas", "shards"])
def test_the_norm_counts_replicas_once(ranks: Ranks, shape: tuple[int, int]) -> None:
    expected = train_alone("AdamW", MAX_NORM)
    for trained in ranks.run(train_hybrid, shape):
        assert_same(trained, expected)


def train_single_numbers(rank: int, max_norm: float | None) -> Any:
    """Train a model of which rank 1 holds nothing at all; return it and torch's."""
    results = []
    for is_ours in (True, False):
        torch.manual_seed(3)
        model = sharded(nn.Sequential(nn.Linear(1, 1)).double())
        params = list(model.parameters())
        optimizer = fused("Adam", params, max_norm=max_norm) if is_ours else plain("Adam", params)
        for x, y in batches():
            backward(model, optimizer, x[of(rank), :1], y[of(rank)])
            if max_norm is not None and not is_ours:
                nn.utils.clip_grad_norm_(params, max_norm)
            optimizer.step()
        results.append(values(model))
    return results


@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_a_rank_may_have_nothing(ranks: Ranks, max_norm: float | None) -> None:
    for ours, theirs in ranks.run(train_single_numbers, max_norm):
        assert_same(ours, theirs)


def step_alone(rank: int) -> Any:
    model = sharded(network())
    optimizer = fused("Adam", model.parameters())
    before = [local(p).detach().clone() for p in model.parameters()]
    if rank == 0:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return [bool((local(p) != b).all()) for p, b in zip(model.parameters(), before, strict=True)]


def test_a_step_that_needs_no_norm_waits_for_nobody(ranks: Ranks) -> None:
    moved, _ = ranks.run(step_alone)
    assert moved == [True] * 4


# ---- fully_shard: gradients that are not finite --------------------------------------------------

BROKEN = 7  # the step in which they are not


def train_with_one_broken_shard(
    rank: int, culprit: int, parameter: int, value: float, max_norm: float | None
) -> Any:
    model = sharded(network())
    params = list(model.parameters())
    optimizer = fused("Adam", params, skip_nonfinite=True, max_norm=max_norm)
    for i, (x, y) in enumerate(batches()):
        backward(model, optimizer, x[of(rank)], y[of(rank)])
        before = [local(p).detach().clone() for p in params]
        if i == BROKEN and rank == culprit:
            local(params[parameter].grad).view(-1)[0] = value
        optimizer.step()
        if i == BROKEN:
            still = all(torch.equal(local(p), b) for p, b in zip(params, before, strict=True))
    return still, optimizer.skipped_steps, values(model)


@pytest.mark.parametrize(("culprit", "parameter"), [(0, 0), (0, 3), (1, 0), (1, 1)])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_no_rank_moves_if_one_may_not(
    ranks: Ranks, culprit: int, parameter: int, value: float, max_norm: float | None
) -> None:
    expected = train_alone("Adam", max_norm, leave_out=BROKEN)
    answers = ranks.run(train_with_one_broken_shard, culprit, parameter, value, max_norm)
    for still, skipped, trained in answers:
        assert still
        assert skipped == 1
        assert_same(trained, expected)


def step_with_one_broken_replica(rank: int, culprit: int) -> Any:
    mesh = dist.init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    model = sharded(network(), mesh)
    optimizer = fused("Adam", model.parameters(), skip_nonfinite=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if rank == culprit:
        local(model[0].weight.grad)[0, 0] = float("inf")
    optimizer.step()
    return optimizer.skipped_steps


@pytest.mark.parametrize("culprit", range(WORLD))
def test_no_replica_moves_if_one_may_not(ranks: Ranks, culprit: int) -> None:
    assert ranks.run(step_with_one_broken_replica, culprit) == [1, 1]


# ---- fully_shard: mixed precision ----------------------------------------------------------------


def train_mixed(rank: int, name: str) -> Any:
    """Compute in bfloat16, reduce and step in float32; by fusestep and by torch.optim."""
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for optimizer_of in (fused, plain):
        model = sharded(network().float(), mp_policy=policy)
        results.append(train(model, optimizer_of(name, model.parameters()), of(rank)))
    return results


@pytest.mark.parametrize("name", SOME)
def test_mixed_precision(ranks: Ranks, name: str) -> None:
    # A difference in the last place of a float32 parameter may become one in the last place of its
    # bfloat16 copy (2^-8), and so change gradients in the third digit. Parameters move by about 1.
    for ours, theirs in ranks.run(train_mixed, name):
        assert_same(ours, theirs, atol=1e-2)


# ---- fully_shard and tensor parallelism: shards of shards ----------------------------------------


def sharded_twice() -> tuple[Any, slice]:
    """Return a network with shards on a mesh of 2 x 2, and this rank's part of a batch."""
    from torch.distributed.tensor import parallel

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    model = sharded(parallel.parallelize_module(network(4), mesh["tensor"], plan), mesh["data"])
    return model, slice(mesh["data"].get_local_rank(), None, 2)


def train_sharded_twice(rank: int) -> Any:
    model, part = sharded_twice()
    return train(model, fused("AdamW", model.parameters(), max_norm=MAX_NORM), part)


def test_shards_of_shards(four_ranks: Ranks) -> None:
    expected = train_alone("AdamW", MAX_NORM, wide=4)
    for trained in four_ranks.run(train_sharded_twice):
        assert_same(trained, expected)


def step_with_one_broken_shard_of_a_shard(rank: int, culprit: int) -> Any:
    model, _ = sharded_twice()
    optimizer = fused("Adam", model.parameters(), skip_nonfinite=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if rank == culprit:
        local(model[0].weight.grad)[0, 0] = float("nan")
    optimizer.step()
    return optimizer.skipped_steps


@pytest.mark.parametrize("culprit", range(4))
def test_no_shard_of_a_shard_moves_if_one_may_not(four_ranks: Ranks, culprit: int) -> None:
    assert four_ranks.run(step_with_one_broken_shard_of_a_shard, culprit) == [1, 1, 1, 1]


# ---- fully_shard: checkpoints --------------------------------------------------------------------

FIRST, SECOND = range(STEPS // 2), range(STEPS // 2, STEPS)


def continue_elsewhere(rank: int, name: str, folder: str | None, flat: bool) -> Any:
    """Train half the way, carry everything over to a new model and optimizer, train the rest."""
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = sharded(network())
    optimizer = fused(name, model.parameters(), max_norm=MAX_NORM)
    train(model, optimizer, of(rank), FIRST)
    saved = dcp_state.get_state_dict(model, optimizer, options=options)
    if folder is not None:
        dcp.save({"model": saved[0], "optimizer": saved[1]}, checkpoint_id=folder)

    model = sharded(network())
    optimizer = fused(name, model.parameters(), max_norm=MAX_NORM)
    if folder is not None:
        saved = dcp_state.get_state_dict(model, optimizer, options=options)
        dcp.load({"model": saved[0], "optimizer": saved[1]}, checkpoint_id=folder)
    dcp_state.set_state_dict(
        model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options
    )
    return train(model, optimizer, of(rank), SECOND)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("files", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_checkpoint(ranks: Ranks, tmp_path: Path, name: str, files: bool, flat: bool) -> None:
    expected = train_alone(name, MAX_NORM)
    folder = str(tmp_path / "checkpoint") if files else None
    for trained in ranks.run(continue_elsewhere, name, folder, flat):
        assert_same(trained, expected, exactness(name))


def leave_the_group(rank: int, name: str) -> Any:
    """Train half the way on two ranks with fusestep, the rest with torch.optim in one process."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = sharded(network())
    optimizer = fused(name, model.parameters())
    train(model, optimizer, of(rank), FIRST)
    weights, state = dcp_state.get_state_dict(model, optimizer, options=options)
    if rank != 0:
        return None
    model = network()
    optimizer = plain(name, model.parameters())
    model.load_state_dict(weights)
    dcp_state.set_optimizer_state_dict(model, optimizer, state)
    return train(model, optimizer, steps=SECOND)


def enter_the_group(rank: int, name: str) -> Any:
    """Train half the way with torch.optim in one process, the rest on two ranks with fusestep."""
    model = network()
    optimizer = plain(name, model.parameters())
    train(model, optimizer, steps=FIRST)
    weights, state = dcp_state.get_state_dict(model, optimizer)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model = sharded(network())
    optimizer = fused(name, model.parameters())
    only_mine = (weights, state) if rank == 0 else ({}, {})
    dcp_state.set_model_state_dict(model, only_mine[0], options=options)
    dcp_state.set_optimizer_state_dict(model, optimizer, only_mine[1], options=options)
    return train(model, optimizer, of(rank), SECOND)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("move", [leave_the_group, enter_the_group])
def test_checkpoints_are_torch_s(ranks: Ranks, name: str, move: Callable[..., Any]) -> None:
    expected = train_alone(name)
    for trained in ranks.run(move, name):
        if trained is not None:
            assert_same(trained, expected, exactness(name))


def continue_in_float64(rank: int) -> Any:
    """Train float32 parameters with float64 state: without a break, and over a checkpoint."""
    x, y = (tensor[of(rank)].float() for tensor in batches()[0])

    def begin() -> tuple[Any, Any]:
        model = sharded(network().float())
        return model, fused("Adam", model.parameters(), state_dtype=torch.float64)

    def go_on(model: Any, optimizer: Any) -> Any:
        for _ in range(STEPS // 2):
            backward(model, optimizer, x, y)
            optimizer.step()
        return values(model)

    model, optimizer = begin()
    go_on(model, optimizer)
    weights, state = deepcopy(dcp_state.get_state_dict(model, optimizer))
    expected = go_on(model, optimizer)
    model, optimizer = begin()
    dcp_state.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    dtypes = {entry["exp_avg"].dtype for entry in optimizer.state.values()}
    return dtypes == {torch.float64}, go_on(model, optimizer), expected


def test_a_checkpoint_keeps_the_dtype_of_the_state(ranks: Ranks) -> None:
    for is_float64, trained, expected in ranks.run(continue_in_float64):
        assert is_float64
        assert_same(trained, expected, atol=0)


def ask_before_the_first_step(rank: int, name: str) -> Any:
    """Ask for the state, for which torch takes a step of no length; then train."""
    results = []
    for optimizer_of in (fused, plain):
        model = sharded(network())
        optimizer = optimizer_of(name, model.parameters())
        before = values(model)
        dcp_state.get_optimizer_state_dict(model, optimizer)
        assert_same(values(model), before, atol=0)
        results.append(train(model, optimizer, of(rank)))
    return results


@pytest.mark.parametrize("name", OPTIONS)
def test_state_of_an_optimizer_that_has_not_stepped(ranks: Ranks, name: str) -> None:
    for ours, theirs in ranks.run(ask_before_the_first_step, name):
        assert_same(ours, theirs, exactness(name))


# ---- ZeroRedundancyOptimizer ---------------------------------------------------------------------


def zero(name: str, params: Iterable[Any], bucket_views: bool = False, **extra: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    import fusestep.torch

    return ZeroRedundancyOptimizer(
        params,
        optimizer_class=getattr(fusestep.torch, name),
        parameters_as_bucket_view=bucket_views,
        **OPTIONS[name] | extra,
    )


def train_zero(rank: int, name: str, bucket_views: bool) -> Any:
    """Train with ZeRO; half-way, gather the state on rank 0 and go on with torch.optim there."""
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = zero(name, model.parameters(), bucket_views)
    train(model, optimizer, of(rank), FIRST)
    optimizer.consolidate_state_dict(to=0)
    alone = None
    if rank == 0:
        copy = network()
        copy.load_state_dict(model.module.state_dict())
        theirs = plain(name, copy.parameters())
        theirs.load_state_dict(deepcopy(optimizer.state_dict()))  # which shares its tensors
        alone = train(copy, theirs, steps=SECOND)
    return alone, train(model, optimizer, of(rank), SECOND)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("bucket_views", [False, True])
def test_zero_redundancy(ranks: Ranks, name: str, bucket_views: bool) -> None:
    (alone, trained0), (_, trained1) = ranks.run(train_zero, name, bucket_views)
    expected = train_alone(name)
    assert_same(trained0, expected)
    assert_same(trained1, expected)
    assert_same(alone, expected)


def train_zero_from_consolidated(rank: int, name: str) -> Any:
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = zero(name, model.parameters())
    train(model, optimizer, of(rank), FIRST)
    state: Any = None
    for to in range(WORLD):
        optimizer.consolidate_state_dict(to=to)
        if rank == to:
            state = optimizer.state_dict()
    optimizer = zero(name, model.parameters())
    optimizer.load_state_dict(state)
    return train(model, optimizer, of(rank), SECOND)


@pytest.mark.parametrize("name", SOME)
def test_zero_redundancy_goes_on_from_a_checkpoint(ranks: Ranks, name: str) -> None:
    expected = train_alone(name)
    for trained in ranks.run(train_zero_from_consolidated, name):
        assert_same(trained, expected)


def train_zero_in_8_bits(rank: int, name: str) -> Any:
    """Train with ZeRO and state in 8 bits: without a break, and over a checkpoint."""
    results = []
    for is_broken in (False, True):
        model = nn.parallel.DistributedDataParallel(network())
        optimizer = zero(name, model.parameters(), state_dtype="int8")
        train(model, optimizer, of(rank), FIRST)
        if is_broken:
            states = []
            for to in range(WORLD):
                optimizer.consolidate_state_dict(to=to)
                states.append(optimizer.state_dict() if rank == to else None)
            optimizer = zero(name, model.parameters(), state_dtype="int8")
            optimizer.load_state_dict(states[rank])
        results.append(train(model, optimizer, of(rank), SECOND))
        dtypes = {e["exp_avg"].dtype for e in optimizer.optim.state.values()}
        assert dtypes == {torch.uint8}
    return results


def test_zero_redundancy_with_state_in_8_bits(ranks: Ranks) -> None:
    for whole_training, in_two_parts in ranks.run(train_zero_in_8_bits, "Adam"):
        assert_same(in_two_parts, whole_training, atol=0)


# ---- distributed tensors as such -----------------------------------------------------------------

SHAPES = {"plain": (7,), "replicated": (5, 3), "rows": (3, 4), "columns": (4, 3), "single": (1,)}


def random_tensors(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    double = torch.float64
    return {k: torch.randn(s, generator=generator, dtype=double) for k, s in SHAPES.items()}


def placed(key: str, tensor: Any, mesh: Any) -> Any:
    if key == "plain":
        return tensor
    placement = {"replicated": dtensor.Replicate(), "columns": dtensor.Shard(1)}
    return dtensor.distribute_tensor(tensor, mesh, [placement.get(key, dtensor.Shard(0))])


def otherwise_placed(rank: int, key: str, gradient: Any, mesh: Any) -> Any:
    """Return a gradient as a backward pass may leave it: on all ranks, or not yet summed."""
    if key in ("plain", "single"):  # torch.optim itself refuses others for the shape of `single`
        return placed(key, gradient, mesh)
    if key == "rows":
        return dtensor.distribute_tensor(gradient, mesh, [dtensor.Replicate()])
    share = gradient * (0.25 if rank == 0 else 0.75)
    return dtensor.DTensor.from_local(share, mesh, [dtensor.Partial()])


def train_tensors(rank: int, name: str, max_norm: float | None, otherwise: bool) -> Any:
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    params = {k: nn.Parameter(placed(k, t, mesh)) for k, t in random_tensors(0).items()}
    optimizer = fused(name, params.values(), max_norm=max_norm)
    for i in range(STEPS):
        for k, gradient in random_tensors(i + 1).items():
            params[k].grad = (
                otherwise_placed(rank, k, gradient, mesh)
                if otherwise
                else placed(k, gradient, mesh)
            )
        optimizer.step()
    return {k: whole(p) for k, p in params.items()}


def train_tensors_alone(name: str, max_norm: float | None) -> Any:
    params = {k: nn.Parameter(t) for k, t in random_tensors(0).items()}
    optimizer = plain(name, params.values())
    for i in range(STEPS):
        for k, gradient in random_tensors(i + 1).items():
            params[k].grad = gradient
        if max_norm is not None:
            nn.utils.clip_grad_norm_(params.values(), max_norm)
        optimizer.step()
    return {k: whole(p) for k, p in params.items()}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("otherwise", [False, True], ids=["placed alike", "placed otherwise"])
def test_placements_side_by_side(
    ranks: Ranks, name: str, max_norm: float | None, otherwise: bool
) -> None:
    expected = train_tensors_alone(name, max_norm)
    for trained in ranks.run(train_tensors, name, max_norm, otherwise):
        assert_same(trained, expected)


def clip_huge(rank: int) -> Any:
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    p = nn.Parameter(placed("rows", torch.ones(4, dtype=torch.float64), mesh))
    optimizer = fused("SGD", [p], max_norm=1.0, skip_nonfinite=True)
    p.grad = torch.full_like(p, 1e200)
    optimizer.step()
    return optimizer.skipped_steps, whole(p)


def test_the_norm_does_not_overflow(ranks: Ranks) -> None:
    for skipped, moved in ranks.run(clip_huge):
        assert skipped == 0
        np.testing.assert_allclose(moved, 1 - OPTIONS["SGD"]["lr"] / 2, rtol=1e-12)


def clear_gradients(rank: int) -> Any:
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    params = [nn.Parameter(placed("rows", torch.ones(4, 3), mesh)) for _ in range(2)]
    params[0].grad = placed("rows", torch.ones(4, 3), mesh)
    params[1].grad = placed("replicated", torch.ones(4, 3), mesh)
    fused("SGD", params).step(zero_grad=True)
    return [whole(p) for p in params], [whole(p.grad) for p in params]


def test_zero_grad_in_the_step_clears_the_gradient_itself(ranks: Ranks) -> None:
    for params, gradients in ranks.run(clear_gradients):
        np.testing.assert_allclose(params, 1 - OPTIONS["SGD"]["lr"], rtol=1e-6)
        np.testing.assert_array_equal(gradients, 0)


def train_tensor_parallel(rank: int, name: str, max_norm: float | None) -> Any:
    from torch.distributed.tensor import parallel

    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    model = parallel.parallelize_module(network(4), mesh, plan)
    return train(model, fused(name, model.parameters(), max_norm=max_norm))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_tensor_parallel(ranks: Ranks, name: str, max_norm: float | None) -> None:
    expected = train_alone(name, max_norm, wide=4)
    for trained in ranks.run(train_tensor_parallel, name, max_norm):
        assert_same(trained, expected)
