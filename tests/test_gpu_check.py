"""bench.gpu_check without a GPU: the whole of it as a dry run (gpu_stand_in/), and its parts."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adamem_fused.backends import cuda_library, ops
from bench import gpu_cases
from bench.gpu_check import (
    __main__,
    counters,
    cuda_sizes,
    processes,
    record,
    sanitizer,
    suite,
    sweep,
    times,
)
from bench.kernels import parameter_lists

HERE = Path(__file__).parent
BACKENDS = ("cuda", "triton")
STAND_IN = [sys.executable, str(HERE / "gpu_stand_in")]


def start(folder: Path, *arguments: str, fault: str = "::") -> subprocess.Popen:
    """The check on the CPU. Its limits are wide, as other work may slow it down."""
    return subprocess.Popen(
        [*STAND_IN, "-m", "bench.gpu_check", "--out", folder, "--seconds", "1200", *arguments],
        cwd=HERE.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
            "TRITON_INTERPRET": "1",
            "STAND_IN_FAULT": fault,
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.emulated
def test_the_whole_check(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    process = start(tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    stages = read(tmp_path)["stages"]
    assert list(stages) == ["build", *__main__.STAGES]
    for stage, parts in stages.items():
        whole = {"build": ["all"], "ncu": ["all"], "tests": list(suite.RUNS)}
        expected = whole.get(stage, BACKENDS)
        assert list(parts) == list(expected)
        assert {part["ended"] for part in parts.values()} == {"done"}
        for part in parts.values():
            assert part["cases"]
            assert not any("failed" in case for case in part["cases"].values())
        assert stage == "build" or f"\n{stage}: done" in output
    # A row of each table.
    assert "cuda     AMSGD tiny float32 " in output
    assert "gpt2-small, AMAdamW, float32, below " in output
    assert "gpt2-small, AMAdamW anchored, float32, row " in output
    assert "triton  2^28, chunk=128 block=64 " in output
    assert "gpt2-small, float32, triton " in output
    assert "gpt2-small, bfloat16 and state, triton, row " in output
    assert "triton   AMAdamW row bfloat16 corrected, int8 as the reference" in output
    assert "32x524288, AMAdamW, bfloat16 and state, row " in output
    assert "side by side: 2 passed, 0 failed, 0 error, 1 skipped" in output
    assert "triton   memcheck, planted            it is found" in output
    # The sizes of the CUDA kernels are fixed here: that is said, and fails nothing.
    assert "not done: sweep cuda, sizes: " in output
    names = {path.name for path in tmp_path.iterdir()}
    logs = {"ncu.csv", "tests-side-by-side.log", "tests-alone.log", "sanitizer.log"}
    assert names - {"gpu.png"} == {"gpu.json", *logs}
    assert "Invalid __global__ read" in (tmp_path / "sanitizer.log").read_text()


def test_a_run_that_is_cut_off_loses_nothing_and_a_backend_that_is_wrong_is_left_out(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    process = start(tmp_path, "--stages", "smoke", fault="smoke:cuda:hangs")
    while "AMAdamW tiny float32" not in (text := read_text(tmp_path)):
        assert process.poll() is None, text
        time.sleep(0.1)
    process.kill()
    process.communicate()  # to the end of all that it has started
    stages = read(tmp_path)["stages"]
    assert list(stages["smoke"]) == ["cuda"] and stages["smoke"]["cuda"]["ended"] == "cut off"
    assert "as the reference" in stages["smoke"]["cuda"]["cases"]["AMAdamW tiny float32"]["found"]

    process = start(tmp_path, "--stages", "sanitizer,smoke", fault="smoke:cuda:wrong")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "smoke cuda, AMAdamW 2^20 float32: AssertionError: param is off by" in output
    assert "not done: sanitizer cuda: its smoke failed" in output
    assert "smoke: failed" in output and "sanitizer: done" in output
    assert list(read(tmp_path)["stages"]["sanitizer"]) == ["triton"]


def read_text(folder: Path) -> str:
    path = folder / "gpu.json"
    return path.read_text() if path.exists() else ""


def test_a_stage_that_breaks_the_check_itself_is_not_the_last(tmp_path, monkeypatch, capsys):
    def run(check, seconds):
        check.results.begin("ncu", "all")
        raise KeyError("a typo")

    monkeypatch.setitem(__main__.STAGES, "ncu", __main__.Stage(1, run, lambda stage: []))
    results = record.Results(tmp_path)
    results.data["backends"] = {"cuda": None, "triton": "it is not installed"}
    assert not __main__.run_stage("ncu", results, 1)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "==== ncu, 1 s",
        "ncu: KeyError('a typo')",
        "ncu all: cut off",
        "not done: ncu triton: it is not installed",
        "ncu: failed, 0 s",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert __main__.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_stages_are_taken_in_their_order_and_unknown_ones_refused(capsys):
    assert __main__.stage_names("tests,smoke") == ["smoke", "tests"]
    with pytest.raises(SystemExit):
        __main__.main(["--stages", "smoke,test"])
    assert "'test' is none of smoke, times" in capsys.readouterr().err


# ---- the lists ------------------------------------------------------------------------


def test_a_whole_llama_has_all_parameters():
    shapes = gpu_cases.llama2_7b(layers=32)
    assert len(shapes) == 291
    assert sum(map(math.prod, shapes)) == 6_738_415_616


@pytest.mark.parametrize("gib, layers", [(8, 1), (80, 12), (140, 23), (1000, 32)])
def test_llamas_layers_fit_the_memory(gib, layers):
    assert gpu_cases.llama_that_fits(gib * 2**30) == gpu_cases.llama2_7b(layers)


FLOAT32_BFLOAT16 = gpu_cases.Format("", torch.float32, 2.0, {"state_dtype": torch.bfloat16})


@pytest.mark.parametrize(
    "optimizer, shapes, format, missed, expected",
    [
        ("AMAdamW", ((2**28,),), gpu_cases.FLOAT32, 0.0, 28),
        ("AMAdamW", ((2**28,),), gpu_cases.FLOAT32, 1.0, 51.88),
        ("AMAdamW", ((2**25,),) * 8, gpu_cases.FLOAT32, 0.12, 30.76),
        ("AMAdamW", ((1000, 1000), (300,)), gpu_cases.FLOAT32, 1.0, 28),  # all of it stays in L2
        ("AMAdamW", ((2**28,),), gpu_cases.BFLOAT16, 0.0, 33.88),
        ("AMAdamW", ((2**14, 2**14),), gpu_cases.BFLOAT16, 0.0, 33.88),
        ("AMAdamW", ((2**28,),), gpu_cases.ALL_BFLOAT16, 0.0, 14),
        ("AMAdamW", ((2**28,),), gpu_cases.ALL_BFLOAT16, 1.0, 25.88),
        ("AMAdamW", ((2**28,),), FLOAT32_BFLOAT16, 0.0, 20),
        ("AMAdamW", ((2**28,),), gpu_cases.INT8_STATE, 0.0, 16.06),
        ("AMSGD", ((10,),), gpu_cases.FLOAT32, 0.0, 20),
        ("AMSGD", ((2**20,),) * 256, gpu_cases.FLOAT32, 0.0, 27.88),  # one beta, over all of them
    ],
)
def test_predicted_bytes(optimizer, shapes, format, missed, expected):
    found = gpu_cases.predicted_bytes(optimizer, shapes, format, 50 * 2**20, missed)
    assert found == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("name", ["gpt2-small", "llama-2-7b", "resnet-50"])
@pytest.mark.parametrize(
    "format, expected",
    [
        (gpu_cases.FLOAT32, 28),
        (gpu_cases.BFLOAT16, 22),
        (gpu_cases.ALL_BFLOAT16, 14),
        (gpu_cases.INT8_STATE, 16.06),
        (gpu_cases.BFLOAT16_INT8, 10.06),
    ],
)
def test_predicted_bytes_of_a_model_by_row_are_those_of_one_reading(name, format, expected):
    shapes = gpu_cases.cases(80 * 2**30)[name].shapes
    held = gpu_cases.LONGEST_ROW["cuda"]
    found = gpu_cases.predicted_bytes("AMAdamW", shapes, format, 0, missed=0.0, longest_row=held)
    assert found == pytest.approx(expected, rel=0.03)
    long = ((3, 2**20),)  # no block holds such a row
    found = gpu_cases.predicted_bytes("AMAdamW", long, gpu_cases.BFLOAT16, 0, 0.0, longest_row=held)
    assert found == 34


# ---- records and processes ------------------------------------------------------------


def test_a_case_that_fails_is_a_record_and_one_too_late_is_not_begun(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record.gpu, "synchronize", lambda: None)
    results = record.Results(tmp_path)
    results.begin("times", "cuda")
    part = record.Part(results, "times", "cuda", deadline=time.time() + 100)

    def not_here():
        raise record.NotDone("too little memory")

    part.case("good", lambda: {"found": 1})
    part.case("wrong", lambda: 1 / 0)
    part.case("large", not_here)
    part.deadline = time.time() - 1
    part.case("late", lambda: pytest.fail("begun"))
    capsys.readouterr()
    again = record.Results(tmp_path)
    assert again.stage("times")["cuda"]["cases"]["good"]["found"] == 1
    assert again.failures("times", "cuda") == [
        "times cuda: cut off",
        "times cuda, wrong: ZeroDivisionError: division by zero",
    ]
    assert again.not_done("times", "cuda") == [
        "times cuda, large: too little memory",
        "times cuda, late: no time was left",
    ]


def test_what_was_found_on_another_device_is_forgotten(tmp_path):
    results = record.Results(tmp_path)
    results.start({"device": "one"})
    results.begin("smoke", "cuda")
    results = record.Results(tmp_path)
    results.start({"device": "one"})
    assert list(results.stage("smoke")) == ["cuda"]
    results.start({"device": "another"})
    assert record.Results(tmp_path).data == {"environment": {"device": "another"}, "stages": {}}


def test_a_process_is_ended_at_its_limit_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.2)
    # It takes no interrupt, and neither does what it has started.
    program = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print(os.fork(), flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    how = processes.Limited([sys.executable, "-c", program], 2, log).end()
    assert how == "failed: not done after 2 s"
    for pid in map(int, filter(lambda word: word != "0", log.read_text().split())):
        deadline = time.monotonic() + 10
        while is_running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_how_a_process_ended(tmp_path):
    def end(program: str) -> str:
        return processes.Limited([sys.executable, "-c", program], 60, tmp_path / "log").end()

    assert end("import os; print(os.environ['ADAMEM_CUDA_JIT'])") == "done"
    assert end("raise SystemExit(3)") == "failed: exit status 3"
    assert end("import os; os.abort()") == f"failed: {signal.SIGABRT.name}"
    assert (tmp_path / "log").read_text().startswith("0\n"), "a JIT would replace a library"


@pytest.mark.parametrize(
    "cpp, cuda, nvcc, compiled",
    [
        (True, True, True, None),
        (True, False, False, None),
        (True, False, True, "1"),
        (False, True, True, "0"),  # the library that was brought along stays
        (False, False, True, "1"),
    ],
)
def test_only_what_is_missing_is_compiled(tmp_path, monkeypatch, cpp, cuda, nvcc, compiled):
    started = []

    class Process:
        def __init__(self, command, seconds, log, environment):
            started.append((command[1:3], environment["ADAMEM_CUDA"]))

        def end(self):
            return "done"

    library = tmp_path / "_cuda.so"
    if cuda:
        library.touch()
    monkeypatch.setattr(__main__, "Limited", Process)
    monkeypatch.setattr(ops, "unavailable", None if cpp else "not compiled")
    monkeypatch.setattr(cuda_library, "LIBRARY", library)
    monkeypatch.setattr(cuda_library, "find_nvcc", lambda: "nvcc" if nvcc else None)
    assert __main__.build(record.Results(tmp_path))
    assert started == ([] if compiled is None else [(["setup.py", "build_ext"], compiled)])


# ---- what other programs say ------------------------------------------------------------

COUNTERS = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "begin_kernel" - 1: 0%....50%....100% - 9 passes
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","4711","void neg_kernel_cuda(at::TensorIteratorBase &)","gpu__time_duration.sum","ns","2,016"
"1","4711","begin_kernel<AdamW<float, float>>","dram__bytes_read.sum","byte","8,000"
"1","4711","begin_kernel<AdamW<float, float>>","dram__bytes_write.sum","byte","3,000.5"
"1","4711","begin_kernel<AdamW<float, float>>","gpu__time_duration.sum","ns","1,000"
"1","4711","begin_kernel<AdamW<float, float>>","lts__t_sector_hit_rate.pct","%","n/a"
"2","4711","finish_kernel","dram__bytes_read.sum","byte","0"
"2","4711","finish_kernel","dram__bytes_write.sum","byte","100"
"2","4711","finish_kernel","gpu__time_duration.sum","ns","1e2"
"""


