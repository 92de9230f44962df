"""The CPU kernels through ctypes: the bits, versions and errors of the compiled extension."""

import importlib
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_ordinary
import test_tracing
import test_versions
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_same_bits,
    copy_state,
    gradient,
    make_optimizer,
    parameters,
    random_tensor,
    set_gradients,
)
from snapshot import snapshot
from test_low_precision import FORMATS, SHAPES

from adamem_fused import AMAdamW
from adamem_fused.__main__ import main
from adamem_fused.backends import cpu, cpu_library, operators, ops

pytestmark = pytest.mark.skipif(ops.extension is None, reason=str(ops.unavailable))
both = pytest.mark.parametrize("cls", OPTIMIZERS)

ROOT = Path(__file__).parents[1]
# Small tensors, some with rows; one in chunks; ones without elements and without dimensions.
SIZES = [(3, 16), (), (5, 4, 4), (9, 1000), (0,), (0, 32), (33,), (2, 33_000)]


@contextmanager
def without_extension():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "extension", None)
        patch.setattr(ops, "unavailable", "it is hidden")
        yield


def assert_same_steps(ours, theirs, steps=3, prepare=lambda optimizer, step: None):
    """ours by ctypes, theirs with the extension."""
    for step in range(steps):
        for optimizer in (ours, theirs):
            set_gradients(optimizer, step=step)
            prepare(optimizer, step)
        with without_extension():
            ours.step(lambda step=step: 1.0 / (1 + step))
        theirs.step(lambda step=step: 1.0 / (1 + step))
        assert_same_bits(ours, theirs)


def two(cls, groups, **options):
    return [make_optimizer(cls, groups, "cpu", **options) for _ in range(2)]


# ---- the same bits ----------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "options",
    [
        {"beta_scope": "tensor"},
        {"beta_scope": "row", "memory_plane": "anchored"},
        {"beta_scope": "global"},
        {"beta_scope": "global", "gap": "loss"},
        {"beta_scope": "tensor", "max_grad_norm": 0.5},
    ],
    ids=["tensor", "row", "global", "loss", "clipped"],
)
def test_any_dtype_and_scope(cls, dtype, options):
    groups = [
        Group(SIZES, dtype, {"weight_decay": 0.1, "lr": torch.tensor(0.02)}),
        Group([(7,), (600,)], dtype, {"maximize": True, "memory_lambda": 0.5}),
    ]
    assert_same_steps(*two(cls, groups, **options))


@both
def test_groups_of_both_scopes_and_thousands_of_tensors(cls):
    groups = [
        Group([(i % 9, 16) for i in range(300)], options={"beta_scope": "row"}),
        Group([(i % 7,) for i in range(300)], options={"beta_scope": "global"}),
        Group([]),
        Group([(i % 5, 3) for i in range(300)], torch.bfloat16, {"beta_scope": "tensor"}),
    ]
    assert_same_steps(*two(cls, groups), steps=2)


@both
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_stored_in_few_bits(cls, scope, kind):
    dtype, options = FORMATS[kind]
    groups = [Group(SHAPES, dtype, options), Group([(5, 16)])]
    assert_same_steps(*two(cls, groups, beta_scope=scope, weight_decay=0.1), steps=3)


def channels_last(t):
    return t.to(memory_format=torch.channels_last)


def strided(t):
    return torch.stack([t, t], -1)[..., 0]


def reversed_dims(t):
    return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


