"""python -m bench kernels: what it measures is right, and what goes wrong is said."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adamem_fused.backends import ops
from bench import __main__ as commands
from bench import gpu_cases
from bench.environment import cpu_clocks, folder_name
from bench.kernels import command, contestants, parameter_lists, sides
from bench.kernels.contestants import (
    ADAMW_BASELINE,
    VARIANTS,
    Contestant,
    find_contestants,
    is_ours_fused,
    known_defect,
)
from bench.kernels.correctness import FirstStep, WrongResult, check_steps
from bench.kernels.devices import Cpu, Sample, streams
from bench.kernels.parameter_lists import MODELS, ParameterList, fit, model_list
from bench.kernels.plots import write_plots
from bench.kernels.results import TARGETS, Report, Row, Spread
from bench.kernels.sides import Side, WrongShare, random_tensors
from bench.kernels.suite import Plan, Suite, make_cells
from bench.kernels.tables import format_report, target_cells
from bench.kernels.traffic import bytes_to_move

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SHAPES = ((40, 5), (7,))
MODEL = ((300, 40), *((40, 40), (40,), (40,), (160, 40), (40, 160)) * 4, (300, 40))

needs_extension = pytest.mark.skipif(ops.unavailable is not None, reason=str(ops.unavailable))


class DispatchLog(TorchDispatchMode):
    """The bytes that each operation in place writes."""

    def __init__(self):
        super().__init__()
        self.written = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.written.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def by_name():
    return {contestant.name: contestant for contestant in find_contestants(CPU)[0]}


class Wrapper(torch.optim.AdamW):
    """torch's AdamW with a defect of its own after each step."""

    def __init__(self, params, defect):
        super().__init__(params, **contestants.ADAMW_OPTIONS, foreach=False)
        self.defect = defect
        self.steps = 0

    def step(self, closure=None):
        before = [param.detach().clone() for param in self.param_groups[0]["params"]]
        super().step(closure)
        self.steps += 1
        with torch.no_grad():
            self.defect(self, self.param_groups[0]["params"], before)


def planted(defect, name="planted", **options):
    reference = by_name()[ADAMW_BASELINE].reference
    return Contestant(
        name, "adamw", lambda params: Wrapper(params, defect), reference, core=True, **options
    )


def nothing(optimizer, params, before):
    pass


def one_percent_too_far(optimizer, params, before):
    for param, start in zip(params, before, strict=True):
        param.add_(param - start, alpha=0.01)


def wrong_from_the_second_step(optimizer, params, before):
    if optimizer.steps > 1:
        one_percent_too_far(optimizer, params, before)


def last_element_forgotten(optimizer, params, before):
    for param, start in zip(params, before, strict=True):
        param.flatten()[-1] = start.flatten()[-1]


# ---- parameter lists ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [
        ("gpt2-small", 148, 124_439_808),
        ("llama-2-7b", 291, 6_738_415_616),
        ("llama-3-8b", 291, 8_030_261_248),
        ("resnet-50", 161, 25_557_032),
        ("vit-b", 152, 86_567_656),
    ],
)
def test_models_have_their_published_numbers_of_parameters(name, tensors, numel):
    shapes, source = MODELS[name]
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, numel)
    assert re.search(r"\d{4}", source)


def test_lists_are_as_large_as_their_names_say():
    lists = parameter_lists.parameter_lists(l2=2**20, last_level=2**25)
    assert lists["8-llc"].numel * 16 == 8 * 2**25
    assert 0.49 * 2**25 < lists["half-llc"].numel * 20 <= 2**24
    assert lists["l2"].numel * 20 <= 3 * 2**18
    assert len(lists["decoder-300"].shapes) == 300
    for tensors, numel in ((5000, 100), (5000, 1000), (20000, 64)):
        assert len(lists[f"{tensors}x{numel}"].shapes) == tensors
        assert lists[f"{tensors}x{numel}"].numel == tensors * numel
    for power in (20, 22, 24, 26, 28):
        assert lists[f"2^{power}"].numel == 2**power
    assert all(parameters.name == name for name, parameters in lists.items())


def test_lists_of_no_model_are_of_matrices():
    lists = parameter_lists.parameter_lists(l2=2**21, last_level=2**25)
    assert lists["2^28"].shapes == ((16384, 16384),)
    assert [shape[0] for shape in lists["half-llc"].shapes] == [1024]
    assert lists["5000x100"].shapes == ((10, 10),) * 5000
    for name, parameters in lists.items():
        if not parameters.scalable:
            assert {len(shape) for shape in parameters.shapes} == {2}
            assert name.startswith("5000") or {s[1] % 16 for s in parameters.shapes} == {0}


