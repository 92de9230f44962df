"""bench.gpu_check as far as it goes without a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from bench import gpu_cases, gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_whole_llama_has_all_parameters():
    shapes = gpu_cases.llama2_7b(layers=32)
    assert len(shapes) == 291
    assert sum(map(math.prod, shapes)) == 6_738_415_616


@pytest.mark.parametrize("gib, layers", [(8, 1), (80, 12), (140, 23), (1000, 32)])
def test_llamas_layers_fit_the_memory(gib, layers):
    assert gpu_cases.llama_that_fits(gib * 2**30) == gpu_cases.llama2_7b(layers)


def test_the_table_marks_what_missed_its_target(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test Device")
    timing = gpu_check.Timing("one tensor", "triton", target=1.6, numel=10**9)
    timing.step, timing.torch_step = [0.044, 0.044], [0.022, 0.022]
    table = gpu_check.format_table([timing], {"tests": "1 passed"}, copy=2e12)
    row = table.splitlines()[1]
    assert row.split()[-6:] == ["44.000", "22.000", "2.00", "1.60", "50%", "missed"]
    assert "tests: 1 passed" in table
    timing.torch_step = [0.044, 0.044]
    assert "missed" not in gpu_check.format_table([timing], {}, copy=2e12)
    timing.target, timing.step = None, [1.0, 1.0]
    assert "missed" not in gpu_check.format_table([timing], {}, copy=2e12)


def test_the_picture_is_written(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test Device")
    timing = gpu_check.Timing("one tensor", "triton", target=1.6, numel=10)
    timing.step = timing.torch_step = [1.0] * gpu_check.PAIRS
    gpu_check.write_png([timing], tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_only_files_with_gpu_tests_are_run_and_their_last_line_is_reported(tmp_path):
    """Here they are all skipped, or deselected."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: gpu_check runs them itself")
    result = gpu_check.run_tests(tmp_path / "log")
    assert "skipped" in result and "failed" not in result
    assert "test_gpu.py" in (tmp_path / "log").read_text()


def test_the_sanitizer_runs_both_tools_or_says_that_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    assert gpu_check.sanitize(tmp_path) == {"compute-sanitizer": "skipped: it is not installed"}
    stub = tmp_path / "sanitizer"
    stub.write_text('#!/bin/sh\n[ "$2" = memcheck ] || exit 9\n')
    stub.chmod(0o755)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: str(stub))
    assert gpu_check.sanitize(tmp_path) == {
        "compute-sanitizer memcheck": "no errors",
        "compute-sanitizer racecheck": "failed: see racecheck.log",
    }
