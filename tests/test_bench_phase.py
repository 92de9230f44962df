"""python -m bench phase: each step clips the same gradients, and the tables say what was taken."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from adamem_fused.backends import cpu, ops
from bench import __main__ as commands
from bench import phase
from bench.kernels.correctness import WrongResult
from bench.kernels.devices import Cpu, Sample
from bench.kernels.results import Report, Row
from bench.kernels.sides import random_tensors
from bench.phase import METRICS, Phase, Plain, find_phases, format_cell, ratio, take_turns
from bench.readme import performance

CPU = torch.device("cpu")
SHAPES = ((40, 20), (7,), (300, 3))
OURS = ["AMAdamW cpu", "AMAdamW cpu, 20% missed", "AMAdamW cpu, row"]

pytestmark = pytest.mark.skipif(ops.unavailable is not None, reason=str(ops.unavailable))


def new_side(name, shapes=SHAPES):
    contestant, folded = find_phases(CPU)[name]
    start, *gradient_sets = (random_tensors(shapes, torch.float32, CPU, seed) for seed in range(3))
    turned = [-grad for grad in gradient_sets[0]]
    grads = [torch.empty_like(tensor) for tensor in start]
    return Phase(contestant, folded, start, gradient_sets, turned, grads), gradient_sets, grads


def grads_of(side):
    return [param.grad.clone() for param in side.params]


# ---- what is timed --------------------------------------------------------------------


def test_ours_clip_in_the_step_and_torchs_by_its_function():
    folded = {name: folded for name, (_, folded) in find_phases(CPU).items()}
    assert folded == {
        **dict.fromkeys([*OURS, "AMSGD cpu"], True),
        **dict.fromkeys(["AMAdamW cpu, clip_grad_norm_", "AdamW fused", "SGD fused"], False),
    }


@pytest.mark.parametrize("name", ["AMAdamW cpu", "AMAdamW cpu, clip_grad_norm_", "AdamW fused"])
def test_each_step_is_given_the_sets_in_turns_as_they_were(name):
    side, gradient_sets, _ = new_side(name)
    before = [[grad.clone() for grad in grads] for grads in gradient_sets]
    for step in range(4):
        side.next_gradients()
        given = grads_of(side)
        side.step()
        assert all(map(torch.equal, given, before[step % 2]))
        assert all(param.grad is None for param in side.params)
    for grads, expected in zip(gradient_sets, before, strict=True):
        assert all(map(torch.equal, grads, expected))


def test_every_step_clips(monkeypatch):
    norms = []
    clip = phase.clip_grad_norm_

    def looked_at(*args, **options):
        norms.append(float(clip(*args, **options)))

    monkeypatch.setattr(phase, "clip_grad_norm_", looked_at)
    ours, theirs = new_side("AMAdamW cpu")[0], new_side("AdamW fused")[0]
    for step in range(4):
        for side in (ours, theirs):
            side.next_gradients()
            side.step()
        assert norms[step] > 10 * phase.MAX_NORM
        assert float(ours.optimizer.grad_norm) == pytest.approx(norms[step])
    assert len(norms) == 4


def test_clipping_in_the_step_and_before_it_come_to_the_same():
    ours, unfused = new_side("AMAdamW cpu")[0], new_side("AMAdamW cpu, clip_grad_norm_")[0]
    for _ in range(4):
        for side in (ours, unfused):
            side.next_gradients()
            side.step()
    for ours_is, theirs_is in zip(ours.params, unfused.params, strict=True):
        torch.testing.assert_close(ours_is, theirs_is)


def test_the_share_that_is_missed_stays_with_clipping():
    side, _, _ = new_side("AMAdamW cpu, 20% missed", ((50, 10),) * 5)
    for _ in range(6):
        side.next_gradients()
        side.step()
    assert side.missed() == pytest.approx(0.2)


def test_sides_share_the_memory_of_their_gradients_also_in_fifths():
    for name, tensors in (("AdamW fused", 1), ("AMAdamW cpu, 20% missed", 6)):
        side, _, grads = new_side(name, ((401, 16),))
        side.next_gradients()
        assert len(side.params) == tensors
        assert side.params[0].grad.data_ptr() == grads[0].data_ptr()


def test_a_wrong_result_is_found():
    contestant, folded = find_phases(CPU)["AMAdamW cpu"]
    phase.check(contestant, folded, torch.float32, CPU)
    wrong = replace(contestant, make=partial(contestant.make, lr=0.02))
    with pytest.raises(
        WrongResult, match=r"AMAdamW cpu, a first phase on torch\.float32: tensor 0"
    ):
        phase.check(wrong, folded, torch.float32, CPU)
    with pytest.raises(WrongResult, match="AMAdamW cpu with clip_grad_norm_, a first phase"):
        phase.check(wrong, False, torch.float32, CPU)


def test_a_phase_that_does_not_clip_is_a_wrong_result(monkeypatch):
    monkeypatch.setattr(phase, "clip_grad_norm_", lambda *args, **options: None)
    contestant, folded = find_phases(CPU)["SGD fused"]
    with pytest.raises(WrongResult, match="SGD fused"):
        phase.check(contestant, folded, torch.float32, CPU)


# ---- turns ----------------------------------------------------------------------------


class FakeDevice(Cpu):
    """Works and does not time it: one of b takes two seconds, and one of any other one."""

    def __init__(self):
        self.log = []

    def measure(self, side, steps, cold):
        assert not cold
        name = side.step()
        self.log.append((name, steps))
        return Sample(2.0 if name == "b" else 1.0, 0.0, None)


def test_sides_take_turns_and_each_is_warm():
    device = FakeDevice()
    sides = {name: Plain(lambda name=name: name) for name in "abc"}
    found = take_turns(device, sides, rounds=20, seconds=200.0, order=random.Random(0))
    assert found == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [1.0] * 20}
    turns = device.log[2 * 3 :]
    assert {steps for _, steps in turns[::2]} == {1}  # what the others left in the caches
    assert [name for name, _ in turns[::2]] == [name for name, _ in turns[1::2]]
    assert set(turns[1::2]) == {("a", 9), ("b", 4), ("c", 9)}
    rounds = [tuple(name for name, _ in turns[i + 1 : i + 6 : 2]) for i in range(0, len(turns), 6)]
    assert {frozenset(names) for names in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 3


def test_a_norm_is_that_of_all_gradients(monkeypatch):
    seen = {}

    def look(device, sides, *args):
        seen.update({name: side.step() for name, side in sides.items()})

    monkeypatch.setattr(phase, "take_turns", look)
    phase.measure_norm(Cpu(), SHAPES, torch.bfloat16, 1, 0.1, random.Random(0))
    grads = random_tensors(SHAPES, torch.bfloat16, CPU, seed=1)
    expected = torch.cat([grad.flatten() for grad in grads]).double().norm()
    assert float(seen["squared_norms cpu"]) == pytest.approx(float(expected), rel=1e-6)
    assert float(seen["get_total_norm"]) == pytest.approx(float(expected), rel=0.02)
    # Ones, of as many bytes: 1707 elements of 2.
    assert (float(seen["torch.sum"]), float(seen["torch.dot"])) == (853.0, 426.0)


# ---- tables ---------------------------------------------------------------------------


def test_ratios_are_of_the_same_rounds():
    seconds = {"a": [[1.0, 4.0], [3.0]], "b": [[2.0, 4.0], [1.0]]}
    found = ratio(seconds, "a", "b")
    assert (found.low, found.median, found.high) == (0.75, 1.0, 2.0)
    assert ratio(seconds, "a", "c") is None


def test_what_was_aimed_at_stands_beside_a_figure():
    half = ratio({"a": [[1.0], [1.0]], "b": [[2.0], [2.0]]}, "a", "b")
    assert format_cell(None, at_most=1.0) == "-"
    assert format_cell(half) == "0.50 (0.50 to 0.50)"
    assert format_cell(half, at_most=0.5) == "0.50 (0.50 to 0.50) of 0.50"
    assert format_cell(half, at_most=0.4) == "0.50 (0.50 to 0.50) of 0.40, not met"
    assert format_cell(half, at_least=0.5) == "0.50 (0.50 to 0.50) of at least 0.50"
    assert format_cell(half, at_least=0.6) == "0.50 (0.50 to 0.50) of at least 0.60, not met"


def cell(parameters, dtype, size, seconds):
    passes = {name: [[value] * 2] * 2 for name, value in seconds.items()}
    return {"parameters": parameters, "dtype": dtype, "bytes": size, "seconds": passes}


PHASES = {
    "AMAdamW cpu": 0.008,
    "AMAdamW cpu, clip_grad_norm_": 0.012,
    "AMAdamW cpu, row": 0.009,
    "AdamW fused": 0.01,
}
NORMS = {"get_total_norm": 0.2, "torch.sum": 0.09, "torch.dot": 0.08}
RESULT = {
    "settings": {"last_level_cache_bytes": 10**9},
    "phase": [
        cell("gpt2-small", "float32", 1, {**PHASES, METRICS: 0.0008}),
        cell("2^24", "float32", 1, {**PHASES, "AMSGD cpu": 0.002, "SGD fused": 0.004}),
    ],
    "norm": [
        cell("gpt2-small", "float32", 2 * 10**9, {**NORMS, "squared_norms cpu": 0.1}),
        cell("gpt2-small", "bfloat16", 10**9, {**NORMS, "squared_norms cpu": 0.1}),
    ],
    "peak": {"made up": 1.0},
}


@pytest.fixture
def stubs(monkeypatch):
    """In place of what takes seconds, and is tested where it is."""
    monkeypatch.setattr(phase.peak, "HEADERS", ["of", "peak"])
    monkeypatch.setattr(phase.peak, "measure", lambda device: {"made up": 1.0})
    monkeypatch.setattr(phase.peak, "table_cells", lambda result: [["made up", "1 MB"]])


def rows_of(table):
    _, headers, rows = table
    return [dict(zip(headers, row, strict=True)) for row in rows]


def test_the_phase_is_told_as_ratios_to_torchs(stubs):
    gpt2, one = rows_of(phase.tables(RESULT)[0])
    assert (gpt2["parameters"], gpt2["dtype"], gpt2["ms with AdamW fused"]) == (
        "gpt2-small", "float32", "10.00"
    )  # fmt: skip
    assert gpt2["AMAdamW cpu"] == "0.80 (0.80 to 0.80) of 0.85"
    assert gpt2["AMAdamW cpu, row"] == "0.90 (0.90 to 0.90) of 0.85, not met"
    assert gpt2["AMAdamW cpu, clip_grad_norm_"] == "1.20 (1.20 to 1.20)"
    assert (gpt2["AMSGD cpu"], gpt2[METRICS]) == ("-", "10.0% (10.0% to 10.0%)")
    assert one["AMAdamW cpu"] == "0.80 (0.80 to 0.80)"
    assert one["AMSGD cpu"] == "0.50 (0.50 to 0.50)"  # of SGD
    assert one[METRICS] == "-"


def test_the_norm_is_told_as_a_share_of_reading(stubs):
    beyond, within = rows_of(phase.tables(RESULT)[1])
    assert (beyond["backend"], beyond["GB/s"], beyond["GB/s of reading"]) == ("cpu", "20.0", "25.0")
    assert beyond["by"] == "torch.dot"
    assert beyond["of reading"] == "0.80 (0.80 to 0.80) of at least 0.90, not met"
    assert beyond["/ get_total_norm"] == "0.50 (0.50 to 0.50)"
    assert within["of reading"] == "0.80 (0.80 to 0.80)"  # caches hold it


def test_the_tables_are_in_the_readme(stubs, tmp_path):
    environment = {"device": "A CPU", "torch": "2.13.0", "date": "2026-11-24"}
    row = Row("2^24", 1, 1, "float32", "warm", "AdamW fused", "adamw", step=[[1.0]])
    folder = tmp_path / "bench" / "results" / "a-cpu"
    folder.mkdir(parents=True)
    Report({"device": "cpu", "threads": 2}, environment, {}, [row]).write(folder / "kernels.json")
    assert "phase.json" not in performance(tmp_path)
    (folder / "phase.json").write_text(json.dumps(RESULT))
    text = performance(tmp_path)
    assert text.count("([phase.json](../bench/results/a-cpu/phase.json)):") == 3
    assert "| 0.90 (0.90 to 0.90) of 0.85, not met |" in text
    assert "| 0.80 (0.80 to 0.80) of at least 0.90, not met |" in text
    assert "| made up | 1 MB   |" in text


# ---- the command ----------------------------------------------------------------------


def test_quick_measures_all_of_it(stubs, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(phase.QUICK, "max_parameters", 2**14)
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert commands.main(["phase", *options]) == 0
    result = json.loads((tmp_path / "phase.json").read_text())
    dtypes = [(c["parameters"].partition(",")[0], c["dtype"]) for c in result["phase"]]
    assert dtypes == [
        ("gpt2-small", "float32"), ("gpt2-small", "bfloat16"), ("decoder-300", "float32")
    ]  # fmt: skip
    assert [c["tensors"] for c in result["phase"]] == [148, 148, 300]
    expected = {*find_phases(CPU), METRICS}
    assert set(result["phase"][0]["seconds"]) == expected
    assert expected - set(result["phase"][1]["seconds"]) <= {"SGD fused"}  # a defect of torch's
    assert set(result["norm"][0]["seconds"]) == {
        "squared_norms cpu", "get_total_norm", "torch.sum", "torch.dot"
    }  # fmt: skip
    for found in (*result["phase"], *result["norm"]):
        for passes in found["seconds"].values():
            assert [len(rounds) for rounds in passes] == [2]
            assert all(seconds > 0 for seconds in passes[0])
    assert result["peak"] == {"made up": 1.0}
    text = capsys.readouterr().out
    assert "without 2^24: 16,777,216 parameters are more than the limit of 16,384" in text
    assert "AMAdamW cpu, 20% missed" in text and "of reading" in text and "1 MB" in text


def test_another_share_stops_the_benchmark(stubs, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(phase.QUICK, "max_parameters", 2**14)
    monkeypatch.setattr("bench.kernels.sides.FALL", 1.0)  # beta then stays at its cap
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert commands.main(["phase", *options]) == 1
    assert "elements had a beta below its cap" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit) as error:
        commands.main(["phase", "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "python -m bench phase" in text and "zero_grad()" in text and "--quick" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit):
        commands.main(["phase", "--device", "cuda", "--out", str(tmp_path)])
    assert "--device cuda: torch" in capsys.readouterr().err


def test_the_norm_is_of_a_steps_own_batch(monkeypatch):
    """A GPU's backend finds gradients through the tables of parameters and state."""
    seen = []

    def squared_norms(batch):
        assert len(batch.params) == len(batch.momentum_buffers) == 2
        assert batch.opened is None
        batch.opened = "found"
        seen.append(len(batch.params))
        return torch.ones(len(batch.grads), dtype=torch.float64)

    monkeypatch.setattr(cpu, "squared_norms", squared_norms)
    phase.measure_norm(Cpu(), [(3, 4), (5,)], torch.float32, 1, 0.0, random.Random(0))
    assert set(seen) == {2}