def test_a_model_that_does_not_fit_is_scaled_and_says_so():
    shapes, source = MODELS["llama-2-7b"]
    whole = ParameterList("llama-2-7b", shapes, source, scalable=True)
    assert fit(whole, whole.numel) is not None and fit(whole, whole.numel).label == "llama-2-7b"
    scaled = fit(whole, 2**27)
    assert scaled.label == "llama-2-7b, dimensions / 16"
    assert len(scaled.shapes) == len(shapes)
    assert scaled.shapes[1] == (256, 256)
    assert fit(whole, 2**24).label == "llama-2-7b, dimensions / 32"
    assert fit(ParameterList("2^20", ((2**20,),), ""), 2**19) is None


def test_a_users_model_gives_its_trainable_parameters(monkeypatch):
    def build():
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
        model[1].weight.requires_grad_(False)
        return model

    monkeypatch.setitem(sys.modules, "my_models", types.SimpleNamespace(build=build, other=dict))
    assert model_list("my_models:build").shapes == ((2, 3), (2,))
    with pytest.raises(ValueError, match="my_models:other has no parameters"):
        model_list("my_models:other")


# ---- traffic --------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(
    ("name", "dtype", "in_cache", "state", "expected"),
    [
        ("AMAdamW cpu", torch.float32, False, 8, 28),
        ("AMAdamW cpu, 20% missed", torch.float32, False, 8, 32.8),
        ("AMAdamW cpu, all missed", torch.float32, False, 8, 52),
        ("AMAdamW cpu, all missed", torch.float32, True, 8, 28),
        ("AMAdamW cpu, anchored", torch.float32, False, 8, 44),
        ("AMAdamW cpu, anchored", torch.float32, True, 8, 28),
        ("AMAdamW foreach", torch.float32, False, 8, 28),
        ("AMAdamW cpu", torch.bfloat16, False, 8, 34),
        ("AMAdamW cpu, all missed", torch.bfloat16, False, 8, 34),
        ("AMAdamW cpu", torch.bfloat16, True, 8, 22),
        ("AMAdamW cpu", torch.float64, False, 16, 56),
        ("AMAdamW cpu, all missed", torch.float64, False, 16, 104),
        ("AMAdamW cpu, anchored", torch.float64, False, 16, 88),
        ("AMAdamW cpu, row", torch.float32, True, 8, 28),
        ("AMAdamW cpu, row", torch.bfloat16, True, 8, 22),
        ("AMAdamW cpu, anchored, row", torch.float32, True, 8, 28),
        ("AMAdamW cpu, anchored, row", torch.bfloat16, True, 8, 22),
        ("AMAdamW cpu, anchored, row", torch.float32, False, 8, 44),  # a vector has no rows
        ("AdamW fused", torch.float32, False, 8, 28),
        ("AdamW fused", torch.bfloat16, False, 4, 14),
        ("AMSGD cpu", torch.float32, False, 4, 28),
        ("AMSGD cpu", torch.float32, True, 4, 20),
        ("SGD fused", torch.float32, False, 4, 20),
    ],
)
def test_bytes_a_parameter_are_those_of_the_algorithm(name, dtype, in_cache, state, expected):
    contestant = by_name()[name]
    last_level = 2**20 if in_cache else 2**10
    moved = bytes_to_move(contestant, ((1000,),), dtype, 1000 * state, last_level)
    assert moved == 1000 * expected


@needs_extension
@pytest.mark.parametrize(
    ("variant", "shape", "dtype", "expected"),
    [
        (", row", (1000, 100), torch.float32, 28),
        (", row", (1000, 100), torch.bfloat16, 22),
        (", anchored, row", (1000, 100), torch.float32, 28),
        (", anchored, row", (1000, 10, 10), torch.bfloat16, 22),
        (", anchored", (1000, 100), torch.float32, 44),
        (", anchored, row", (10, 10000), torch.float32, 44),  # rows that are larger than the cache
        (", anchored, row", (10000, 10), torch.float32, 44),  # and too short to have a beta
    ],
)
def test_a_row_stays_in_a_cache_that_does_not_hold_its_tensor(variant, shape, dtype, expected):
    contestant = by_name()[f"AMAdamW cpu{variant}"]
    moved = bytes_to_move(contestant, (shape,), dtype, 8 * 10**5, 2**16)
    assert moved == 10**5 * expected


