"""State dicts and checkpoint files: round trips, torch's form, and everything that can be wrong."""

from __future__ import annotations

import json
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fusestep as fs
from fusestep._state_dict import OUR_SETTINGS
from rules import PLAIN, RULES, Rule

if TYPE_CHECKING:
    from pathlib import Path

f32 = np.float32


def make(rule: Rule, **common: Any) -> tuple[dict[str, np.ndarray], fs.Optimizer]:
    rng = np.random.default_rng(0)
    params = {
        "layer.W": rng.standard_normal((3, 4)).astype(f32).T,
        "layer.b": rng.standard_normal(4),
        "none": np.zeros((0, 2), f32),
        "scalar": np.array(1.0, f32),
    }
    return params, rule.cls(params, **rule.options, **common)


def gradients(seed: int, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in params.items()}


def go(opt: fs.Optimizer, params: dict[str, np.ndarray], start: int, stop: int) -> None:
    for seed in range(start, stop):
        opt.step(gradients(seed, params))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("through", ["dict", "file"])
def test_interrupted_is_uninterrupted(rule: Rule, through: str, tmp_path: Path) -> None:
    whole, whole_opt = make(rule)
    go(whole_opt, whole, 0, 10)

    first, first_opt = make(rule)
    go(first_opt, first, 0, 6)
    second, second_opt = make(rule)
    for k, p in first.items():
        second[k][...] = p
    if through == "dict":
        second_opt.load_state_dict(first_opt.state_dict())
    else:
        first_opt.save(tmp_path / "opt.safetensors")
        second_opt.load(tmp_path / "opt.safetensors")
    go(second_opt, second, 6, 10)

    np.testing.assert_equal(second, whole)
    np.testing.assert_equal(second_opt.state_dict(), whole_opt.state_dict())
    assert second_opt.steps == 10


def test_names_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    for rule in RULES:
        w = np.ones(3, f32)
        opt = rule.cls([w], **rule.options)
        tensor = torch.nn.Parameter(torch.ones(3))
        theirs = getattr(torch.optim, rule.torch)([tensor], **rule.options, **rule.torch_options)
        tensor.grad = torch.ones(3)
        theirs.step()
        ours = opt.state_dict()
        assert set(theirs.state_dict()["state"].get(0, {})) | {"step"} == set(ours["state"][0])
        known = set(theirs.state_dict()["param_groups"][0])
        extra = {"state_dtype", *OUR_SETTINGS}
        assert set(ours["param_groups"][0]) <= known | extra


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_torchs_state_goes_on_here(rule: Rule) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((4, 5)), rng.standard_normal((20, 4, 5))
    tensor = torch.nn.Parameter(torch.tensor(start))
    options = {**rule.options, **rule.torch_options}
    theirs = getattr(torch.optim, rule.torch)([tensor], **options)
    for g in grads[:10]:
        tensor.grad = torch.tensor(g)
        theirs.step()
    w = tensor.detach().numpy().copy()
    opt = rule.cls([w], **{**rule.options, "lr": 123.0})
    opt.load_state_dict(theirs.state_dict())
    assert opt.lr == rule.options["lr"]
    for g in grads[10:]:
        tensor.grad = torch.tensor(g)
        theirs.step()
        opt.step([g])
    np.testing.assert_allclose(w, tensor.detach().numpy(), rtol=0, atol=1e-7)


def test_fresh_torch_state_is_a_fresh_start() -> None:
    torch = pytest.importorskip("torch")
    fresh = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.5, momentum=0.9)
    w = np.ones(3, f32)
    opt = fs.SGD([w], lr=0.1, momentum=0.9)
    opt.step([np.ones(3, f32)])
    opt.load_state_dict(fresh.state_dict())
    assert opt.state[0]["step"] == 0
    assert not opt.state[0]["momentum_buffer"].any()
    assert opt.lr == 0.5


def test_a_state_dict_is_a_copy() -> None:
    params, opt = make(PLAIN[3])
    go(opt, params, 0, 2)
    saved = opt.state_dict()
    kept = saved["state"]["layer.W"]["exp_avg"].copy()
    go(opt, params, 2, 4)
    np.testing.assert_array_equal(saved["state"]["layer.W"]["exp_avg"], kept)
    opt.load_state_dict(saved)
    saved["state"]["layer.W"]["exp_avg"][...] = 99
    np.testing.assert_array_equal(opt.state["layer.W"]["exp_avg"], kept)


def test_the_live_state_is_live() -> None:
    params, opt = make(PLAIN[3])
    live = opt.state["layer.b"]["exp_avg"]
    go(opt, params, 0, 1)
    assert live.any()


