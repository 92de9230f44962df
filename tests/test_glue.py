"""The C++ extension as Python sees it: arguments, errors, and what it holds on to."""

import contextlib
import gc
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adamem_fused.backends import ops

pytestmark = pytest.mark.skipif(ops.extension is None, reason=str(ops.unavailable))

NAMES = ("exp_avg", "exp_avg_sq", "step", "beta_prod", "prev_lr", "beta")
MEMORIES = ("exp_avg", "exp_avg_sq")


def make_params(n, **options):
    params = [torch.full((2, 3), 1.0, **options).requires_grad_() for _ in range(n)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def make_state(params):
    return {
        param: {
            name: torch.zeros_like(param) if name in MEMORIES else torch.zeros(()) for name in NAMES
        }
        for param in params
    }


def arguments(name, n=3):
    """What a function of the extension is called with, in a list."""
    params = make_params(n)
    state = make_state(params)
    lists = {key: [state[param][key] for param in params] for key in NAMES}
    grads = [param.grad for param in params]
    lrs = torch.zeros(1, dtype=torch.float64)
    if name == "gather":
        plain = [False] * len(NAMES)
        return [[params], state, NAMES, (None,) * len(NAMES), plain, [False], None, [], b""]
    if name == "bump_versions":
        return [params]
    if name == "describe":
        return [(params, grads), b"", b"", True]
    if name == "any_modes":
        return []
    if name == "betas":
        return [[params], state, "beta", None]
    if name == "squared_norms":
        return [grads]
    if name.startswith("adamw"):
        args = [params, grads, *(lists[key] for key in NAMES), lrs, [n], [0.0] * 9]
    else:
        scalars = [lists[key] for key in ("step", "prev_lr", "beta")]
        args = [params, grads, lists["exp_avg"], *scalars, lrs, [n], [0.0] * 7]
    args += [torch.ones(()), torch.zeros(()), [], None]
    return [*args, None] if "finish" in name else args


STEPS = ("adamw_begin_", "adamw_finish_", "sgd_begin", "sgd_finish_")
FUNCTIONS = ("gather", "bump_versions", "describe", "any_modes", "betas", "squared_norms", *STEPS)
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def call(name, args):
    return getattr(ops.extension, name)(*args)


# ---- arguments --------------------------------------------------------------------


@every_function
def test_it_takes_its_arguments(name):
    call(name, arguments(name))


@every_function
def test_another_number_of_arguments(name):
    args = arguments(name)
    with pytest.raises(TypeError, match=rf"{name}\(\) takes {len(args)} arguments, not"):
        call(name, [*args, None])
    if args:
        with pytest.raises(TypeError, match=rf"takes {len(args)} arguments, not {len(args) - 1}"):
            call(name, args[:-1])
    with pytest.raises(TypeError, match="keyword"):
        getattr(ops.extension, name)(*args, updated=True)


@every_function
def test_an_argument_of_another_type(name):
    args = arguments(name)
    for i in range(len(args)):
        for wrong in (object(), 1.5, int, {1: 2}):
            if not isinstance(wrong, type(args[i])):
                with pytest.raises(TypeError):
                    call(name, [*args[:i], wrong, *args[i + 1 :]])


@every_function
def test_a_list_of_other_things(name):
    args = arguments(name)
    lists = [i for i, arg in enumerate(args) if isinstance(arg, list | tuple) and arg]
    for i in lists:
        if (name, i) in {("gather", 0), ("gather", 2), ("gather", 3)}:
            continue  # it says None, below
        for wrong in (object(), None, "a", [1.5]):
            others = type(args[i])([wrong, *args[i][1:]])
            with pytest.raises(TypeError):
                call(name, [*args[:i], others, *args[i + 1 :]])


@pytest.mark.parametrize("wrong", [object(), None, "a", (), [1], [Tensor], [[]]])
def test_what_is_gathered_of_other_things(wrong):
    """Not ordinary, and Python is to say what is wrong with it."""
    args = arguments("gather")
    assert call("gather", [[wrong], *args[1:]]) is None
    for param in args[0][0]:
        state = args[1] | {param: wrong}
        assert call("gather", [args[0], state, *args[2:]]) is None
        state[param] = args[1][param] | {"step": wrong}
        assert call("gather", [args[0], state, *args[2:]]) is None
    assert call("gather", [*args[:2], (*NAMES[:-1], "none"), *args[3:]]) is None


def test_a_number_that_is_too_large():
    args = arguments("sgd_begin")
    args[7] = [2**64]
    with pytest.raises(OverflowError):
        call("sgd_begin", args)


def test_a_class_that_is_none_of_tensors():
    for name, i in (("gather", 6), ("betas", 3)):
        args = arguments(name)
        args[i] = int
        with pytest.raises(TypeError, match="class of tensors"):
            call(name, args)


def test_words_that_are_not_whole():
    params = make_params(1)
    with pytest.raises(ValueError, match="whole words"):
        ops.extension.describe((params,), b"abc", b"", False)


# ---- describe ---------------------------------------------------------------------


def words(data):
    return memoryview(data).cast("q").tolist()


def test_the_words_are_the_last_objects_where_they_are_the_same():
    lists = make_params(4), [torch.ones(5), torch.ones(2, 3).t()], []
    first = ops.extension.describe(lists, b"", b"", False)
    assert words(first[0]) == [t.data_ptr() for tensors in lists for t in tensors]
    again = ops.extension.describe(lists, *first, False)
    assert again[0] is first[0]
    assert again[1] is first[1]
    empty = ops.extension.describe(([],), b"", b"", False)
    assert empty == (b"", b"")


@pytest.mark.parametrize("at", range(6))
def test_words_that_differ_from_the_last_ones(at):
    tensors = [torch.ones(2, 3) for _ in range(6)]
    first = ops.extension.describe((tensors,), b"", b"", False)
    others = [*tensors[:at], torch.ones(4, 5, dtype=torch.float64), *tensors[at + 1 :]]
    for these in (others, others[: at + 1], tensors[:at], [*tensors, torch.ones(())]):
        found = ops.extension.describe((these,), *first, False)
        assert found == ops.extension.describe((these,), b"", b"", False)
        assert words(found[0]) == [t.data_ptr() for t in these]
        assert found[0] != first[0]
        assert found[1] != first[1]


def test_addresses_are_those_of_data_ptr():
    base = torch.arange(12.0)
    shared = torch._lazy_clone(base)  # until one of them is written to, or may be
    tensors = [shared, base[3:], base[::2], base.view(3, 4).t(), torch.empty(0), base[12:]]
    tensors += [torch.ones(5, dtype=d)[2:] for d in (torch.float64, torch.bfloat16, torch.int8)]
    found = words(ops.extension.describe((tensors,), b"", b"", False)[0])
    assert found == [t.data_ptr() for t in tensors]
    assert found[0] != base.data_ptr()


def test_what_has_no_address_is_refused():
    with pytest.raises(RuntimeError, match="storage"):
        ops.extension.describe(([torch.ones(2, 2).to_sparse()],), b"", b"", False)


# ---- errors -----------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_errors_are_those_of_python(name):
    args = arguments(name)
    for wrong, error, text in (
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "grad of tensor 0"),
        (torch.ones(3, 2), ValueError, "grad of tensor 0 has shape"),
    ):
        with pytest.raises(error, match=text) as caught:
            call(name, [args[0], [wrong, *args[1][1:]], *args[2:]])
        assert "\n" not in str(caught.value)  # where in C++ it was raised
    with pytest.raises(ValueError, match="differ in length"):
        call(name, [args[0][:-1], *args[1:]])
    overlapping = torch.ones(1, 3).expand(2, 3)
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        call(name, [[overlapping, *args[0][1:]], *args[1:]])