def test_counters_are_read_from_ncus_output():
    (step,) = counters.steps_of(counters.read_csv(COUNTERS.splitlines()))
    found = counters.summarize(step, numel=100)
    assert found["kernels"] == 2 and found["longest"].startswith("begin_kernel")
    assert (found["read"], found["written"]) == (80.0, 31.005)
    assert found["seconds"] == pytest.approx(1.1e-6)
    assert found["bandwidth"] == pytest.approx(11100.5 / 1.1e-6)
    assert found["l2_hits"] is None
    assert counters.read_csv(["==ERROR== ERR_NVGPUCTRPERM"]) == []
    assert "not_done" in counters.summarize([], numel=100)
    del step[0][counters.READ]
    assert "no number for 'dram__bytes_read.sum'" in counters.summarize(step, 100)["failed"]


LOG = """\
created: 8/8 workers
tests/test_gpu.py::test_one[triton-AMAdamW]
[gw1] [  3%] PASSED tests/test_gpu.py::test_one[triton-AMAdamW]
[gw0] [ 33%] FAILED tests/test_gpu.py::test_two[cuda-dtypes1]
[gw0] [ 66%] SKIPPED tests/test_gpu.py::test_three
SKIPPED [1] tests/test_gpu.py:14: needs two GPUs
FAILED tests/test_gpu.py::test_two[cuda-dtypes1] - AssertionError
"""