def test_names_may_come_in_another_order() -> None:
    a, b = {"x": np.ones(2), "y": np.ones(3)}, {"y": np.ones(3), "x": np.ones(2)}
    first, second = fs.Adam(a), fs.Adam(b)
    first.step({"x": np.ones(2), "y": 2 * np.ones(3)})
    second.load_state_dict(first.state_dict())
    np.testing.assert_equal(second.state["y"], first.state["y"])


def test_a_schedule_goes_on_where_it_was() -> None:
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 0.1

    opt = fs.SGD([np.ones(2)], lr=schedule)
    for _ in range(3):
        opt.step([np.ones(2)])
    saved = opt.state_dict()
    assert saved["param_groups"][0]["lr"] is None
    other = fs.SGD([np.ones(2)], lr=schedule)
    other.load_state_dict(saved)
    other.step([np.ones(2)])
    assert seen == [0, 1, 2, 3]
    assert other.lr is schedule


def test_state_is_widened_but_never_narrowed() -> None:
    narrow = fs.Adam([np.ones(3, f32)])
    narrow.step([np.ones(3, f32)])
    wide = fs.Adam([np.ones(3, f32)], state_dtype="float64")
    wide.load_state_dict(narrow.state_dict())
    np.testing.assert_array_equal(wide.state[0]["exp_avg"], narrow.state[0]["exp_avg"])
    assert wide.state[0]["exp_avg"].dtype == np.float64
    with pytest.raises(TypeError, match="state_dtype='float64'"):
        narrow.load_state_dict(wide.state_dict())


@pytest.mark.parametrize(
    ("saved", "into", "becomes", "warns"),
    [
        (None, "bfloat16", "bfloat16", True),
        ("float64", "bfloat16", "bfloat16", True),
        ("bfloat16", None, "float32", True),
        ("bfloat16", "bfloat16", "bfloat16", False),
        (None, "float64", "float64", False),
    ],
)
def test_bfloat16_state_is_converted(saved: Any, into: Any, becomes: str, warns: bool) -> None:
    """In both directions, rounded to nearest, and not without a word."""
    pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    old = fs.Adam([np.ones(50, f32), np.ones(3, f32)], state_dtype=saved)
    old.step([rng.standard_normal(50, f32), rng.standard_normal(3, f32)])
    new = fs.Adam([np.ones(50, f32), np.ones(3, f32)], state_dtype=into)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new.load_state_dict(old.state_dict())
    assert [w.category for w in caught] == [UserWarning] * warns
    for name in ("exp_avg", "exp_avg_sq"):
        values = new.state[0][name]
        assert values.dtype.name == becomes
        np.testing.assert_array_equal(values, old.state[0][name].astype(f32).astype(values.dtype))


def test_a_conversion_that_is_an_error_changes_nothing() -> None:
    pytest.importorskip("ml_dtypes")
    old, new = (fs.Adam([np.ones(3, f32)], state_dtype=x) for x in ("bfloat16", None))
    old.step([np.ones(3, f32)])
    before = new.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            new.load_state_dict(old.state_dict())
    np.testing.assert_equal(new.state_dict(), before)


def _edit(**changes: Any) -> Any:
    """Set entries by path: state__0__step=... ; a value of ... deletes."""

    def edit(d: dict[Any, Any]) -> Any:
        for path, value in changes.items():
            *parents, last = [int(k) if k.isdigit() else k for k in path.split("__")]
            target: Any = d
            for key in parents:
                target = target[key]
            if value is ...:
                del target[last]
            else:
                target[last] = value
        return d

    return edit