def test_a_subclass_and_a_mode_are_left_to_the_dispatcher():
    class Sub(Tensor):
        pass

    for name in (*STEPS, "squared_norms"):
        args = arguments(name)
        others = [[args[0][0].detach().as_subclass(Sub), *args[0][1:]], *args[1:]]
        assert call(name, others) is NotImplemented
        with FlopCounterMode(display=False):
            assert ops.extension.any_modes() is True
            assert call(name, args) is NotImplemented
    assert ops.extension.any_modes() is False


# ---- references -------------------------------------------------------------------


def counts(objects):
    return [sys.getrefcount(o) for o in objects]


def objects_in(thing):
    """It and everything in it, but for what is of Python itself."""
    yield thing
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield from (key, *objects_in(value))
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from objects_in(item)


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """What is there already is not looked at: a collection of all that torch has takes 0.1 s."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def assert_keeps_nothing(function, args):
    """Neither a reference to an argument nor memory, whether it returns or raises."""
    objects = [o for arg in args for o in objects_in(arg) if isinstance(o, Tensor | list | dict)]

    def run(times):
        for _ in range(times):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                function(*args)

    def blocks_that_stay():
        gc.collect()
        before = sys.getallocatedblocks()
        run(10)
        gc.collect()  # frees what Python keeps for the next list
        return sys.getallocatedblocks() - before

    run(2)
    before = counts(objects)
    # Python's own caches may grow once.
    assert any(blocks_that_stay() < 10 for _ in range(3))  # less than one a call
    assert counts(objects) == before


@every_function
def test_it_keeps_nothing(name):
    assert_keeps_nothing(getattr(ops.extension, name), arguments(name))


@pytest.mark.parametrize("name", ["gather", "bump_versions", "describe", "betas", "adamw_finish_"])
def test_it_keeps_nothing_of_what_it_does_not_take(name):
    """With a wrong thing in every place, in the middle of what has been read before it."""
    function, args = getattr(ops.extension, name), arguments(name)
    for i, arg in enumerate(args):
        wrong = [*arg[:-1], object()] if isinstance(arg, list) and arg else object()
        assert_keeps_nothing(function, [*args[:i], wrong, *args[i + 1 :]])


def test_it_keeps_nothing_of_what_is_not_ordinary():
    for change in ("state", "value", "grad"):
        args = arguments("gather", n=70)  # more than a run
        params, state = args[0][0], args[1]
        if change == "state":
            del state[params[66]]
        elif change == "value":
            state[params[66]]["beta"] = 0.5
        else:
            params[66].grad = torch.ones(2, 3).to_sparse()
        assert ops.extension.gather(*args) is None
        assert_keeps_nothing(ops.extension.gather, args)


def test_what_is_gathered_is_owned_by_its_lists():
    args = arguments("gather")
    params, state = args[0][0], args[1]
    tensors = [*params, *(value for values in state.values() for value in values.values())]
    before = counts(tensors)
    gathered = ops.extension.gather(*args)
    ((sizes, lists, kept, dtensors), crossing) = gathered
    assert sizes == [3]
    assert kept is lists[0]
    assert (dtensors, crossing) == ([], None)
    assert counts(tensors) == [count + 1 for count in before]
    del gathered, lists, kept, sizes, dtensors
    assert counts(tensors) == before


@pytest.mark.parametrize("name", ["gather", "betas"])
@pytest.mark.parametrize("what", ["state", "group", "both"])
def test_python_code_that_runs_meanwhile_may_change_what_is_read(name, what):
    """A tensor's hash is Python code, and lets other threads run."""
    for when in (1, 2, 5):
        args = arguments(name, n=70)
        args[1] = dict(reversed(args[1].items()))  # another order: every tensor is looked up
        hashes = 0

        def hash_and_change(tensor, args=args, when=when):
            nonlocal hashes
            hashes += 1
            if hashes == when:
                if what != "group":
                    args[1].clear()
                if what != "state":
                    args[0][0].clear()
                args.append([{str(i): [i]} for i in range(300)])  # where those were
            return id(tensor)

        with mock.patch.object(Tensor, "__hash__", hash_and_change):
            call(name, list(args))
        assert hashes >= when


