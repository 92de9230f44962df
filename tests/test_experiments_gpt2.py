"""GPT-2 on a GPU, tried in small on the CPU: tokens, runs, a cut, what is left of it."""

import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from adamem_fused.backends import ops
from bench.demo_model import GPT
from bench.experiments import __main__ as experiments
from bench.experiments import gpt2, tokens
from bench.experiments.cell import Cell
from bench.experiments.corpus import Corpus
from bench.experiments.larger import training
from bench.experiments.larger.contestants import CONTESTANTS
from bench.experiments.larger.results import Results, Run
from bench.experiments.larger.training import PARTS, Progress, train
from bench.gpu_check import gpu

pytestmark = pytest.mark.skipif(ops.unavailable is not None, reason=str(ops.unavailable))

VOCABULARY = 300
TEXT = Path(gpt2.__file__).read_bytes()
TIMES = ("optimizer_us", "step_us")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A corpus of one file, few tokens, and folders of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokens, "corpus", lambda: Corpus(TEXT, TEXT[:2000], b"\xff" + TEXT[-3000:]))
    monkeypatch.setattr(gpt2, "VOCABULARY", VOCABULARY)


@pytest.fixture
def prepared():
    pytest.importorskip("tokenizers")
    assert experiments.main(["prepare"]) == 0


@pytest.fixture
def stand_in(monkeypatch):
    """The CPU in a GPU's place, and a count of what is compiled."""
    monkeypatch.setattr(gpu, "device", torch.device("cpu"))
    monkeypatch.setattr(gpu, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe", lambda: {"name": "stand-in"})
    monkeypatch.setattr(gpu, "mark", time.perf_counter)
    monkeypatch.setattr(gpu, "seconds_between", lambda start, end: end - start)
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    return counter


def run_tiny(folder):
    return experiments.main(["run", "--gpt2", "--tiny", "--out", str(folder)])


def rows(folder):
    """What the runs measured, without the times, in their order."""
    found = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in TIMES} for row in found]


def progress(folder):
    return [json.loads(line) for line in (folder / gpt2.PROGRESS).read_text().splitlines()]


# ---- tokens ---------------------------------------------------------------------------


def test_tokens_are_the_same_each_time_and_say_what_they_are_of(monkeypatch):
    pytest.importorskip("tokenizers")
    first = tokens.tokenised(VOCABULARY)
    (path,) = tokens.FOLDER.iterdir()
    made = path.stat().st_mtime_ns
    assert tokens.tokenised(VOCABULARY).digest == first.digest
    assert path.stat().st_mtime_ns == made  # it was kept

    monkeypatch.setattr(tokens, "FOLDER", Path("elsewhere"))
    again = tokens.tokenised(VOCABULARY)
    assert (
        again.digest
        == first.digest
        == tokens.digest(first.training, first.choosing, first.comparing)
    )
    assert again.corpus == tokens.corpus().digest()
    assert again.training.dtype == torch.uint16
    assert 0 <= again.training.int().min() <= again.training.int().max() < VOCABULARY
    assert again.bytes_per_token == 3001 / len(again.comparing)
    assert len(again.training) < len(TEXT)  # of which some are of several bytes

    monkeypatch.setattr(tokens, "corpus", lambda: Corpus(TEXT + TEXT, b"a", b"b"))
    other = tokens.tokenised(VOCABULARY)
    assert len(list(Path("elsewhere").iterdir())) == 2
    assert other.corpus != again.corpus and other.digest != again.digest


def test_long_text_is_cut_at_the_ends_of_lines(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 100)
    pieces = list(tokens._pieces(TEXT + b"no end of line"))
    assert "".join(pieces).encode() == TEXT + b"no end of line"
    assert len(pieces) > 20
    assert all(piece.endswith("\n") and len(piece) > 100 for piece in pieces[:-1])