BAD_STATES: list[tuple[str, Any, type[Exception], str]] = [
    ("a list", lambda d: [d], TypeError, "state dict is a list"),
    ("None", lambda d: None, TypeError, "NoneType"),
    ("no groups", _edit(param_groups=...), ValueError, "lacks 'param_groups'"),
    ("no state", _edit(state=...), ValueError, "lacks 'state'"),
    ("unknown top-level key", _edit(model=1), ValueError, "unknown keys: 'model'"),
    ("another rule", _edit(fusestep__rule="SGD"), ValueError, "of SGD"),
    ("unknown counter", _edit(fusestep__epochs=3), ValueError, "'epochs'"),
    ("negative steps", _edit(fusestep__steps=-1), ValueError, "steps is -1"),
    ("groups not a list", _edit(param_groups={}), TypeError, "expected a list"),
    ("no group", _edit(param_groups=[]), ValueError, "0 parameter groups"),
    ("group not a dict", _edit(param_groups=[3]), TypeError, "int"),
    ("unknown option", _edit(param_groups__0__beta=0.9), ValueError, "'beta'"),
    ("bad lr", _edit(param_groups__0__lr=-1.0), ValueError, "lr"),
    ("bad betas", _edit(param_groups__0__betas=(0.9, 2.0)), ValueError, "betas"),
    ("another amsgrad", _edit(param_groups__0__amsgrad=True), ValueError, "amsgrad"),
    ("fewer parameters", _edit(param_groups__0__params=[0]), ValueError, "1 parameters"),
    ("unknown parameter", _edit(state__7={}), ValueError, "unknown keys: 7"),
    ("entry not a dict", _edit(state__0=3), TypeError, "the state of parameter 0"),
    ("unknown state", _edit(state__0__momentum=np.zeros(3)), ValueError, "'momentum'"),
    ("missing state", _edit(state__1__exp_avg_sq=...), ValueError, "lacks 'exp_avg_sq'"),
    ("missing step", _edit(state__1__step=...), ValueError, "lacks 'step'"),
    ("too many steps", _edit(state__0__step=1e19), ValueError, "step is 1e+19"),
    ("too many in all", _edit(fusestep__steps=1e19), ValueError, "steps is 1e+19"),
    ("one parameter twice", _edit(param_groups__0__params=[0, 0]), ValueError, "twice"),
    ("entry is a list", _edit(state__0=[]), TypeError, "the state of parameter 0 is a list"),
    ("half a step", _edit(state__0__step=1.5), ValueError, "step is 1.5"),
    ("negative step", _edit(state__0__step=-1), ValueError, "step is -1"),
    ("NaN step", _edit(state__0__step=np.nan), ValueError, "step is nan"),
    ("step of text", _edit(state__0__step="3"), TypeError, "step is '3'"),
    ("wrong shape", _edit(state__1__exp_avg=np.zeros(3)), ValueError, "shape (3,)"),
    ("wide dtype", _edit(state__0__exp_avg=np.zeros(2)), TypeError, "float64"),
    ("integers", _edit(state__0__exp_avg=np.zeros(2, int)), TypeError, "int64"),
    ("objects", _edit(state__0__exp_avg=np.zeros(2, object)), TypeError, "object"),
    ("not an array", _edit(state__0__exp_avg="zeros"), TypeError, "exp_avg of parameter 0"),
]


@pytest.mark.parametrize(
    ("edit", "error", "message"), [b[1:] for b in BAD_STATES], ids=[b[0] for b in BAD_STATES]
)
def test_bad_state_dicts_change_nothing(edit: Any, error: type[Exception], message: str) -> None:
    opt = fs.Adam([np.ones(2, f32), np.ones((2, 2), f32)], lr=0.5)
    opt.step([np.ones(2, f32), np.ones((2, 2), f32)])
    before = opt.state_dict()
    with pytest.raises(error) as caught:
        opt.load_state_dict(edit(opt.state_dict()))
    assert message in str(caught.value)
    np.testing.assert_equal(opt.state_dict(), before)


@pytest.mark.parametrize("product", [np.nan, np.inf, 2.0, -1.0])
def test_bad_mu_product(product: float) -> None:
    opt = fs.NAdam([np.ones(2)])
    saved = opt.state_dict()
    saved["state"][0]["mu_product"] = product
    with pytest.raises(ValueError, match="mu_product"):
        opt.load_state_dict(saved)


def test_what_torch_adds_to_its_groups_is_no_obstacle() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 1).to(torch.bfloat16)
    theirs = torch.optim.Adam(model.named_parameters(), lr=torch.tensor([0.5]))
    torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.5, total_steps=10)
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    theirs.step()
    opt = fs.Adam([np.zeros((1, 2), f32), np.zeros(1, f32)])
    with pytest.warns(UserWarning, match="from bfloat16 to float32") as caught:
        opt.load_state_dict(theirs.state_dict())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert opt.state[0]["step"] == 1
    expected = theirs.state_dict()["state"][0]["exp_avg"].float().numpy()
    np.testing.assert_array_equal(opt.state[0]["exp_avg"], expected)


def test_momentum_without_a_buffer_starts_afresh() -> None:
    opt = fs.SGD([np.ones(2)], momentum=0.5, dampening=0.5, lr=1.0)
    saved = opt.state_dict()
    saved["state"][0] = {"step": 5, "momentum_buffer": None}
    opt.load_state_dict(saved)
    opt.step([np.ones(2)])
    np.testing.assert_array_equal(opt.params[0], 0)  # the first gradient is not dampened


def test_loading_the_live_state_of_others() -> None:
    opt = fs.Adam([np.ones(2), np.ones(2)])
    opt.step([np.ones(2), 2 * np.ones(2)])
    saved = opt.state_dict()
    swapped = {**saved, "state": {0: opt.state[1], 1: opt.state[0]}}
    opt.load_state_dict(swapped)
    np.testing.assert_array_equal(opt.state[0]["exp_avg"], saved["state"][1]["exp_avg"])
    np.testing.assert_array_equal(opt.state[1]["exp_avg"], saved["state"][0]["exp_avg"])