@needs_extension
def test_one_beta_for_all_keeps_only_small_models_in_cache():
    shapes, floats = ((1000,),) * 100, 100_000
    found = by_name()
    adamw = bytes_to_move(found["AMAdamW cpu"], shapes, torch.float32, 8 * floats, 2**16)
    sgd = bytes_to_move(found["AMSGD cpu"], shapes, torch.float32, 4 * floats, 2**16)
    assert (adamw, sgd) == (28 * floats, 28 * floats)


# ---- correctness ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_contestant_does_what_its_reference_does(dtype):
    checked = 0
    for contestant in find_contestants(CPU)[0]:
        slow = contestant.compiled or not contestant.name.startswith(("AM", "AdamW", "SGD"))
        if not slow and known_defect(contestant, dtype, CPU) is None:
            check_steps(contestant, dtype, CPU)
            checked += 1
    assert checked >= 7


def test_the_defect_that_is_known_is_there():
    contestant = by_name()["SGD fused"]
    if known_defect(contestant, torch.bfloat16, CPU) is None:
        pytest.skip("this torch does not have it")
    with pytest.raises(WrongResult):
        check_steps(contestant, torch.bfloat16, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("defect", [one_percent_too_far, wrong_from_the_second_step])
def test_a_planted_wrong_result_is_found(defect, dtype):
    check_steps(planted(nothing), dtype, CPU)
    with pytest.raises(WrongResult, match=r"^planted, step \d on .*differs from its reference"):
        check_steps(planted(defect), dtype, CPU)


def test_a_parameter_that_is_not_a_number_is_wrong():
    def spoil(optimizer, params, before):
        params[0].view(-1)[3] = math.nan

    with pytest.raises(WrongResult):
        check_steps(planted(spoil), torch.float32, CPU)


def test_an_element_that_is_not_updated_is_found_on_the_tensors_that_are_timed():
    start, grads = (random_tensors(((50_001,), (3,)), torch.float32, CPU, s) for s in (0, 1))
    for defect, wrong in ((nothing, False), (last_element_forgotten, True)):
        side = Side(planted(defect), start, [grads])
        side.next_gradients()
        first_step = FirstStep(side)
        side.step()
        if wrong:
            with pytest.raises(WrongResult, match="first step"):
                first_step.check(planted(defect))
        else:
            first_step.check(planted(defect))


def run_command(tmp_path, *options):
    return commands.main(["kernels", "--threads", "1", *options, "--out", str(tmp_path)])


@pytest.fixture
def tiny(monkeypatch):
    """Two small lists, torch's fused AdamW and whatever the test plants."""
    tiny_lists = {
        name: ParameterList(name, SHAPES, "a test", everyone=True) for name in ("first", "second")
    }
    monkeypatch.setattr(command, "parameter_lists", lambda l2, last_level: tiny_lists)

    def plant(*extra):
        fused = by_name()[ADAMW_BASELINE]
        monkeypatch.setattr(command, "find_contestants", lambda device: ([fused, *extra], {}))
        return ["--quick", "--optimizer", "adamw"]

    return plant


@pytest.mark.parametrize("defect", [one_percent_too_far, last_element_forgotten])
def test_a_planted_wrong_result_stops_the_benchmark(tiny, tmp_path, defect, monkeypatch, capsys):
    timed = []
    monkeypatch.setattr(Cpu, "measure", lambda *args, **kwargs: timed.append(args))
    assert run_command(tmp_path, *tiny(planted(defect))) == 1
    assert timed == []
    assert list(tmp_path.iterdir()) == []
    assert "Stopped: a wrong result. planted, step 1" in capsys.readouterr().err


# ---- the suite ------------------------------------------------------------------------


class FakeDevice(Cpu):
    """Steps and does not time them: each takes a second, and a little more than the last."""

    def __init__(self):
        super().__init__()
        self.log = []
        self.samples = 0

    def flush(self):
        self.log.append("flush")

    def bandwidth(self, held, cold):
        return 1.0

    def measure(self, side, steps, cold):
        for _ in range(steps):
            side.next_gradients()
            if cold:
                self.flush()
            side.step()
        self.samples += 1
        seconds = 1 + 1e-6 * self.samples
        return Sample(seconds, seconds, None)


def new_plan(*extra, **options):
    values = {
        "lists": [ParameterList("first", SHAPES, ""), ParameterList("second", ((9,),) * 3, "")],
        "dtypes": [torch.float32],
        "caches": ["warm"],
        "contestants": [by_name()[ADAMW_BASELINE], *extra],
        "whole_suite": True,
        "memory": 2**30,
        "passes": 2,
        "rounds": 3,
        "seconds": 12.5,
        "seed": 0,
    }
    return Plan(**values | options)


def run_suite(plan, device=None):
    told = []
    suite = Suite(plan, device or FakeDevice(), lambda doing, parts: told.append((doing, parts)))
    suite.check()
    suite.run()
    assert sum(parts for _, parts in told) == suite.parts
    return suite, [doing for doing, _ in told]


def test_sides_take_turns_in_an_order_made_from_the_seed():
    def turns(seed):
        _, told = run_suite(new_plan(planted(nothing), seed=seed))
        return [doing for doing in told if ", warm, " in doing]

    told = turns(0)
    rounds = [tuple(d.rsplit(", ")[-1] for d in told[i : i + 2]) for i in range(0, len(told), 2)]
    assert len(rounds) == 2 * 2 * 3  # passes, lists, rounds
    assert {frozenset(pair) for pair in rounds} == {frozenset(("AdamW fused", "planted"))}
    assert len(set(rounds)) == 2
    assert turns(0) == told
    assert turns(1) != told


def test_sides_that_do_not_fit_in_memory_together_come_one_by_one():
    alive, most = [], []

    class Counted(Wrapper):
        def __init__(self, params):
            super().__init__(params, nothing)
            alive.append(weakref.ref(self))
            most.append(sum(optimizer() is not None for optimizer in alive))

    extra = [replace(planted(nothing, name=f"number {i}"), make=Counted) for i in range(3)]
    for memory, expected in ((2**30, 3), (1, 1)):
        alive.clear(), most.clear()
        suite, _ = run_suite(new_plan(*extra, memory=memory))
        assert max(most) == expected
        assert all(len(rounds) == 3 for row in suite.rows for rounds in row.step)


def test_every_pass_builds_everything_anew():
    made = []
    contestant = planted(nothing)
    counting = replace(contestant, make=lambda params: made.append(1) or contestant.make(params))
    suite, _ = run_suite(new_plan(counting, passes=4))
    assert len(made) == 1 + 4 * 2  # the check, and each pass of each list
    assert [len(row.step) for row in suite.rows] == [4] * 4
    assert all(len(rounds) == 3 for row in suite.rows for rounds in row.step)


def test_gradients_alternate_and_are_random():
    pointers = []

    def record(optimizer, params, before):
        pointers.append(params[0].grad.data_ptr())
        assert params[0].grad.count_nonzero() == params[0].numel()

    lists = [ParameterList("first", SHAPES, "")]
    run_suite(new_plan(planted(record), lists=lists, passes=1))
    timed = pointers[3:]  # after the check
    assert len(set(timed)) == 2
    assert all(a != b for a, b in pairwise(timed))


def test_caches_are_flushed_before_every_cold_step_and_never_else():
    device = FakeDevice()

    def step(optimizer, params, before):
        device.log.append("step")

    lists = [ParameterList("first", SHAPES, "")]
    run_suite(new_plan(planted(step), lists=lists, passes=1, caches=["warm"]), device)
    assert "flush" not in device.log
    device.log.clear()
    run_suite(new_plan(planted(step), lists=lists, passes=1, caches=["cold"]), device)
    cold = device.log[device.log.index("flush") :]
    assert cold.count("step") >= 3
    assert all(cold[i - 1] == "flush" for i, what in enumerate(cold) if what == "step")


def test_cold_is_measured_only_where_the_caches_could_hold_the_data():
    lists = [ParameterList("small", ((100,),), ""), ParameterList("large", ((10**6,),), "")]
    cells = make_cells(new_plan(lists=lists, caches=["warm", "cold"]), last_level=2**20)
    assert [cell.caches for cell in cells] == [("warm", "cold"), ("warm",)]


def test_in_the_whole_suite_only_some_lists_have_everyone():
    foreach = by_name()["AdamW foreach"]
    lists = [
        ParameterList("some", SHAPES, ""),
        ParameterList("all", SHAPES, "", everyone=True),
        ParameterList("first", SHAPES, "", first_dtype_only=True),
    ]
    plan = new_plan(foreach, lists=lists, dtypes=[torch.float32, torch.bfloat16])
    cells = {(c.parameters.name, c.dtype): len(c.contestants) for c in make_cells(plan, 2**20)}
    assert cells == {
        ("some", torch.float32): 1,
        ("all", torch.float32): 2,
        ("first", torch.float32): 1,
        ("some", torch.bfloat16): 1,
        ("all", torch.bfloat16): 1,
    }
    asked = make_cells(replace(plan, whole_suite=False), 2**20)
    assert [len(cell.contestants) for cell in asked] == [2] * 6


@pytest.mark.parametrize("error", [RuntimeError("can't allocate 9 GB\nof memory"), MemoryError()])
def test_a_contestant_that_raises_is_a_row_with_the_reason(error):
    def fail_late(optimizer, params, before):
        if optimizer.steps > 12:
            raise error

    suite, _ = run_suite(new_plan(planted(fail_late)))
    rows = {(row.parameters, row.contestant): row for row in suite.rows}
    for name in ("first", "second"):
        assert rows[name, ADAMW_BASELINE].reason is None
        assert all(len(rounds) == 3 for rounds in rows[name, ADAMW_BASELINE].step)
        reason = rows[name, "planted"].reason
        assert reason in ("RuntimeError: can't allocate 9 GB", "MemoryError")
        assert 0 < len(rows[name, "planted"].step[0]) < 3


def test_a_contestant_that_cannot_be_made_is_a_row_with_the_reason():
    def refuse(params):
        raise TypeError("no CPU tensors")

    suite, _ = run_suite(new_plan(replace(planted(nothing), make=refuse)))
    reasons = [row.reason for row in suite.rows if row.contestant == "planted"]
    assert reasons == ["TypeError: no CPU tensors"] * 2


def test_a_contestant_that_writes_to_the_gradients_is_a_row_with_the_reason():
    def spoil(optimizer, params, before):
        if params[0].numel() != 21_000:  # on the tensors that are timed
            params[0].grad.mul_(2)

    suite, _ = run_suite(new_plan(planted(spoil)))
    reasons = {row.reason for row in suite.rows if row.contestant == "planted"}
    assert reasons == {"RuntimeError: its step writes to the gradients"}


def test_compiling_for_many_tensors_is_not_tried():
    many = ParameterList("many", ((3,),) * 9, "")
    suite, _ = run_suite(new_plan(planted(nothing, compiles_itself=True), lists=[many]))
    row = next(row for row in suite.rows if row.contestant == "planted")
    assert row.reason == "not tried: compiling for more than 8 tensors takes minutes"


def test_slow_contestants_take_part_in_fewer_rounds():
    suite, _ = run_suite(new_plan(planted(nothing), seconds=1e-9, passes=1))
    assert {len(row.step[0]) for row in suite.rows} == {1}


# ---- guesses that are missed ----------------------------------------------------------


def steps_of(name, shapes, steps, dtype=torch.float32, **changes):
    """A side after so many steps, with gradients as in the suite."""
    start, first, second = (random_tensors(shapes, dtype, CPU, seed) for seed in range(3))
    contestant = replace(by_name()[name], **changes)
    side = Side(contestant, start, [first, second], [-gradient for gradient in first])
    for _ in range(steps):
        side.next_gradients()
        side.step()
    return side


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [((20_000,),), ((64,),) * 500, MODEL], ids=["1", "500", "model"])
@pytest.mark.parametrize(
    ("variant", "share"), [("", 0.0), (", 20% missed", 0.2), (", all missed", 1.0)]
)
def test_the_share_that_is_missed_is_what_the_name_says(variant, share, shapes, dtype):
    side = steps_of(f"AMAdamW cpu{variant}", shapes, 2, dtype)
    for _ in range(50):
        assert side.missed() == pytest.approx(share, abs=0.02)
        side.next_gradients()
        side.step()
    assert all(param.isfinite().all() and param.abs().max() < 10 for param in side.params)
    # Only where it cannot be had from whole tensors are they cut.
    assert (len(side.params) > len(shapes)) is (share == 0.2 and len(shapes) == 1)
    assert sum(param.numel() for param in side.params) == sum(map(math.prod, shapes))