def test_two_processes_may_ask_at_once():
    pytest.importorskip("tokenizers")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=tokens.tokenised, args=(VOCABULARY,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (path,) = tokens.FOLDER.iterdir()
    assert tokens.Tokens.load(path).digest == tokens.tokenised(VOCABULARY).digest


# ---- the model ------------------------------------------------------------------------


def test_the_model_has_the_parameters_of_gpt2_small():
    size = gpt2.SMALL
    with torch.device("meta"):
        model = GPT(size.context, size.width, size.heads, size.layers, 50_257, tied=True)
    assert model.head.weight is model.embedding.weight
    biases = 12 * (3 + 1 + 4 + 1 + 1 + 1) * 768 + 768
    assert sum(param.numel() for param in model.parameters()) == 124_439_808 - biases


def test_the_options_leave_the_demos_model_as_it_was():
    models = [GPT(8, 16, 2, 1), GPT(8, 16, 2, 1, vocabulary=256, tied=False)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(0))
    assert [name for name, _ in models[0].named_parameters()][-1] == "head.weight"
    assert models[0].head.weight.shape == (256, 16)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


# ---- runs -----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(prepared, tmp_path, capsys):
    out = tmp_path / "out"
    assert experiments.main(["run", "--gpt2", "--out", str(out)]) == 2
    assert "gpt2 needs a GPU" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_without_tokens_it_is_refused(tmp_path, capsys):
    assert run_tiny(tmp_path) == 2
    assert "bench.experiments prepare makes it" in capsys.readouterr().err


def test_other_tokens_are_not_added_to(prepared, tmp_path, monkeypatch, capsys):
    gpt2.Runs(tmp_path, tiny=True)
    monkeypatch.setattr(tokens, "corpus", lambda: Corpus(TEXT + TEXT, TEXT[:2000], TEXT[:2000]))
    gpt2.prepare()
    assert run_tiny(tmp_path) == 2
    assert "another text" in capsys.readouterr().err


def test_options_of_gpt2_are_refused_without_it(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["run", "--tiny"])
    assert "--tiny and --seconds are of --gpt2" in capsys.readouterr().err


def test_all_runs_are_made_and_what_was_cut_begins_anew(prepared, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_tiny(whole) == 0
    task = gpt2.TINY.task()
    cells = [cell for _, cell in gpt2.plan(task)]
    assert [run.cell for run in Results(whole)] == cells
    assert [(cell.lr, cell.warmup) for cell in cells[::4]] == [
        (6e-4, True), (1.2e-3, True), (1.2e-3, False)
    ]  # fmt: skip
    for run in Results(whole):
        assert run.curve[-1] < run.curve[0] and len(run.curve) == PARTS
        assert bool(run.at_cap) is run.cell.contestant.startswith("AM-AdamW")
        assert run.comparing != run.choosing
    settings = json.loads((whole / "settings.json").read_text())
    assert settings["bytes_per_token"] == gpt2.read_tokens().bytes_per_token

    lines = progress(whole)
    assert len(lines) == PARTS * len(cells)
    for run, at in zip(Results(whole), itertools.count(0, PARTS)):
        of_run = lines[at : at + PARTS]
        assert {line["contestant"] for line in of_run} == {run.cell.contestant}
        assert [line["step"] for line in of_run] == list(range(1, task.steps + 1))
        assert [line["training"] for line in of_run] == pytest.approx(run.training, rel=1e-3)
        assert [line["curve"] for line in of_run] == pytest.approx(run.curve, rel=1e-3)
        assert {line["beta"] is None for line in of_run} == {not run.at_cap}

    add = gpt2.Lines.add

    def interrupted(self, found):
        add(self, found)
        if len(progress(cut)) == 2 * PARTS + 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpt2.Lines, "add", interrupted)
        assert run_tiny(cut) == 130
    assert rows(cut) == rows(whole)[:2]
    left = [{**line, "seconds": 0} for line in progress(cut)]
    assert left == [{**line, "seconds": 0} for line in lines[: 2 * PARTS + 7]]
    with (cut / gpt2.PROGRESS).open("a") as file:
        file.write('{"task": "gpt2-ti')  # as where it was killed while it wrote

    assert run_tiny(cut) == 0
    assert rows(cut) == rows(whole)
    assert len(progress(cut)) == len(lines)


def test_no_run_begins_that_the_time_is_too_short_for(prepared, tmp_path, monkeypatch, capsys):
    clock = itertools.count()
    begun = []

    def hundred_seconds(task, contestant, cell, environment, report):
        begun.append(cell)
        for _ in range(100):
            next(clock)
        return Run(cell, environment, 1.0, 1.0, [1.0], [1.0], 1.0, 1.0)

    monkeypatch.setattr(gpt2, "train", hundred_seconds)
    monkeypatch.setattr(gpt2.time, "perf_counter", lambda: next(clock))
    arguments = ["run", "--gpt2", "--tiny", "--out", str(tmp_path), "--seconds"]
    assert experiments.main([*arguments, "250"]) == 0
    assert len(begun) == 2
    assert "longer than there is time" in capsys.readouterr().out
    assert experiments.main([*arguments, "1000"]) == 0
    assert len(begun) == len(set(begun)) == len(gpt2.PLAN)


def test_torch_and_numpy_are_enough(prepared, tmp_path):
    absent = (
        "lion_pytorch", "matplotlib", "schedulefree", "scipy", "sklearn", "tabulate", "tokenizers",
        "tqdm",
    )  # fmt: skip
    program = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import torch
torch.set_num_threads(1)
from bench.experiments import gpt2
from bench.experiments.__main__ import main
gpt2.PLAN = gpt2.PLAN[:3]
raise SystemExit(main(["run", "--gpt2", "--tiny", "--out", "out"]))
"""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True)
    assert len(rows(tmp_path / "out")) == 3


# ---- as on a GPU ----------------------------------------------------------------------


def test_the_model_is_compiled_once_for_all_contestants(prepared, tmp_path, stand_in):
    assert run_tiny(tmp_path) == 0
    assert stand_in.frame_count == 1
    assert len(rows(tmp_path)) == len(gpt2.PLAN)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["environments"][0]["gpu"] == {"name": "stand-in"}


@pytest.mark.parametrize("name", ["AdamW 0.9", "AM-AdamW level tensor", "AM-AdamW level row"])
def test_reading_losses_later_changes_no_number(prepared, name, request):
    task = replace(gpt2.TINY.task(), steps=47)
    cell = Cell(task.name, name, 1e-2, True, 0)
    seen: list[list[Progress]] = [[], []]
    first = train(task, CONTESTANTS[name], cell, report=seen[0].append)
    stand_in = request.getfixturevalue("stand_in")
    second = train(replace(task), CONTESTANTS[name], cell, report=seen[1].append)
    assert stand_in.frame_count == 0  # the same problem, which was made without a GPU
    assert second.step_us > 0 and second.optimizer_us > 0
    assert replace(second, step_us=first.step_us, optimizer_us=first.optimizer_us) == first
    assert [replace(p, seconds=0) for p in seen[0]] == [replace(p, seconds=0) for p in seen[1]]


@pytest.mark.parametrize("parts", [1, PARTS])
def test_a_run_that_diverges_ends_where_losses_are_read(prepared, parts, monkeypatch, request):
    monkeypatch.setattr(training, "PARTS", parts)
    task = replace(gpt2.TINY.task(), steps=60)
    cell = Cell(task.name, "AdamW 0.9", 1e30, False, 0)
    runs = [train(task, CONTESTANTS["AdamW 0.9"], cell)]
    request.getfixturevalue("stand_in")
    runs.append(train(task, CONTESTANTS["AdamW 0.9"], cell))
    for run in runs:
        assert (run.choosing, run.comparing) == (float("inf"), float("inf"))
        assert len(run.training) == 1 and not math.isfinite(run.training[0])
        assert run.curve == []