def test_fixed_options_must_agree() -> None:
    adam, adamw = fs.Adam([np.ones(2)]), fs.AdamW([np.ones(2)])
    saved = adam.state_dict()
    del saved["fusestep"]
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        adamw.load_state_dict(saved)


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[fs.Optimizer, Path]:
    params, opt = make(PLAIN[3])
    go(opt, params, 0, 3)
    path = tmp_path / "opt.safetensors"
    opt.save(path)
    return opt, path


def test_file_is_plain_safetensors(saved: tuple[fs.Optimizer, Path]) -> None:
    from safetensors.numpy import load_file

    opt, path = saved
    tensors = load_file(path)
    assert set(tensors) == {f"{k}/{s}" for k in opt.params for s in ("exp_avg", "exp_avg_sq")}
    np.testing.assert_array_equal(tensors["layer.W/exp_avg"], opt.state["layer.W"]["exp_avg"])
    assert [p.name for p in path.parent.iterdir()] == ["opt.safetensors"]


def test_names_that_look_like_paths(tmp_path: Path) -> None:
    params = {"a": np.ones(1), "a/exp_avg": np.ones(2), "../x": np.ones(3), "é\n": np.ones(4)}
    opt = fs.Adam(params)
    opt.step({k: np.full_like(p, i) for i, (k, p) in enumerate(params.items())})
    opt.save(tmp_path / "x")
    other = fs.Adam(params)
    other.load(tmp_path / "x")
    np.testing.assert_equal(other.state_dict(), opt.state_dict())


def test_every_truncation_is_noticed(saved: tuple[fs.Optimizer, Path]) -> None:
    opt, path = saved
    whole, before = path.read_bytes(), opt.state_dict()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            opt.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="safetensors"):
        opt.load(path)
    np.testing.assert_equal(opt.state_dict(), before)


def _foreign(path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.ones(3, f32)}, path, metadata)


FOREIGN = [
    (None, "not written by fusestep"),
    ({"format": "pt"}, "not written by fusestep"),
    ({"fusestep": "99", "header": "{}"}, "format 99"),
    ({"fusestep": "1"}, "damaged header"),
    ({"fusestep": "1", "header": "{"}, "damaged header"),
    ({"fusestep": "1", "header": "[]"}, "damaged header"),
    ({"fusestep": "1", "header": "{}"}, "damaged header"),
    ({"fusestep": "1", "header": json.dumps({"state": []})}, "unknown tensors"),
    ({"fusestep": "1", "header": json.dumps({"state": [{"key": 0}]})}, "damaged header"),
]


@pytest.mark.parametrize(("metadata", "message"), FOREIGN)
def test_foreign_files(metadata: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    opt = fs.Adam([np.ones(3, f32)])
    _foreign(tmp_path / "x", metadata)
    with pytest.raises(ValueError, match=message):
        opt.load(tmp_path / "x")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    opt = fs.Adam([np.ones(3, f32)])
    for content in (
        b"",
        b"\x80\x04\x95pickle",
        b"{}",
        os.urandom(1000),
        b"PK\x03\x04" + b"\0" * 50,
    ):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match="safetensors"):
            opt.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        opt.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(
    saved: tuple[fs.Optimizer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, path = saved
    old = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        opt.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_link_is_followed(tmp_path: Path) -> None:
    opt = fs.Adam([np.ones(3)])
    (tmp_path / "link").symlink_to(tmp_path / "file")
    opt.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    opt.load(tmp_path / "file")


def test_a_foreign_file_of_other_dtypes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    opt = fs.Adam([np.ones(3)])
    for metadata, message in [(None, "not written by"), ({"fusestep": "1"}, "not state|damaged")]:
        save_file({"w": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "x", metadata)
        with pytest.raises(ValueError, match=message):
            opt.load(tmp_path / "x")


def test_saving_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fs.Adam([np.ones(3)]).save(tmp_path / "nowhere" / "x")


def test_permissions_are_those_of_a_normal_file(tmp_path: Path) -> None:
    opt = fs.Adam([np.ones(3)])
    (tmp_path / "normal").touch()
    opt.save(tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "normal").stat().st_mode
    (tmp_path / "x").chmod(0o600)
    opt.save(tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def test_loading_another_rule_or_model(saved: tuple[fs.Optimizer, Path]) -> None:
    _opt, path = saved
    with pytest.raises(ValueError, match="of Adam; this optimizer is SGD"):
        fs.SGD([np.ones(3)]).load(path)
    with pytest.raises(ValueError, match="4 parameters; this optimizer has 1"):
        fs.Adam([np.ones(3)]).load(path)
    with pytest.raises(ValueError, match=r"'layer\.W'"):
        fs.Adam({"other": np.ones(3)}).load(path)