@needs_extension
def test_another_share_is_an_error():
    side = steps_of("AMAdamW cpu", ((1000,),), 2, missed=1.0)
    assert side.missed() == 1.0
    side._missing.clear()  # and from here on nothing keeps beta down
    with pytest.raises(WrongShare, match=r"^0.0% of the elements had a beta below its cap"):
        for _ in range(30):
            side.next_gradients()
            side.step()
            side.missed()
    assert steps_of("AMAdamW cpu, anchored", ((1000,),), 2).missed() is None


@needs_extension
def test_another_share_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(sides, "FALL", 1.0)  # its learning rate falls no more
    with pytest.raises(WrongResult, match=r"all missed, first: 0.0% of the elements"):
        lists = [ParameterList("first", ((1000,),), "")]
        run_suite(new_plan(by_name()["AMAdamW cpu, all missed"], lists=lists, seconds=99))


@needs_extension
def test_the_share_is_in_the_rows(capsys):
    names = [f"AMAdamW cpu{variant}" for variant in VARIANTS]
    lists = [ParameterList("first", ((1000,),) * 10, "")]
    suite, _ = run_suite(new_plan(*(by_name()[name] for name in names), lists=lists))
    assert [row.missed for row in suite.rows[:5]] == [None, 0.0, pytest.approx(0.2), 1.0, None]
    assert [row.missed for row in suite.rows[5:]] == [None, None]  # by row nothing is guessed
    table = format_report(Report({}, {}, {}, suite.rows))
    assert re.search(r"AMAdamW cpu, 20% missed .* 20% ", table)