def test_outcomes_are_read_from_pytests_log_as_far_as_it_goes():
    found = suite.read_log(LOG)
    assert found["counts"] == {"PASSED": 1, "FAILED": 1, "ERROR": 0, "SKIPPED": 1}
    assert found["failed"] == "1: tests/test_gpu.py::test_two[cuda-dtypes1]"
    assert found["skips"] == ["[1] tests/test_gpu.py:14: needs two GPUs"]
    cut = "\n".join(LOG.splitlines()[:3])
    assert suite.read_log(cut)["counts"]["PASSED"] == 1
    alone = "tests/test_gpu.py::test_one[a b] PASSED   [ 50%]\ntests/test_gpu.py::test_two SKIPPED"
    assert suite.read_log(alone)["counts"] == {"PASSED": 1, "FAILED": 0, "ERROR": 0, "SKIPPED": 1}


def test_tests_that_were_all_skipped_have_not_passed():
    assert (
        suite.read_log("tests/a.py::b SKIPPED (no GPU) [100%]\n")["failed"] == "no test has passed"
    )


def test_the_files_with_tests_marked_gpu_are_run():
    command = suite.command("gpu and slow", 0, ["cuda"])
    files = [Path(word).name for word in command if word.endswith(".py")]
    names = ("", "_cases", "_launches", "_low_precision", "_norms", "_rows")
    assert files == [f"test_gpu{name}.py" for name in names]
    assert command[command.index("-k") + 1] == "not cuda"


