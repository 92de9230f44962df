"""The triton backend without a GPU: its kernels under the interpreter, tables, launches."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed")

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import tables, triton

OPTIMIZERS = [AMAdamW, AMSGD]
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "selection",
    [
        ["test_gpu_cases.py", "test_gpu_norms.py", "test_versions.py", "-k", "test_gpu or triton"],
        pytest.param(["test_gpu_rows.py"], marks=pytest.mark.emulated),
        pytest.param(["test_gpu_low_precision.py"], marks=pytest.mark.emulated),
        pytest.param(["test_one_pass.py", "-k", "triton"], marks=pytest.mark.emulated),
    ],
    ids=lambda selection: selection[0],
)
def test_kernels_under_the_interpreter(selection):
    """In a process that imports triton with its interpreter on."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# ---- tables and launches, with no kernel run --------------------------------------------


class Launches:
    """Stands in for the launches; looks at what a kernel would have read."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.addresses: torch.Tensor | None = None
        self.uploads = 0

    def launch(self, name, programs, arguments, **options) -> None:
        assert programs > 0
        assert set(triton._kernel(name).arg_names) <= arguments.keys()
        self.names.append(name)
        self.lengths += [arguments["WIDTH"]] if name == "am_rows" else []
        self.addresses = arguments["addresses"]

    def step(self, optimizer) -> list[list[int]]:
        """Steps; returns the addresses that the kernels were given, a list for each list."""
        self.names, self.uploads = [], 0
        optimizer.step()
        count = 2 + len(optimizer.memories) + len(optimizer.scalars)
        return self.addresses.view(count, -1).tolist()


@pytest.fixture
def launches(monkeypatch):
    launches = Launches()
    upload = tables.upload

    def counted(*args):
        launches.uploads += 1
        return upload(*args)

    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    monkeypatch.setattr(triton, "_launch", launches.launch)
    monkeypatch.setattr(tables, "upload", counted)
    return launches


def make_params(n: int, shape=(4, 6)) -> list[torch.Tensor]:
    params = [torch.zeros(shape, requires_grad=True) for _ in range(n)]
    set_grads(params)
    return params


def set_grads(params) -> None:
    for param in params:
        param.grad = torch.ones_like(param)


def own_addresses(optimizer) -> list[list[int]]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = (*optimizer.memories, *optimizer.scalars)
    return [
        [p.data_ptr() for p in params],
        [p.grad.data_ptr() for p in params],
        *([optimizer.state[p][name].data_ptr() for p in params] for name in names),
    ]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("n", [1, 20_000])
def test_few_launches_whatever_the_tensors(launches, cls, scope, n):
    shapes = [(3,), (4, 6), (), (0,)]
    params = [torch.zeros(shapes[i % 4], requires_grad=True) for i in range(n)]
    set_grads(params)
    half = len(params) // 2
    groups = [{"params": params[half:], "lr": 0.1}, {"params": params[:half], "lr": 0.2}]
    optimizer = cls(groups, backend="triton", beta_scope=scope)
    launches.step(optimizer)
    shared = ["sum_shared", "am_beta"] if scope == "global" else []
    step = ["am_prepare", "am_begin", *shared, "am_finish"]
    assert launches.names == step
    optimizer.max_grad_norm = 1.0
    launches.step(optimizer)
    assert launches.names == ["am_squares", "sum_squares", *step]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("rows", [False, True])
def test_one_launch_more_of_each_for_each_combination_of_dtypes(launches, cls, rows):
    params = [
        torch.zeros(5, dtype=dtype, requires_grad=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float64)
    ]
    set_grads(params)
    optimizer = cls(params, backend="triton", beta_scope="tensor")
    if rows:
        (work,) = optimizer._collect()
        optimizer._finish(
            triton, work.batch, optimizer._begin(triton, work.batch, None, None), None, None
        )
    else:
        launches.step(optimizer)
    seam = ["sum_rows", "am_beta"] if rows else []
    assert launches.names == ["am_prepare", *["am_begin"] * 3, *seam, *["am_finish"] * 3]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("halves", [False, True])
def test_rows_take_one_launch_for_each_power_of_2_of_their_length(launches, cls, halves):
    """Beside those of what is one segment, or too long to be held."""
    shapes = [(3, 60), (5, 20), (2, 3, 4, 5), (4, 17), (7,), (2, 20_000)]
    params = [param for shape in shapes for param in make_params(1, shape)]
    optimizer = cls(params, backend="triton", beta_scope="row")
    if halves:
        (work,) = optimizer._collect()
        rows = optimizer._begin(triton, work.batch, None, None)
        assert rows.shape == (3 + 5 + 2 + 4 + 1 + 2, 2)
        optimizer._finish(triton, work.batch, rows, None, None)
    else:
        launches.step(optimizer)
    begin = ["am_prepare", "am_begin", "am_rows", "am_rows"]
    seam = ["sum_rows", "am_beta", "am_rows", "am_rows"] if halves else []
    assert launches.names == [*begin, *seam, "am_finish"]
    assert launches.lengths == [64, 32] * (2 if halves else 1)
    assert layout_of(optimizer).units == 5 + 2


def test_squared_norms_take_one_launch_more_for_each_dtype_of_gradients_and_none_for_rows(launches):
    """Buckets of other rows, and of parameters of other dtypes, share one."""
    params = [param for shape in [(3, 60), (5, 20), (7,)] for param in make_params(1, shape)]
    params += [torch.zeros(4, 60, dtype=torch.bfloat16, requires_grad=True)]
    set_grads(params)
    optimizer = AMAdamW(params, backend="triton", beta_scope="row", max_grad_norm=1.0)
    launches.step(optimizer)
    assert len(layout_of(optimizer).buckets) == 4
    assert launches.names[:3] == ["am_squares", "am_squares", "sum_squares"]
    assert "am_squares" not in launches.names[3:]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_alone_take_two_launches(launches, cls):
    launches.step(cls(make_params(3, (4, 20)), backend="triton", beta_scope="row"))
    assert launches.names == ["am_prepare", "am_rows"]


def test_a_list_without_elements_is_only_prepared(launches):
    params = make_params(2, (0, 3))
    launches.step(AMAdamW(params, backend="triton"))
    assert launches.names == ["am_prepare"]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_nothing_is_uploaded_while_nothing_changes(launches, cls):
    params = make_params(3)
    optimizer = cls(params, backend="triton")
    launches.step(optimizer)
    assert launches.uploads > 0
    for _ in range(3):
        assert launches.step(optimizer) == own_addresses(optimizer)
        assert launches.uploads == 0


def change_grads(optimizer, params):
    # The old ones are kept, so that the new ones lie elsewhere.
    optimizer.old = [param.grad for param in params]
    set_grads(params)


def change_one_grad(optimizer, params):
    optimizer.old = params[1].grad
    params[1].grad = torch.ones_like(params[1])


def change_param_data(optimizer, params):
    params[0].data = params[0].data.clone()


def change_memory(optimizer, params):
    name = optimizer.memories[0]
    optimizer.state[params[2]][name] = optimizer.state[params[2]][name].clone()


def change_memory_data(optimizer, params):
    memory = optimizer.state[params[2]][optimizer.memories[0]]
    memory.data = memory.data.clone()


def change_scalar(optimizer, params):
    optimizer.state[params[1]]["prev_lr"] = optimizer.state[params[1]]["prev_lr"].clone()


def load_own_state(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def use_fewer_tensors(optimizer, params):
    optimizer.param_groups[0]["params"].pop()


def use_other_tensors(optimizer, params):
    optimizer.add_param_group({"params": make_params(2, (9,))})


CHANGES = [
    change_grads,
    change_one_grad,
    change_param_data,
    change_memory,
    change_memory_data,
    change_scalar,
    load_own_state,
    use_fewer_tensors,
    use_other_tensors,
]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_stale_address_is_ever_used(launches, cls, change):
    params = make_params(3)
    optimizer = cls(params, backend="triton")
    launches.step(optimizer)
    launches.step(optimizer)
    change(optimizer, params)
    assert launches.step(optimizer) == own_addresses(optimizer)
    assert launches.uploads > 0
    assert launches.step(optimizer) == own_addresses(optimizer)
    assert launches.uploads == 0


def change_lr(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.5


def change_lr_to_a_tensor(optimizer, params):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)


def change_weight_decay(optimizer, params):
    optimizer.param_groups[0]["weight_decay"] = 0.3


@pytest.mark.parametrize("change", [change_lr, change_lr_to_a_tensor, change_weight_decay])
def test_hyperparameters_are_uploaded_when_they_change(launches, change):
    params = make_params(3)
    optimizer = AMAdamW(params, backend="triton")
    launches.step(optimizer)
    change(optimizer, params)
    launches.step(optimizer)
    assert launches.uploads == 1
    launches.step(optimizer)
    assert launches.uploads == 0


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_what_the_kernels_read_lives_until_they_are_launched(launches, monkeypatch, scope):
    """A bfloat16 lr is converted, and the copy belongs to nobody else."""
    copies = []
    place = tables._place_lr

    def recorded(hyper, device):
        placed = place(hyper, device)
        copies.append(weakref.ref(placed.lr))
        return placed

    def launch(*args, **options):
        assert copies[-1]() is not None

    monkeypatch.setattr(tables, "_place_lr", recorded)
    monkeypatch.setattr(triton, "_launch", launch)
    lr = torch.tensor(0.1, dtype=torch.bfloat16)
    AMAdamW(make_params(1), lr=lr, backend="triton", beta_scope=scope).step()
    assert copies


def test_tables_of_a_captured_step_are_kept_and_a_new_layout_is_refused(launches, monkeypatch):
    params = make_params(2)
    optimizer = AMAdamW(params, backend="triton")
    launches.step(optimizer)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    launches.step(optimizer)
    captured = launches.addresses
    (cache,) = optimizer._kept.caches.values()
    kept = list(cache["captured"])
    (kept_tables,) = kept
    assert kept_tables.addresses is captured
    # What it leads to is the user's to keep.
    gone = weakref.ref(params[1].grad)
    params.pop().grad = None
    assert gone() is None
    with pytest.raises(RuntimeError, match="take a step with the same parameters"):
        optimizer.step()
    monkeypatch.setattr(tables, "is_capturing", lambda device: False)
    launches.step(optimizer)
    assert all(a is b for a, b in zip(cache["captured"], kept, strict=True))
    assert launches.addresses.data_ptr() != captured.data_ptr()


def test_a_captured_upload_takes_the_block_that_was_put_aside(launches, monkeypatch):
    (param,) = make_params(1)
    optimizer = AMAdamW([param], backend="triton")
    launches.step(optimizer)
    layout, old = layout_of(optimizer), param.grad
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    param.grad = old.clone()
    with pytest.raises(RuntimeError, match="take a step with the same parameters"):
        optimizer.step()
    layout.spare = spare = torch.empty(2 + 2 + 4 + 1 + 11, dtype=torch.int64)
    blocks = []

    def upload(words, device, pinned=None):
        blocks.append(pinned)
        return words

    monkeypatch.setattr(tables, "upload", upload)
    launches.step(optimizer)
    (block,) = blocks
    assert block is spare
    (cache,) = optimizer._kept.caches.values()
    assert layout.spare is None
    assert cache["captured"][0] is spare


def test_what_a_graph_is_to_upload_is_not_there_for_an_eager_step(launches, monkeypatch):
    """It is there once the graph is replayed, which may be never."""
    (param,) = make_params(1)
    optimizer = AMAdamW([param], backend="triton")
    launches.step(optimizer)
    layout_of(optimizer).spare = torch.empty(2 + 2 + 4 + 1 + 11, dtype=torch.int64)
    with monkeypatch.context() as capture:
        capture.setattr(tables, "is_capturing", lambda device: True)
        param.grad = param.grad.clone()
        launches.step(optimizer)
        captured = launches.addresses
        assert launches.uploads == 1
    launches.step(optimizer)
    assert launches.uploads == 1
    assert launches.addresses is not captured


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_captured_finish_finds_what_the_first_of_its_step_uploads(
    launches, monkeypatch, max_grad_norm
):
    """Begin, or the squared norms."""
    (param,) = make_params(1)
    options = {"gap": "loss", "beta_scope": "global", "max_grad_norm": max_grad_norm}
    optimizer = AMAdamW([param], backend="triton", **options)
    optimizer.step(lambda: torch.tensor(1.0))
    layout_of(optimizer).spare = torch.empty(2 + 2 + 4 + 1 + 11, dtype=torch.int64)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    param.grad = param.grad.clone()
    launches.uploads = 0
    optimizer.step(lambda: torch.tensor(1.0))
    assert launches.uploads == 1


def test_a_step_that_raises_after_its_norms_leaves_nothing_to_the_next(launches, monkeypatch):
    """Its gradients are freed, and those of the next are looked at."""
    params = make_params(2)
    optimizer = AMAdamW(params, backend="triton", max_grad_norm=1.0)
    launches.step(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    gone = weakref.ref(params[0].grad)
    set_grads(params)
    assert gone() is None
    assert launches.step(optimizer) == own_addresses(optimizer)


def layout_of(optimizer) -> tables.Layout:
    (cache,) = optimizer._kept.caches.values()
    return cache["tables"].layout


def test_a_shape_that_changes_at_the_same_address_is_seen(launches):
    (param,) = make_params(1, (12, 2))
    optimizer = AMAdamW([param], backend="triton")
    launches.step(optimizer)
    assert layout_of(optimizer).table[0].item() == 24
    rows = slice(0, 6)
    state = optimizer.state[param]
    memories = {name: state[name][rows] for name in optimizer.memories}
    grad, param.grad = param.grad, None
    param.data = param.data[rows]
    param.grad = grad[rows]
    state.update(memories)
    launches.step(optimizer)
    assert layout_of(optimizer).table[0].item() == 12


def test_strides_of_a_gradient_that_change_at_the_same_address_are_seen(launches):
    (param,) = make_params(1, (4, 4))
    optimizer = AMAdamW([param], backend="triton")
    launches.step(optimizer)
    param.grad = param.grad.t()
    assert launches.step(optimizer)[1] != own_addresses(optimizer)[1], "a copy has to stand in"


def test_elements_that_share_memory_are_refused_and_nothing_changes(launches):
    param = torch.zeros(1, 3).expand(2, 3).requires_grad_()
    param.grad = torch.ones(2, 3)
    optimizer = AMAdamW([param], backend="triton")
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    assert launches.names == []


def test_a_memory_of_another_shape_is_refused(launches):
    (param,) = make_params(1)
    optimizer = AMAdamW([param], backend="triton")
    launches.step(optimizer)
    optimizer.state[param]["exp_avg"] = torch.zeros(6, 4)
    launches.names = []
    with pytest.raises(ValueError, match=r"exp_avg of tensor 0 has shape \[6, 4\]"):
        optimizer.step()
    assert launches.names == []


def test_rows_of_another_shape_are_refused(launches):
    from adamem_fused.backends.batch import SGDBatch, SGDHyper

    scalars = [[torch.zeros(())] for _ in range(3)]
    hyper = SGDHyper(0.1, 0.9, 0.0, 0.1, False, False, False)
    batch = SGDBatch([torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3)], *scalars, [hyper], [1])
    with pytest.raises(ValueError, match=r"rows has to be a float64 tensor of shape \[1, 2\]"):
        triton.sgd_finish(batch, torch.zeros(1, 2), None, None)
    assert launches.names == []


def test_check_raises_what_a_step_would(launches):
    (param,) = make_params(1)
    optimizer = AMAdamW([param], backend="triton")
    (work,) = optimizer._collect()
    triton.check(work.batch)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="cannot be traced"):
        triton.check(work.batch)
    work.batch.exp_avgs[0] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of tensor 0 has shape \[3\]"):
        triton.check(work.batch)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "on a GPU" in triton.unavailable(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.unavailable(torch.device("cpu")) is None
    assert "interpreter" in triton.unavailable(torch.device("cuda"))


def test_the_kernels_are_one_module_under_one_name():
    from adamem_fused.triton_kernels import kernels

    assert kernels.__name__ == "adamem_fused.triton_kernels.kernels"
    assert triton._kernel("am_begin") is kernels.am_begin