# ---- what is measured of a step -------------------------------------------------------


def side_of(name, shapes=SHAPES):
    start = random_tensors(shapes, torch.float32, CPU, seed=0)
    grads = [random_tensors(shapes, torch.float32, CPU, seed) for seed in (1, 2)]
    side = Side(by_name()[name], start, grads)
    side.next_gradients()
    side.step()
    return side


@needs_extension
@pytest.mark.parametrize(
    ("name", "memories"), [("AMAdamW cpu", 2), ("AMSGD cpu", 1), ("AdamW fused", 2)]
)
def test_state_bytes_are_those_of_the_memories_and_a_few_scalars(name, memories):
    side = side_of(name, ((1000,), (50, 20)))
    assert 0 <= side.state_bytes() - memories * 4 * 2000 <= 2 * 4 * 4


def test_state_inside_of_objects_and_subclasses_counts():
    side = side_of("SGD fused")
    inner = torch.zeros(5)

    class Holder:
        def __init__(self):
            self.codes = inner
            self.again = [inner, {"view": inner[1:]}]
            self.itself = self

    before = side.state_bytes()
    side.optimizer.state[side.params[0]]["quantized"] = Holder()
    side.optimizer.state[side.params[0]]["parameter"] = side.params[0].detach()
    side.optimizer.state[side.params[1]]["two"] = torch.nn.Parameter(torch.zeros(3))
    assert side.state_bytes() == before + 20 + 12