def test_what_was_still_to_be_met_lives_on_when_more_is():
    """The second parameter's state, removed while the first is looked up, and then met; then the
    third is looked up, and another is still to be met."""
    args = arguments("gather", n=3)
    first, second, third = args[0][0]
    state = args[1]
    args[1] = {p: state.pop(p, {}) for p in (second, torch.ones(1), first, third)}
    other = {name: torch.full((2, 3) if name in MEMORIES else (), 77.0) for name in NAMES}

    def hash_and_remove(tensor):
        if tensor is first:
            del args[1][second]
        elif tensor is third:
            args.append([dict(other) for _ in range(200)])  # where it was
        return id(tensor)

    given = tuple(args)
    with mock.patch.object(Tensor, "__hash__", hash_and_remove):
        gathered = ops.extension.gather(*given)
    assert second not in args[1] and len(args) > len(given)
    assert [memory.sum() for memory in gathered[0][1][2]] == [0.0] * 3


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="which collects no garbage in between")
@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_a_finalizer_may_change_what_is_still_to_be_met(threshold):
    """The state of the parameter behind one that has neither a gradient nor a state."""
    args = arguments("gather", n=65)
    params, state = args[0][0], args[1]
    del state[params[63]]
    params[63].grad = None
    other = {name: torch.full((2, 3) if name in MEMORIES else (), 77.0) for name in NAMES}

    class Popping:
        def __init__(self):
            self.me = self

        def __del__(self):
            state.popitem()
            args.append([dict(other) for _ in range(200)])  # where it was

    before = gc.get_threshold()
    given = tuple(args)
    gc.disable()
    Popping()
    gc.set_threshold(threshold)
    try:
        gc.enable()
        gathered = ops.extension.gather(*given)
    finally:
        gc.set_threshold(*before)
        gc.enable()
    memories = gathered[0][1][2]
    assert len(memories) == 64 and memories[-1].sum() == 0.0