@both
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(cls, scope, dtype):
    """Parameters, gradients and memories of all layouts beside one another."""
    layouts = (torch.clone, channels_last, strided, reversed_dims)
    optimizers = []
    for _ in range(2):
        params = [
            layout(random_tensor((6, 5, 4, 3), dtype, seed)).requires_grad_()
            for seed, layout in enumerate(layouts * len(layouts))
        ]
        optimizers.append(cls(params, backend="cpu", beta_scope=scope))

    def prepare(optimizer, step):
        for i, param in enumerate(parameters(optimizer)):
            layout = layouts[i // len(layouts)]
            param.grad = layout(gradient(param, step, index=i))
            for name in cls.memories if step == 2 else ():
                optimizer.state[param][name] = layouts[(i + 1) % len(layouts)](
                    optimizer.state[param][name]
                )

    assert_same_steps(*optimizers, prepare=prepare)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_of_another_dtype(cls, dtype):
    ours, theirs = two(cls, [Group([(3, 16), (70, 100)])], beta_scope="tensor")

    def prepare(optimizer, step):
        if step != 1:
            return
        for own in optimizer.state.values():
            # bfloat16 in a batch that has nothing packed.
            own |= {name: own[name].to(dtype) for name in cls.memories}
            own |= {name: own[name].double() for name in ("beta", "prev_lr", "step")}

    assert_same_steps(ours, theirs, prepare=prepare)
    assert all(own[cls.memories[0]].dtype == dtype for own in ours.state.values())


@both
def test_a_gradient_that_is_its_parameter(cls):
    ours, theirs = two(cls, [Group([(3, 4), (50,)])], beta_scope="tensor")

    def prepare(optimizer, step):
        for param in parameters(optimizer)[step % 2 :]:
            param.grad = param.detach()

    assert_same_steps(ours, theirs, prepare=prepare)


@both
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_scaled_gradients_and_skipped_steps(cls, scope):
    def prepare(optimizer, step):
        optimizer.grad_scale = torch.tensor(8.0)
        optimizer.found_inf = torch.tensor(float(step == 2))

    ours, theirs = two(cls, [Group(SIZES)], beta_scope=scope)
    assert_same_steps(ours, theirs, prepare=prepare)
    steps = {float(own["step"]) for own in ours.state.values()}
    assert 2.0 in steps and 3.0 not in steps


@both
def test_steps_that_are_none(cls):
    """lr and gradients of zero before the first step: nothing is counted, and nothing stored."""
    ours, theirs = two(cls, [Group([(4, 16), (5,)])], lr=0.0)

    def prepare(optimizer, step):
        first = parameters(optimizer)[step % 2]
        first.grad = strided(torch.zeros_like(first))
        if step == 2:
            optimizer.param_groups[0]["lr"] = 0.1

    assert_same_steps(ours, theirs, prepare=prepare)


@both
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_two_halves(cls, scope, threads):
    torch.set_num_threads(threads)  # which conftest.py sets back
    groups = [Group([*SIZES, (300, 200)]), Group([(5, 5)], torch.bfloat16)]
    ours, theirs = two(cls, groups, beta_scope=scope)
    assert_same_steps(ours, theirs, steps=2)
    set_gradients(ours, theirs, step=2)
    strided_grad = parameters(ours)[0], parameters(theirs)[0]
    for param in strided_grad:
        param.grad = strided(param.grad)
    kind = "adamw" if cls is AMAdamW else "sgd"
    begin, finish = (getattr(cpu, f"{kind}_{half}") for half in ("begin", "finish"))
    (own,), (other,) = ours._collect(), theirs._collect()
    with without_extension():
        rows = begin(own.batch, None, None)
    expected = begin(other.batch, None, None)
    assert torch.equal(rows, expected) and rows.dtype == torch.float64
    assert_same_bits(ours, theirs)
    spread = torch.stack([expected * 0.5, expected], -1)[..., 0]
    with without_extension():
        finish(own.batch, spread, None, None)
    finish(other.batch, spread, None, None)
    assert_same_bits(ours, theirs)


def test_squared_norms():
    grads = [random_tensor((size,), seed=size) for size in (0, 1, 17, 5000, 70_000)]
    grads += [own.to(dtype) for own in grads for dtype in (torch.float64, torch.bfloat16)]
    grads += [strided(grads[3]), channels_last(random_tensor((6, 5, 4, 3))), torch.tensor(2.0)]
    grads += [torch.ones(3).expand(5, 3), random_tensor((4, 3)).t().requires_grad_()]
    expected = ops.extension.squared_norms(grads)
    assert torch.equal(cpu_library.squared_norms(grads), expected)
    assert cpu_library.squared_norms([]).shape == (0,)


@both
def test_operators_over_it(cls):
    """As they are called for a step that torch has traced; a row, a tensor lr, packed state."""
    dtype, options = FORMATS["rounded_int8"]
    groups = [Group([(4, 128)], dtype, options), Group([(3,)], options={"lr": torch.tensor(0.1)})]
    ours, theirs = two(cls, groups, beta_scope="row")
    assert_same_steps(ours, theirs, steps=1)
    set_gradients(ours, theirs, step=1)
    name = "adamw" if cls is AMAdamW else "sgd"
    for own, other in zip(ours._collect(), theirs._collect(), strict=True):
        args, expected = (cpu._arguments(work.batch, None, None) for work in (own, other))
        begin = name + ("_begin_" if cls is AMAdamW else "_begin")
        rows = operators.CPU[begin](*args)
        assert torch.equal(rows, getattr(ops.extension, begin)(*expected))
        operators.CPU[f"{name}_finish_"](*args, rows)
        getattr(ops.extension, f"{name}_finish_")(*expected, rows)
    assert_same_bits(ours, theirs)


# ---- versions ---------------------------------------------------------------------------


@both
def test_what_is_written_rises_and_nothing_else(cls):
    groups = [Group([(3, 4), (5,)]), Group([(2, 64)], *FORMATS["remainder_int8"])]
    optimizer, _ = two(cls, groups, lr=0.0, beta_scope="tensor")
    idle = parameters(optimizer)[1]
    with without_extension():
        set_gradients(optimizer, step=0)
        idle.grad.zero_()
        optimizer.step()
        tensors = {
            (i, name): tensor
            for i, param in enumerate(parameters(optimizer))
            for name, tensor in {
                "param": param, "grad": param.grad, **optimizer.state[param]
            }.items()
        }  # fmt: skip
        before = {key: tensor._version for key, tensor in tensors.items()}
        optimizer.step()
    for (i, name), tensor in tensors.items():
        rises = i != 1 and name != "grad"
        assert (tensor._version > before[i, name]) == rises, (i, name)


# ---- what is refused --------------------------------------------------------------------


def other_dtype(optimizer, param):
    optimizer.state[param]["step"] = optimizer.state[param]["step"].long()


def many_steps(optimizer, param):
    optimizer.state[param]["prev_lr"] = torch.zeros(2)


def betas_that_do_not_fit(optimizer, param):
    optimizer.state[param]["beta"] = torch.zeros(3)


def strided_betas(optimizer, param):
    optimizer.state[param]["beta"] = strided(torch.zeros(4))


def other_shape(optimizer, param):
    name = optimizer.memories[0]
    optimizer.state[param][name] = optimizer.state[param][name].t()


def codes_as_memory(optimizer, param):
    name = optimizer.memories[0]
    optimizer.state[param][name] = optimizer.state[param][name].to(torch.float8_e5m2).long()


def on_meta(optimizer, param):
    name = optimizer.memories[0]
    optimizer.state[param][name] = optimizer.state[param][name].to("meta")


def overlapping(optimizer, param):
    name = optimizer.memories[0]
    optimizer.state[param][name] = torch.zeros(16).expand(4, 16)


SPOILERS = [
    other_dtype, many_steps, betas_that_do_not_fit, strided_betas, other_shape, codes_as_memory,
    on_meta, overlapping,
]  # fmt: skip


@both
@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_what_the_extension_refuses(cls, spoil, is_known):
    """With the same error, and before anything has changed."""
    scope = "row" if "betas" in spoil.__name__ else "tensor"
    ours, theirs = two(cls, [Group([(5,), (4, 16)])], beta_scope=scope)
    set_gradients(ours, theirs, step=0)
    theirs.step()
    copy_state(theirs, ours)
    if is_known:
        assert_same_steps(ours, theirs, steps=1)
    for optimizer in (ours, theirs):
        spoil(optimizer, parameters(optimizer)[1])
    with pytest.raises((TypeError, ValueError, RuntimeError)) as expected:
        theirs.step()
    before = snapshot(ours) if spoil is not on_meta else None
    with without_extension(), pytest.raises(expected.type) as found:
        ours.step()
    assert found.type is expected.type
    # torch's own words, and the names that C++ has for dtypes, apart.
    if spoil is not overlapping:
        assert str(found.value).split()[:5] == str(expected.value).split()[:5]
    assert before is None or snapshot(ours) == before


def test_rows_of_another_shape_are_refused():
    optimizer, _ = two(AMAdamW, [Group([(5,), (4, 16)])])
    set_gradients(optimizer, step=0)
    (work,) = optimizer._collect()
    for rows in (torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="rows has to be a float64"):
            cpu_library.adamw_finish(work.batch, rows, None, None)


def test_lists_that_do_not_fit_are_refused():
    optimizer, _ = two(AMAdamW, [Group([(5,), (4, 16)])])
    set_gradients(optimizer, step=0)
    for change in ({"grads": []}, {"group_sizes": [3]}, {"group_sizes": [3, -1]}):
        (work,) = optimizer._collect()
        vars(work.batch).update(change)
        with pytest.raises(ValueError, match=r"differ in length|do not add up"):
            cpu_library.adamw_finish(work.batch, None, None, None)


# ---- the library ------------------------------------------------------------------------


def test_a_library_of_another_interface_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_library, "INTERFACE", cpu_library.INTERFACE + 1)
    library, reason = cpu_library.load(cpu_library.LIBRARY)
    assert library is None
    assert f"interface {cpu_library.INTERFACE - 1}, not {cpu_library.INTERFACE}" in reason