@needs_extension
def test_operators_of_a_step_do_not_grow_with_the_tensors_on_the_cpu_backend():
    device = Cpu()
    few, many = (device.launches(side_of("AMAdamW cpu", ((5,),) * n)) for n in (2, 60))
    assert 1 <= few == many
    assert device.launches(side_of("AdamW foreach", ((5,),) * 60)) > 60


def test_memory_that_a_step_takes_for_its_time_is_seen():
    taken = 2**27

    def use(optimizer, params, before):
        torch.ones(taken // 4)

    start = random_tensors(SHAPES, torch.float32, CPU, seed=0)
    device = Cpu()
    side = Side(planted(use), start, [start])
    temporary = device.temporary_bytes(side)
    if temporary is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 0.95 * taken < temporary < 1.5 * taken


def test_running_out_of_memory_is_an_exception_and_the_limit_is_lifted(monkeypatch):
    device = Cpu()
    monkeypatch.setattr(device, "free_bytes", lambda: 2**26)
    with device.limited_memory(), pytest.raises(RuntimeError, match="memory"):
        torch.empty(2**29, dtype=torch.uint8)
    torch.empty(2**29, dtype=torch.uint8)


def test_a_cpu_sample_is_of_the_steps_that_were_asked_for():
    device, log = Cpu(), []
    side = Side(planted(lambda *args: log.append(1)), [torch.ones(3)], [[torch.ones(3)]])
    sample = device.measure(side, 4, cold=False)
    assert len(log) == 4
    assert sample.step == sample.host > 0
    assert sample.kernel is None


@pytest.mark.parametrize("held", [8, 800, 10**6])
def test_bandwidth_counts_what_is_read_and_written(held):
    for moved, work in streams(held, CPU):
        with DispatchLog() as log:
            work()
        assert sum(2 * size for size in log.written) == moved in (held, 2 * held)


def test_random_tensors_are_random_and_never_zero():
    first, second = (random_tensors([(3, 50), (7,)], torch.bfloat16, CPU, s) for s in (1, 2))
    assert [tuple(tensor.shape) for tensor in first] == [(3, 50), (7,)]
    assert all(tensor.count_nonzero() == tensor.numel() for tensor in first)
    assert not torch.equal(first[0], second[0])
    (large,) = random_tensors([(2**21,)], torch.float32, CPU, seed=0)
    assert large.count_nonzero() == large.numel()
    assert large.std().item() == pytest.approx(1, abs=0.01)


# ---- numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "noisy"),
    [
        ([[1.0, 1.0], [1.0, 1.0]], False),
        ([[1.0, 1.01], [1.02, 1.0]], False),
        ([[1.0, 1.0], [1.06, 1.06]], True),  # two builds differ
        ([[0.8, 1.2, 1.0], [1.2, 1.0, 0.8]], True),  # samples differ
        ([[1.0, 1.0, 1.0]], True),  # nothing to compare with
    ],
)
def test_a_row_tells_from_its_own_samples_whether_it_is_noisy(passes, noisy):
    assert Spread.of(passes).noisy is noisy