def test_the_sanitizer_looks_at_all_triton_kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    from adamem_fused.triton_kernels import kernels

    names = [name for name, value in vars(kernels).items() if hasattr(value, "arg_names")]
    launched = [name for name in names if name.startswith(sanitizer.KERNELS["triton"])]
    own = ["am_prepare", "am_begin", "am_beta", "am_finish", "am_rows", "sum_rows", "sum_shared"]
    assert {*own, "am_squares", "sum_squares"} <= {*launched}


# ---- sizes --------------------------------------------------------------------------------


def test_the_sizes_of_the_sweep_are_sizes_of_the_kernels():
    config = (cuda_library.SOURCES / "config.h").read_text()
    for sizes in cuda_sizes.SIZES:
        changed = cuda_sizes.with_sizes(config, sizes)
        for name, value in sizes.items():
            assert f"{name} = {value}" in changed and f"{name} = {value}" not in config
    with pytest.raises(ValueError, match=r"config\.h defines kNothing 0 times"):
        cuda_sizes.with_sizes(config, {"kNothing": 1})
    pytest.importorskip("triton", reason="triton is not installed")
    from adamem_fused.triton_kernels.config import config_for

    base = config_for("cuda", 9)
    for sizes in sweep.TRITON_SIZES:
        config = base._replace(**sizes)
        assert config != base and config.chunk % config.block == 0
        assert config.programs * config.num_warps * 32 * config.registers <= 65536


# ---- times --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["8x2^25", "gpt2-small", "llama-2-7b", "resnet-50", "5000x1000"])
@pytest.mark.parametrize("gib", [80, 140])
def test_a_mixture_is_one_of_every_list(name, gib):
    sizes = [math.prod(shape) for shape in gpu_cases.cases(gib * 2**30)[name].shapes]
    falling = parameter_lists.some_of(sizes, gpu_cases.MISSED["mixture"])
    least, most = times.AT_CAP["mixture"]
    assert least < 1 - sum(sizes[place] for place in falling) / sum(sizes) < most


def timing(ours: list[float], theirs: list[float], target: float | None = 1.6) -> dict:
    sides = {
        name: {"device": samples, "host": samples, "wall": samples}
        for name, samples in (("ours", ours), ("torch", theirs))
    }
    return {**sides, "numel": 10**9, "target": target, "predicted_bytes": 44, "at_cap": [1.0]}


def test_the_table_marks_what_missed_its_target():
    def row(found: dict) -> list[str]:
        cases = {"copy": {"bandwidth": 2e12}, "one tensor, AMAdamW, float32, cap": found}
        return times.table({"cuda": {"cases": cases}})[-1].split()[5:]

    cells = row(timing([0.044, 0.044], [0.022, 0.022]))
    assert cells[:8] == ["44.000", "22.000", "22.000", "2.00", "2.00", "2.00", "1.60", "50%"]
    assert cells[-1] == "missed"
    assert row(timing([0.044, 0.044], [0.044, 0.044]))[-1] == "100%"
    assert row(timing([0.044, 0.044], [0.022, 0.022], target=None))[-1] == "100%"


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    stage = {"cuda": {"cases": {"one tensor": timing([1.0, 1.1], [1.0, 1.0]), "copy": {}}}}
    times.write_png(stage, "Test Device", tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