def test_what_is_no_library_is_refused(tmp_path):
    for path, words in (
        (Path(__file__), "invalid ELF header"),
        (Path(torch._C.__file__), "adamem_cpu_interface"),
    ):
        library, reason = cpu_library.load(path)
        assert library is None and "does not load" in reason and words in reason
    assert cpu_library.load(tmp_path / "_cpu.so") == (None, ops.not_compiled())


def test_the_interface_is_that_of_the_header():
    text = (ROOT / "csrc" / "cpu" / "library.h").read_text()
    assert f"constexpr int64_t kInterface = {cpu_library.INTERFACE};" in text
    for row, name in ((cpu_library._StepTensor, "Step"), (cpu_library._PackedTensor, "Packed")):
        # Pointers and words of 8 bytes: each declared name, or as many as an array has.
        body = text[text.index(f"struct {name}Tensor {{") :]
        lines = [line.split("//")[0].strip() for line in body[: body.index("};")].split("\n")[1:]]
        declared = " ".join(lines).replace("const ", "").split(";")[:-1]
        sizes = [
            int(one.split("[")[1].rstrip("] ")) if "[" in one else 1
            for line in declared
            for one in line.split(",")
        ]
        assert sum(sizes) == len(row._fields), name


# ---- without the extension from the start -----------------------------------------------