def test_spread_has_median_and_quartiles_of_all_samples():
    spread = Spread.of([[1.0, 2.0], [], [3.0, 4.0, 5.0]])
    assert (spread.low, spread.median, spread.high, spread.passes) == (2, 3, 4, 2)
    assert Spread.of([[], []]) is None


def new_row(contestant, step, parameters="8-llc", **values):
    return Row(parameters, 1000, 1, "float32", "warm", contestant, "adamw", step=step, **values)


def test_ratios_are_of_the_same_rounds():
    report = Report({}, {}, {}, [new_row("AdamW fused", [[1.0, 2.0, 4.0], [1.0]])])
    slow = new_row("AMAdamW cpu", [[2.0, 6.0], [2.0, 99.0]], bytes_to_move=4000)
    report.rows.append(slow)
    ratio = report.ratio(slow, "AdamW fused")
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.5)
    assert report.ratio(slow, "SGD fused") is None


def test_of_floor_is_the_time_of_a_copy_over_the_time_taken():
    row = new_row("AMAdamW cpu", [[2.0]], bytes_to_move=4000, copy_bandwidth=4000.0)
    assert (row.floor_seconds, row.bandwidth, row.of_floor) == (1.0, 2000.0, 0.5)
    row.kernel = [[1.0]]
    assert row.of_floor == 1.0


def test_a_target_stands_beside_its_figure():
    seconds = {"AdamW fused": 1.0, "AMAdamW cpu": 1.0, "AMAdamW cpu, 20% missed": 1.21}
    rows = [new_row(name, [[step] * 3] * 2) for name, step in seconds.items()]
    headers, (cells,) = target_cells(Report({}, {}, {}, rows))
    assert headers[3:] == ["nothing missed", "20% missed"]
    assert cells[:3] == ["8-llc", "float32", "AMAdamW cpu / AdamW fused"]
    assert cells[3:] == ["1.00 of 1.00", "1.21 of 1.20, not met"]
    rows += [new_row(name, [[1.3] * 3] * 2, "l2") for name in ("AdamW fused", "AMAdamW cpu, row")]
    headers, (cells, of_l2) = target_cells(Report({}, {}, {}, rows))
    assert headers[3:] == ["nothing missed", "20% missed", "row"]
    assert (cells[5], of_l2[3:]) == ("-", ["-", "-", "1.00 of 1.30"])


def test_every_target_is_of_a_contestant_and_a_list():
    lists = parameter_lists.parameter_lists(2**20, 2**25)
    for target in TARGETS:
        assert target.name in lists or target.name in gpu_cases.TARGETS
        assert is_ours_fused(target.contestant) or target.contestant == "AMAdamW foreach"
    cpu = [t for t in TARGETS if t.contestant.startswith("AMAdamW cpu")]
    assert {t.contestant.removeprefix("AMAdamW cpu") for t in cpu} == set(VARIANTS)


# ---- the command ----------------------------------------------------------------------


def test_every_sample_is_written_and_read_again(tiny, tmp_path, capsys):
    def fail(optimizer, params, before):
        if optimizer.steps > 3:
            raise RuntimeError("no more")

    options = tiny(planted(nothing), planted(fail, name="fails"))
    assert run_command(tmp_path, *options) == 0
    out = capsys.readouterr().out
    report = Report.read(tmp_path / "kernels.json")
    assert report.settings["threads"] == 1
    assert report.settings["interrupted"] is False
    assert report.environment["torch"] == torch.__version__
    assert report.environment["clocks_before"] == {} or cpu_clocks()
    assert {row.parameters for row in report.rows} == {"first", "second"}
    for row in report.rows:
        if row.contestant == "fails":
            assert row.reason == "RuntimeError: no more"
        else:
            assert len(row.step) == 2
            assert all(1 <= len(rounds) <= 3 for rounds in row.step)
            assert all(seconds > 0 for rounds in row.step for seconds in rounds)
            assert row.state_bytes >= 8 * row.numel
            assert row.copy_bandwidth > 0
    assert "fails: RuntimeError: no more. On first (float32), second (float32)" in out