def test_what_a_kernel_could_not_read_is_refused():
    args = arguments("adamw_begin_", n=1)
    args[0] = [torch.zeros(2, 3, device="meta")]
    with pytest.raises(ValueError, match="param of tensor 0 is on meta"):
        ops.extension.adamw_begin_(*args)


def test_rows_of_no_rows_with_codes_are_refused():
    empty, codes = torch.zeros(0, 64), torch.zeros(0, 64, dtype=torch.int8)
    scalar = [torch.zeros(())]
    args = [[empty], [empty.clone()], [codes], scalar, scalar, [torch.zeros(0)]]
    args += [torch.zeros(1, dtype=torch.float64), [1], [0.9] + [0.0] * 6, None, None]
    args += [[torch.zeros(0), codes.clone()], torch.zeros(5, 1, dtype=torch.int64), None]
    with pytest.raises(ValueError, match="momentum_buffer_scales of tensor 0 has 0 elements"):
        ops.extension.sgd_finish_(*args)


def test_sizes_of_groups_that_are_too_large_are_refused():
    for size in (2**36, 2**63 - 1):
        args = arguments("adamw_begin_", n=1)
        args[9] = [size]
        with pytest.raises(ValueError, match="group_sizes add up to more than params holds: 1"):
            ops.extension.adamw_begin_(*args)


def test_kernels_of_another_version_are_not_taken(tmp_path):
    """Beside the extension lies a library with all functions and another number."""
    functions = ("choose", "adamw_begin", "adamw_finish", "sgd_begin", "sgd_finish", "squares")
    source = tmp_path / "other.c"
    source.write_text(
        "long adamem_cpu_interface() { return 99; }\n"
        + "".join(f"void adamem_cpu_{name}() {{}}\n" for name in functions)
    )
    command = ["g++", "-shared", "-fPIC", "-x", "c", "-Wl,-soname,_cpu.so"]
    subprocess.run([*command, "-o", tmp_path / "_cpu.so", source], check=True)
    shutil.copy(ops.extension.__file__, tmp_path)
    path = str(tmp_path / Path(ops.extension.__file__).name)
    load = (
        "import torch, importlib.machinery as m, importlib.util as u\n"
        f"u.module_from_spec(u.spec_from_file_location('_C', {path!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert "ImportError: _cpu.so is of another version of adamem_fused" in done.stderr


def test_the_file_is_of_the_limited_api():
    assert ".cpython-" not in ops.extension.__file__
    assert ops.extension.__file__.endswith(".abi3.so")