@pytest.fixture
def hidden():
    """The extension hidden, its operators' kernels too."""
    library = torch.library.Library("adamem_fused", "IMPL")
    with without_extension(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, kernel in operators.CPU.items():
            library.impl(name, kernel, "CPU")
        yield
    library._destroy()


@both
@pytest.mark.usefixtures("hidden")
def test_a_recorded_step(cls):
    for scope in ("row", "global"):
        options = {"beta_scope": scope}
        test_tracing.test_a_recorded_step_is_the_step(cls, "cpu", options, "symbolic")


@both
@pytest.mark.usefixtures("hidden")
def test_a_compiled_step(cls):
    test_versions.test_a_compiled_step(cls, "aot_eager")


@both
@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_dispatch_mode_sees_the_operator(cls, scope):
    test_ordinary.test_a_dispatch_mode_sees_the_operator(cls, scope)


@both
@pytest.mark.usefixtures("hidden")
def test_a_subclass_goes_through_the_dispatcher(cls):
    plain, other = two(cls, [Group([(4,), (3, 2)])], beta_scope="tensor")
    for step in range(2):
        set_gradients(plain, other, step=step)
        parameters(other)[0].grad = parameters(other)[0].grad.as_subclass(Subclass)
        plain.step()
        other.step()
    assert_same_bits(other, plain)


@both
@pytest.mark.usefixtures("hidden")
def test_a_lazy_negation_is_not_taken_for_its_memory(cls):
    """torch's dispatcher refuses it, as with the extension."""
    optimizer, _ = two(cls, [Group([(4,)])])
    set_gradients(optimizer, step=0)
    optimizer.step()
    (own,) = optimizer.state.values()
    own[cls.memories[0]] = torch._neg_view(own[cls.memories[0]])
    with pytest.raises(RuntimeError, match="negation"):
        optimizer.step()


class Subclass(torch.Tensor):
    pass


def test_a_process_without_the_extension():
    code = (
        "import without_extension, sys, torch\n"
        "from adamem_fused import AMAdamW\n"
        "print({'adamem_fused._C', 'torch._dynamo'} & {*sys.modules})\n"
        "x = torch.ones(3, requires_grad=True)\n"
        "x.grad = torch.ones(3)\n"
        "AMAdamW([x], backend='cpu').step()\n"
        "assert (x < 1).all() and torch.ops.adamem_fused.squared_norms([x.grad]).item() == 3"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "set()\n", done.stdout + done.stderr


def test_the_command_says_how_the_kernels_are_called(capsys):
    kernels = f"cpu        available: {cpu.kernels()} kernels, called by "
    main()
    assert f"{kernels}the C++ extension\n" in capsys.readouterr().out
    with without_extension():
        main()
    expected = f"{kernels}ctypes, which is slower with many small tensors: it is hidden\n"
    assert expected in capsys.readouterr().out


def test_the_operators_are_declared_once():
    """A module that is imported anew finds them, and the extension."""
    extension = ops.extension
    importlib.reload(ops)
    operators.register()
    assert ops.extension is extension and ops.unavailable is None


@pytest.mark.parametrize(
    ("there", "suffixes", "reason"),
    [
        ([], [".abi3.so"], "C++ extension was not compiled"),
        (["2.9", "2.10"], [".abi3.so"], "was compiled against torch 2.9, 2.10, and this is torch"),
        (["2.9"], [".so"], "needs Python's stable ABI, which this Python does not have"),
        (["this"], [".abi3.so"], f"does not load with torch {torch.__version__} ("),
    ],
)
def test_why_there_is_no_extension(monkeypatch, tmp_path, there, suffixes, reason):
    monkeypatch.delitem(sys.modules, "adamem_fused._C")
    monkeypatch.setattr(ops, "PACKAGE", tmp_path)
    monkeypatch.setattr(ops, "EXTENSION_SUFFIXES", suffixes)
    this = ".".join(torch.__version__.split(".")[:2])
    for version in there:
        major, minor = version.replace("this", this).split(".")
        (tmp_path / f"_C_{major}_{minor}.abi3.so").write_text("no library")
    extension, unavailable = ops._load()
    assert extension is None and reason in unavailable
    assert "adamem_fused._C" not in sys.modules