def test_missing_contestants_are_said(capsys, tmp_path, tiny, monkeypatch):
    options = tiny()
    find = command.find_contestants
    monkeypatch.setattr(
        command, "find_contestants", lambda device: (find(device)[0], {"a peer": "not installed"})
    )
    assert run_command(tmp_path, *options) == 0
    assert "without a peer: not installed" in capsys.readouterr().out
    assert json.loads((tmp_path / "kernels.json").read_text())["missing"] == {
        "a peer": "not installed"
    }


def test_peers_that_are_not_installed_are_missing_and_not_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    found, missing = find_contestants(CPU)
    assert missing["torchao AdamW8bit"].startswith("ModuleNotFoundError: ")
    assert missing["apex FusedAdam"] == "it works on cuda tensors only"
    names = [contestant.name for contestant in found]
    assert len(names) == len(set(names))
    assert not set(names) & set(missing)


@needs_extension
def test_interrupting_keeps_what_was_measured(tmp_path):
    options = ["--lists", "l2", "--contestants", "AMAdamW cpu", "--optimizer", "adamw"]
    options += ["--passes", "1000", "--seconds", "0.01", "--threads", "1", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "kernels", *options, "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # Where the tests run in the background of a shell, children inherit that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = b""
    deadline = time.monotonic() + 120
    while b"pass 3/1000" not in seen and time.monotonic() < deadline:
        seen += os.read(process.stderr.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"AMAdamW cpu" in out
    report = Report.read(tmp_path / "kernels.json")
    assert report.settings["interrupted"] is True
    assert {row.contestant for row in report.rows} == {"AMAdamW cpu", "AdamW fused"}
    assert all(len(row.step) >= 2 and row.step[0] for row in report.rows)


def test_interrupted_at_once_says_so(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Suite, "check", interrupted)
    assert run_command(tmp_path, *tiny()) == 130
    assert "Interrupted before anything was measured." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kernels", "train", "compare", "readme"])
def test_help_of_every_command(name, capsys):
    with pytest.raises(SystemExit) as error:
        commands.main([name, "--help"])
    assert error.value.code == 0
    assert f"python -m bench {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "inf"], "argument --seconds: 'inf' is not a finite number above 0"),
        (["--threads", "none"], "argument --threads: 'none' is not a whole number"),
        (["--lists", "gpt5"], "argument --lists: invalid choice: 'gpt5'"),
        (["--model", "torch.nn:Nothing"], "--model: module 'torch.nn' has no attribute 'Nothing'"),
        (["--model", "no_such_module:f"], "--model: No module named 'no_such_module'"),
        (["--contestants", "AdamX"], "--contestants: 'AdamX' is not one of AMAdamW"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        commands.main(["kernels", *options, "--out", str(tmp_path)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_quick_yields_to_options_that_are_given(tiny, tmp_path):
    assert run_command(tmp_path, *tiny(), "--passes", "1") == 0
    settings = Report.read(tmp_path / "kernels.json").settings
    assert (settings["passes"], settings["rounds"]) == (1, 3)


def test_device_names_make_folder_names():
    assert folder_name("AMD EPYC (7B13) AVX2") == "amd-epyc-7b13-avx2"


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    report = Report({}, {"device": "a device"}, {})
    for contestant, factor in (("AMAdamW cpu", 1.5), ("AdamW fused", 1.0)):
        for power in (20, 22):
            row = new_row(contestant, [[factor, factor]] * 2, parameters=f"2^{power}")
            row.numel = 2**power
            row.bytes_to_move, row.copy_bandwidth = 28 * row.numel, 1e9
            report.rows.append(row)
    assert [path.name for path in write_plots(report, tmp_path)] == [
        "sizes.png", "roofline.png", "ratios.png"
    ]  # fmt: skip
    report.rows.append(replace(report.rows[0], contestant="AdamW foreach"))
    assert "contestants.png" in [path.name for path in write_plots(report, tmp_path)]
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert write_plots(Report({}, {"device": "a device"}, {}), tmp_path) == []
    assert "AMAdamW cpu" in format_report(report)


# ---- pytest-benchmark -----------------------------------------------------------------


def test_kernel_benchmarks_run_one_by_one_and_are_not_among_the_tests(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    options = ["-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    options += ["-k", "float32 and large and not reference"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
