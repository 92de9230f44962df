"""Bad input: which error, what it says, and that nothing was changed before it was raised."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import OPTIMIZERS, bits
from snapshot import snapshot
from torch.nn import Parameter

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import cpu, cpu_library, foreach, ops, reference
from adamem_fused.backends.batch import AdamWBatch, AdamWHyper, SGDBatch, SGDHyper

NAN, INF = math.nan, math.inf

# (option, bad value, error, regex): the message names the option, its value and what is allowed.
BAD_BOTH = [
    ("lr", -1.0, ValueError, r"learning rate: -1\.0 .*>= 0"),
    ("lr", NAN, ValueError, r"learning rate: nan .*>= 0"),
    ("lr", INF, ValueError, r"learning rate: inf .*finite"),
    ("lr", "0.1", ValueError, r"learning rate: '0\.1' .*number"),
    ("lr", None, ValueError, r"learning rate: None .*number"),
    ("lr", True, ValueError, r"learning rate: True .*number"),
    ("lr", 1j, ValueError, r"learning rate: 1j .*number"),
    ("lr", torch.tensor(-0.1), ValueError, r"learning rate: -0\.1"),
    ("lr", torch.tensor(NAN), ValueError, r"learning rate: nan"),
    ("lr", torch.tensor([INF]), ValueError, r"learning rate: inf"),
    ("lr", torch.tensor([0.1, 0.2]), ValueError, r"lr must be 1-element.*\[2\]"),
    ("lr", torch.tensor([]), ValueError, r"lr must be 1-element.*\[0\]"),
    ("weight_decay", -0.1, ValueError, r"weight_decay value: -0\.1 .*>= 0"),
    ("weight_decay", NAN, ValueError, r"weight_decay value: nan"),
    ("weight_decay", INF, ValueError, r"weight_decay value: inf .*finite"),
    ("weight_decay", None, ValueError, r"weight_decay value: None .*number"),
    ("memory_lambda", -0.1, ValueError, r"memory_lambda value: -0\.1 .*>= 0"),
    ("memory_lambda", NAN, ValueError, r"memory_lambda value: nan"),
    ("memory_lambda", INF, ValueError, r"memory_lambda value: inf .*finite"),
    ("memory_lambda", "0.1", ValueError, r"memory_lambda value: '0\.1' .*number"),
    ("memory_plane", "flat", ValueError, r"memory_plane: 'flat' .*'level' or 'anchored'"),
    ("memory_plane", None, ValueError, r"memory_plane: None .*'level' or 'anchored'"),
    ("gap", "losses", ValueError, r"gap: 'losses' .*'gradient' or 'loss'"),
    ("beta_scope", "layer", ValueError, r"beta_scope: 'layer' .*'tensor' or 'row' or 'global'"),
    ("beta_scope", ["row"], ValueError, r"beta_scope: \['row'\] .*'tensor' or 'row' or 'global'"),
    ("maximize", "yes", ValueError, r"maximize: 'yes' .*True or False"),
    ("maximize", None, ValueError, r"maximize: None .*True or False"),
    ("capturable", "yes", ValueError, r"capturable: 'yes' .*True or False"),
    ("foreach", "yes", ValueError, r"foreach value: 'yes' .*True, False or None"),
    ("fused", "yes", ValueError, r"fused value: 'yes' .*True, False or None"),
    ("backend", "cuda_graph", ValueError, r"backend: 'cuda_graph' .*cpu.*foreach.*reference.*None"),
    ("backend", 3, ValueError, r"backend: 3 .*cpu.*foreach.*reference.*None"),
    ("backend", ["cpu"], ValueError, r"backend: \['cpu'\] .*cpu.*foreach.*reference.*None"),
]
BAD_ADAMW = [
    ("betas", (-0.1, 0.999), ValueError, r"beta parameter at index 0: -0\.1 .*\[0\.0, 1\.0\)"),
    ("betas", (1.0, 0.999), ValueError, r"beta parameter at index 0: 1\.0 .*\[0\.0, 1\.0\)"),
    ("betas", (NAN, 0.999), ValueError, r"beta parameter at index 0: nan"),
    ("betas", (0.9, 1.0), ValueError, r"beta parameter at index 1: 1\.0 .*\[0\.0, 1\.0\)"),
    ("betas", (0.9, -1), ValueError, r"beta parameter at index 1: -1 .*\[0\.0, 1\.0\)"),
    ("betas", (0.9, NAN), ValueError, r"beta parameter at index 1: nan"),
    ("betas", ("0.9", 0.999), ValueError, r"beta parameter at index 0: '0\.9' .*number"),
    ("betas", (0.9, None), ValueError, r"beta parameter at index 1: None .*number"),
    ("betas", (torch.tensor(0.9), 0.999), ValueError, r"index 0: tensor\(0\.9.*number"),
    ("betas", (0.9,), ValueError, r"betas: \(0\.9,\) .*two numbers"),
    ("betas", (0.9, 0.99, 0.999), ValueError, r"betas: \(0\.9, 0\.99, 0\.999\) .*two numbers"),
    ("betas", 0.9, ValueError, r"betas: 0\.9 .*two numbers"),
    ("betas", None, ValueError, r"betas: None .*two numbers"),
    ("eps", -1e-8, ValueError, r"epsilon value: -1e-08 .*>= 0"),
    ("eps", NAN, ValueError, r"epsilon value: nan"),
    ("eps", INF, ValueError, r"epsilon value: inf .*finite"),
    ("eps", "1e-8", ValueError, r"epsilon value: '1e-8' .*number"),
]
BAD_SGD = [
    ("beta_max", -0.1, ValueError, r"beta_max value: -0\.1 .*\[0\.0, 1\.0\)"),
    ("beta_max", 1.0, ValueError, r"beta_max value: 1\.0 .*\[0\.0, 1\.0\)"),
    ("beta_max", NAN, ValueError, r"beta_max value: nan"),
    ("beta_max", "0.9", ValueError, r"beta_max value: '0\.9' .*number"),
    ("beta_max", None, ValueError, r"beta_max value: None .*number"),
]
BAD_OPTIONS = [
    pytest.param(cls, *row, id=f"{cls.__name__}-{row[0]}-{row[1]!r}")
    for cls, rows in ((AMAdamW, BAD_BOTH + BAD_ADAMW), (AMSGD, BAD_BOTH + BAD_SGD))
    for row in rows
]

# Options that are good alone and contradict one another.
CONTRADICTIONS = [
    ({"foreach": True, "fused": True}, RuntimeError, r"`fused` and `foreach` cannot be `True`"),
    (
        {"gap": "loss", "beta_scope": "tensor"},
        ValueError,
        r'gap="loss" needs beta_scope="global", not \'tensor\'',
    ),
    ({"backend": "cpu", "fused": False}, ValueError, r"backend='cpu' contradicts fused=False"),
    ({"backend": "cpu", "foreach": True}, ValueError, r"backend='cpu' contradicts foreach=True"),
    (
        {"backend": "foreach", "foreach": False},
        ValueError,
        r"backend='foreach' contradicts foreach=False",
    ),
    (
        {"backend": "foreach", "fused": True},
        ValueError,
        r"backend='foreach' contradicts fused=True",
    ),
    (
        {"backend": "reference", "foreach": True},
        ValueError,
        r"backend='reference' contradicts foreach=True",
    ),
    (
        {"backend": "reference", "fused": True},
        ValueError,
        r"backend='reference' contradicts fused=True",
    ),
]

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", ["cpu", "foreach", "reference"])


def parameter(*shape, grad=True, **kwargs):
    param = Parameter(torch.randn(*shape, **kwargs))
    if grad:
        param.grad = torch.randn_like(param)
    return param


def stepped(cls, *param_groups, steps=2, **options):
    optimizer = cls(list(param_groups) or [parameter(3, 2), parameter(4)], **options)
    for _ in range(steps):
        optimizer.step(lambda: 1.0)
    return optimizer


# ---- construction and add_param_group ---------------------------------------------


@pytest.mark.parametrize(("cls", "option", "value", "error", "message"), BAD_OPTIONS)
def test_bad_option_is_refused_at_construction(cls, option, value, error, message):
    with pytest.raises(error, match=message):
        cls([parameter(2)], **{option: value})
    with pytest.raises(error, match=message):
        cls([{"params": [parameter(2)]}, {"params": [parameter(2)], option: value}])


@pytest.mark.parametrize(("cls", "option", "value", "error", "message"), BAD_OPTIONS)
def test_bad_option_is_refused_by_add_param_group(cls, option, value, error, message):
    optimizer = stepped(cls)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter(2)], option: value})
    assert snapshot(optimizer) == before


@both
@pytest.mark.parametrize(("options", "error", "message"), CONTRADICTIONS)
def test_contradicting_options_are_refused(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls([parameter(2)], **options)
    optimizer = stepped(cls)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter(2)], **options})
    assert snapshot(optimizer) == before


@both
@pytest.mark.parametrize("option", ["betas", "momentum", "amsgrad", "differentiable"])
def test_option_of_another_optimizer_is_refused(cls, option):
    if option == "betas" and cls is AMAdamW:
        option = "beta_max"
    with pytest.raises(TypeError, match=option):
        cls([parameter(2)], **{option: 0.9})


@both
def test_parameters_of_other_dtypes_are_refused(cls):
    message = f"{cls.__name__} optimizes float32.*not torch.float8_e4m3fn"
    param = torch.zeros(3, dtype=torch.float8_e4m3fn, requires_grad=True)
    with pytest.raises(TypeError, match=message):
        cls([param])
    optimizer = stepped(cls)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": [parameter(2), param]})
    assert snapshot(optimizer) == before


@both
@every_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_frozen_parameters_may_be_of_any_dtype(cls, backend, dtype):
    """Quantized weights, say, beside those that are trained."""
    frozen, param = torch.ones(3).to(dtype), parameter(2)
    optimizer = cls([frozen, param], backend=backend)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert frozen not in optimizer.state
    frozen.grad = torch.ones_like(frozen)
    assert_step_raises_and_changes_nothing(optimizer, TypeError, f"optimizes float32.*not {dtype}")


@both
def test_parameters_that_torch_refuses_are_refused(cls):
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])
    with pytest.raises(ValueError, match="non-leaf"):
        cls([parameter(2) * 2])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        cls(parameter(2))
    optimizer = stepped(cls)
    known = optimizer.param_groups[0]["params"][0]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [parameter(2), known]})
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([parameter(2)])
    assert snapshot(optimizer) == before


# ---- backends that are not there --------------------------------------------------

ABSENT = "the C++ extension was not compiled; reinstall with a C++ compiler at hand"


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(ops, "unavailable", ABSENT)
    monkeypatch.setattr(ops, "extension", None)
    monkeypatch.setattr(cpu_library, "unavailable", ABSENT)


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cpu"}, f"backend='cpu' is not available: {ABSENT}"),
        ({"fused": True}, f"fused=True: no fused backend is available (cpu: {ABSENT}; cuda: "),
    ],
)
def test_absent_backend_is_an_error_never_a_fallback(cls, options, message, request):
    message = re.escape(message)
    optimizer = stepped(cls, **options)
    request.getfixturevalue("no_extension")
    with pytest.raises(RuntimeError, match=message):
        cls([parameter(2)], **options)
    # An optimizer made where it was there: loaded from a pickle, for one.
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert snapshot(optimizer) == before
    plain = stepped(cls, foreach=False, fused=False)
    before = snapshot(plain)
    with pytest.raises(RuntimeError, match=message):
        plain.add_param_group({"params": [parameter(2)], "foreach": None, "fused": None, **options})
    assert snapshot(plain) == before


@pytest.mark.parametrize("is_source", [True, False])
def test_source_without_the_extension_is_told_from_an_installed_package(tmp_path, is_source):
    package = Path(ops.__file__).parents[1]
    without = shutil.ignore_patterns("_C*", "__pycache__", "_cuda*", "_cpu*")
    shutil.copytree(package, tmp_path / package.name, ignore=without)
    if is_source:
        (tmp_path / "setup.py").touch()
    code = (
        "import sys\n"
        # An editable installation would find the extension all the same.
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import torch\n"
        "from adamem_fused.backends import cpu, ops\n"
        "assert cpu.unavailable(torch.device('cpu')) == ops.unavailable\n"
        "print(ops.unavailable)"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = f"this is the package's source in {tmp_path}" if is_source else ABSENT
    assert done.stdout.startswith(expected)


@both
def test_a_frozen_parameter_is_not_asked_for_its_backend(cls):
    frozen = torch.nn.Parameter(torch.ones(2, device="meta"), requires_grad=False)
    fused = cpu.unavailable(torch.device("cpu")) is None
    optimizer = cls([frozen, parameter(3)], fused=fused)
    assert optimizer._step_supports_amp_scaling == fused


@both
@pytest.mark.usefixtures("no_extension")
def test_default_backend_does_without_the_extension(cls):
    optimizer = stepped(cls)
    assert all(state["step"] == 2 for state in optimizer.state.values())
    assert not optimizer._step_supports_amp_scaling


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cpu"}, r"'cpu' is not available: .*these are on meta"),
        ({"fused": True}, r"fused=True: no fused backend is available .*these are on meta"),
    ],
)
def test_where_a_meta_parameter_is_to_be_is_asked_at_the_first_step(cls, options, message):
    """Deferred initialisation makes the optimizer first, and the tensors after it."""
    module = torch.nn.Linear(3, 2, device="meta")
    optimizer = cls(module.parameters(), **options)
    assert optimizer._step_supports_amp_scaling
    for param in module.parameters():
        param.grad = torch.empty_like(param)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    for param in module.parameters():
        materialised = Parameter(torch.randn(param.shape))
        materialised.grad = torch.randn(param.shape)
        param.grad = None
        torch.utils.swap_tensors(param, materialised)
    optimizer.step()
    assert [state["step"].item() for state in optimizer.state.values()] == [1, 1]


# ---- a step that raises -----------------------------------------------------------


def assert_step_raises_and_changes_nothing(optimizer, error, message, closure=None):
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(closure)
    assert snapshot(optimizer) == before


@both
@every_backend
@pytest.mark.parametrize("steps", [0, 2])
def test_sparse_gradient(cls, backend, steps):
    sparse = parameter(4, 3, grad=False)
    groups = [{"params": [parameter(2, 3), parameter(5)]}, {"params": [parameter(3), sparse]}]
    optimizer = stepped(cls, *groups, steps=steps, backend=backend)
    dense = torch.randn(4, 3)
    sparse.grad = dense.to_sparse()
    assert_step_raises_and_changes_nothing(
        optimizer, RuntimeError, f"{cls.__name__} does not support sparse gradients"
    )
    sparse.grad = dense
    optimizer.step()
    assert [state["step"].item() for state in optimizer.state.values()][:3] == [steps + 1] * 3


@both
@every_backend
@pytest.mark.parametrize("lr", [NAN, INF, -1.0, torch.tensor(NAN), torch.tensor(-1.0), None])
@pytest.mark.parametrize("steps", [0, 2])
def test_lr_that_became_bad(cls, backend, lr, steps):
    groups = [{"params": [parameter(3)]}, {"params": [parameter(2), parameter(2, 2)]}]
    optimizer = stepped(cls, *groups, steps=steps, backend=backend)
    optimizer.param_groups[1]["lr"] = lr
    value = lr.item() if isinstance(lr, torch.Tensor) else lr
    assert_step_raises_and_changes_nothing(optimizer, ValueError, f"learning rate: {value}")


@both
def test_lr_tensor_that_became_bad_in_place(cls):
    lr = torch.tensor(0.1)
    optimizer = stepped(cls, lr=lr)
    lr.fill_(NAN)
    assert_step_raises_and_changes_nothing(optimizer, ValueError, "learning rate: nan")


@pytest.mark.parametrize(
    ("cls", "option", "value", "message"),
    [
        (AMAdamW, "betas", (1.5, 0.999), r"index 0: 1\.5"),
        (AMAdamW, "betas", (0.9, NAN), "index 1: nan"),
        (AMAdamW, "eps", NAN, "epsilon value: nan"),
        (AMAdamW, "weight_decay", NAN, "weight_decay value: nan"),
        (AMAdamW, "memory_lambda", -1.0, r"memory_lambda value: -1\.0"),
        (AMAdamW, "memory_plane", "flat", "memory_plane: 'flat'"),
        (AMAdamW, "beta_scope", "layer", "beta_scope: 'layer'"),
        (AMSGD, "beta_max", 1.5, r"beta_max value: 1\.5"),
        (AMSGD, "weight_decay", NAN, "weight_decay value: nan"),
        (AMSGD, "memory_lambda", NAN, "memory_lambda value: nan"),
        (AMSGD, "gap", "losses", "gap: 'losses'"),
        (AMSGD, "backend", "cuda_graph", "backend: 'cuda_graph'"),
    ],
)
def test_option_that_became_bad(cls, option, value, message):
    groups = [{"params": [parameter(3)]}, {"params": [parameter(2)]}]
    optimizer = stepped(cls, *groups)
    optimizer.param_groups[1][option] = value
    assert_step_raises_and_changes_nothing(optimizer, ValueError, message)


@both
def test_gap_loss_needs_a_closure(cls):
    optimizer = stepped(cls, gap="loss", beta_scope="global")
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.randn_like(param)
    assert_step_raises_and_changes_nothing(
        optimizer, RuntimeError, r'gap="loss" needs the loss: call step\(closure\)'
    )
    assert_step_raises_and_changes_nothing(
        optimizer, RuntimeError, r'gap="loss" needs the loss', closure=lambda: None
    )


@both
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("loss", [torch.tensor([1.0, 2.0]), "1.0"])
def test_gap_loss_needs_one_number(cls, steps, loss):
    optimizer = stepped(cls, steps=steps, gap="loss", beta_scope="global")
    message = f"needs a loss of one number, and the closure gave {re.escape(repr(loss))}"
    assert_step_raises_and_changes_nothing(optimizer, ValueError, message, closure=lambda: loss)


@both
@pytest.mark.parametrize("steps", [0, 2])
def test_closure_that_raises(cls, steps):
    optimizer = stepped(cls, steps=steps)

    def closure():
        raise ArithmeticError("no loss today")

    assert_step_raises_and_changes_nothing(optimizer, ArithmeticError, "no loss today", closure)


@both
@every_backend
@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 3), torch.zeros(3, 1)])
def test_state_of_the_wrong_shape(cls, backend, wrong):
    groups = [{"params": [parameter(3)]}, {"params": [parameter(3, 2), parameter(4)]}]
    optimizer = stepped(cls, *groups, backend=backend)
    optimizer.add_param_group({"params": [parameter(2)]})  # never stepped
    param = optimizer.param_groups[1]["params"][0]
    for name in cls.memories:
        kept = optimizer.state[param][name]
        optimizer.state[param][name] = wrong
        assert_step_raises_and_changes_nothing(
            optimizer, ValueError, rf"{name} of tensor 1 has shape \[.*its parameter \[3, 2\]"
        )
        optimizer.state[param][name] = kept
    optimizer.step()


@both
@pytest.mark.parametrize("first", ["cpu", "foreach", "reference"])
@pytest.mark.parametrize("second", ["cpu", "foreach", "reference"])
def test_error_in_one_backend_leaves_the_other_backends_tensors_alone(cls, first, second):
    groups = [
        {"params": [parameter(3)], "backend": first},
        {"params": [parameter(3, 2)], "backend": second},
    ]
    optimizer = stepped(cls, *groups)
    for group in optimizer.param_groups:
        param = group["params"][0]
        kept = dict(optimizer.state[param])
        for name in cls.memories:
            optimizer.state[param][name] = torch.zeros(7)
        assert_step_raises_and_changes_nothing(optimizer, ValueError, r"has shape \[7\]")
        optimizer.state[param].update(kept)
    optimizer.step()


@both
@every_backend
def test_parameter_that_outgrew_its_gradient_and_state(cls, backend):
    grown = parameter(3)
    optimizer = stepped(cls, {"params": [parameter(2)]}, {"params": [grown]}, backend=backend)
    grown.data = torch.randn(4)
    assert_step_raises_and_changes_nothing(
        optimizer, ValueError, r"of tensor 1 has shape \[3\], its parameter \[4\]"
    )


@both
def test_failed_first_step_of_a_parameter_keeps_the_previous_loss(cls):
    """The loss of gap="loss" lies with the first parameter, which may have seen no step."""
    late, sparse = parameter(2, grad=False), parameter(4, 2)
    groups = [{"params": [late]}, {"params": [sparse]}]
    optimizer = stepped(cls, *groups, gap="loss", beta_scope="global")
    late.grad, sparse.grad = torch.randn(2), torch.randn(4, 2).to_sparse()
    assert_step_raises_and_changes_nothing(
        optimizer, RuntimeError, "sparse", closure=lambda: torch.tensor(1.0)
    )


# ---- loading ----------------------------------------------------------------------


STATE_NAMES = [
    pytest.param(cls, name, id=f"{cls.__name__}-{name}")
    for cls in OPTIMIZERS
    for name in (*cls.memories, *cls.scalars)
]


@pytest.mark.parametrize(("cls", "name"), STATE_NAMES)
def test_loaded_state_of_the_wrong_shape(cls, name):
    optimizer = stepped(cls)
    saved = stepped(cls).state_dict()
    saved["state"][0][name] = torch.zeros(5)
    before = snapshot(optimizer)
    shape = "3, 2" if name in cls.memories else ""
    message = rf"loaded state {name} has shape \[5\].*\[3, 2\] it has to be \[{shape}\]"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(("cls", "name"), STATE_NAMES)
def test_loaded_state_that_lacks_a_part(cls, name):
    optimizer = stepped(cls)
    saved = stepped(cls).state_dict()
    del saved["state"][0][name]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"loaded state has no {name}"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@both
def test_loaded_state_that_is_no_tensor(cls):
    for name in cls.memories:
        optimizer = stepped(cls)
        saved = stepped(cls).state_dict()
        saved["state"][1][name] = [0.0, 0.0, 0.0, 0.0]
        before = snapshot(optimizer)
        with pytest.raises(TypeError, match=f"loaded state {name} is a list, not a tensor"):
            optimizer.load_state_dict(saved)
        assert snapshot(optimizer) == before


@both
def test_loaded_groups_that_do_not_match(cls):
    optimizer = stepped(cls)
    before = snapshot(optimizer)
    two_groups = stepped(cls, {"params": [parameter(3, 2)]}, {"params": [parameter(4)]})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two_groups.state_dict())
    three_params = stepped(cls, {"params": [parameter(3, 2), parameter(4), parameter(1)]})
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(three_params.state_dict())
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    ("cls", "option", "value", "error", "message"),
    # Those that say how to compute are not taken from a checkpoint.
    [
        row
        for row in BAD_OPTIONS
        if row.values[1] not in ("capturable", "foreach", "fused", "backend")
    ],
)
def test_bad_option_is_refused_by_load_state_dict(cls, option, value, error, message):
    optimizer = stepped(cls)
    saved = stepped(cls).state_dict()
    saved["param_groups"][0][option] = value
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


# ---- the backends' own checks -----------------------------------------------------


def make_batch(cls, shapes=((3,), (2, 2))):
    tensors = [[torch.randn(shape) for shape in shapes] for _ in range(2 + len(cls.memories))]
    scalars = [[torch.ones(()) for _ in shapes] for _ in cls.scalars]
    if cls is AMAdamW:
        hyper = AdamWHyper(0.1, 0.89, 0.999, 1e-8, 0.01, 0.1, False, False, False)
        batch = AdamWBatch(*tensors, *scalars, [hyper], [len(shapes)], [False])
        batch.exp_avg_sqs = [t.abs() for t in batch.exp_avg_sqs]
        return batch
    hyper = SGDHyper(0.1, 0.9, 0.01, 0.1, False, False, False)
    return SGDBatch(*tensors, *scalars, [hyper], [len(shapes)], [False])


@both
@pytest.mark.parametrize("backend", [cpu, foreach, reference], ids=lambda module: module.name)
@pytest.mark.parametrize("operation", ["begin", "finish"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2), r"has shape \[2\], its parameter \[2, 2\]"),
        (torch.ones(2, 2, device="meta"), "is on meta, its parameter on "),
    ],
    ids=["shape", "device"],
)
def test_backend_refuses_tensors_that_do_not_match(cls, backend, operation, wrong, message):
    kind = "adamw" if cls is AMAdamW else "sgd"
    arguments = (None, None) if operation == "begin" else (None, None, None)
    memories = list(make_batch(cls).memories)
    for name in ("grad", *memories):
        batch = make_batch(cls)
        tensors = batch.grads if name == "grad" else batch.memories[name]
        tensors[1] = wrong
        before = [[bits(t) for t in ts if not t.is_meta] for ts in batch.lists()]
        with pytest.raises(ValueError, match=f"{name} of tensor 1 {message}"):
            getattr(backend, f"{kind}_{operation}")(batch, *arguments)
        after = [[bits(t) for t in ts if not t.is_meta] for ts in batch.lists()]
        assert all(
            torch.equal(a, b)
            for xs, ys in zip(before, after, strict=True)
            for a, b in zip(xs, ys, strict=True)
        )


@both
@pytest.mark.parametrize("operation", ["begin", "finish"])
def test_operators_refuse_lists_of_different_lengths(cls, operation):
    kind = "adamw" if cls is AMAdamW else "sgd"
    arguments = (None, None) if operation == "begin" else (None, None, None)
    for i in range(1, len(make_batch(cls).lists())):
        batch = make_batch(cls)
        batch.lists()[i].pop()
        before = [[bits(t) for t in ts] for ts in batch.lists()]
        with pytest.raises(ValueError, match=r"length|holds 1"):
            getattr(cpu, f"{kind}_{operation}")(batch, *arguments)
        after = [[bits(t) for t in ts] for ts in batch.lists()]
        assert all(
            torch.equal(a, b)
            for xs, ys in zip(before, after, strict=True)
            for a, b in zip(xs, ys, strict=True)
        )


@both
def test_state_that_could_not_be_made_whole_is_not_there(cls, monkeypatch):
    param = parameter(3)
    optimizer = cls([param])
    full = torch.full

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory today")

    monkeypatch.setattr(torch, "full", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert not optimizer.state.get(param)
    monkeypatch.setattr(torch, "full", full)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


@both
def test_a_conjugated_parameter_is_refused(cls):
    """Its elements cannot be written as pairs of reals: the step would be lost."""
    param = Parameter(torch.randn(3, dtype=torch.complex64).conj())
    param.grad = torch.randn(3, dtype=torch.complex64)
    assert param.is_conj()
    optimizer = cls([param])
    before = param.detach().resolve_conj().clone()
    with pytest.raises(RuntimeError, match="conj"):
        optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state.get(param)


# ---- what a step that raises leaves ------------------------------------------------


@both
@every_backend
@pytest.mark.parametrize(
    "bad", [3, torch.tensor(1), torch.ones(2)], ids=["number", "int64", "two elements"]
)
def test_a_bad_scalar_raises_and_nothing_changes(cls, backend, bad):
    optimizer = stepped(cls, backend=backend)
    optimizer.state[optimizer.param_groups[0]["params"][-1]]["step"] = bad
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    with pytest.raises(
        (TypeError, ValueError),
        match=r"scalar state|step of tensor|state step has to be a tensor",
    ):
        optimizer.step()
    assert snapshot(optimizer) == before


@both
def test_only_the_state_that_a_refused_step_has_made_is_removed(cls):
    kept, new, sparse = parameter(3), parameter(2), parameter(4, 2)
    optimizer = cls([kept, new, sparse])
    kept.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[kept]["step"].zero_()
    kept.grad, new.grad = torch.ones(3), torch.ones(2)
    sparse.grad = torch.ones(4, 2).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert snapshot(optimizer) == before


@both
def test_loaded_memory_of_the_wrong_kind_is_refused(cls):
    name = cls.memories[0]
    for dtype, other in ((torch.float32, torch.complex64), (torch.complex64, torch.float32)):
        param = torch.ones(3, dtype=dtype, requires_grad=True)
        optimizer = cls([param])
        param.grad = torch.ones_like(param)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0][name] = torch.ones(3, dtype=other)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=f"{name} is {other}.*{dtype}"):
            optimizer.load_state_dict(saved)
        assert snapshot(optimizer) == before
