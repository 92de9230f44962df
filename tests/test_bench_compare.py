"""python -m bench compare: a slow-down is found, noise is not."""

import pytest

from bench import __main__ as commands
from bench.kernels.results import Report, Row

BASE = [[1.0, 1.01, 0.99], [1.01, 1.0, 0.99], [1.0, 1.0, 1.0]]


def row(contestant, factor=1.0, samples=BASE, **values):
    step = [[factor * seconds for seconds in rounds] for rounds in samples]
    return Row("8-llc", 1000, 1, "float32", "warm", contestant, "adamw", step=step, **values)


def write(tmp_path, name, *rows, **environment):
    path = tmp_path / name
    Report({}, environment, {}, list(rows)).write(path)
    return str(path)


@pytest.fixture
def compare(tmp_path, capsys):
    def run(before, after, *options):
        status = commands.main(["compare", before, after, *options])
        return status, capsys.readouterr().out

    return run


@pytest.fixture
def before(tmp_path):
    return write(tmp_path, "before.json", row("AdamW fused"), row("AMAdamW cpu", 1.5))


def test_a_planted_slow_down_of_20_percent_is_a_regression(tmp_path, before, compare):
    after = write(tmp_path, "after.json", row("AdamW fused"), row("AMAdamW cpu", 1.2 * 1.5))
    status, out = compare(before, after)
    assert status == 1
    assert "AMAdamW cpu" in out and "+20.0%" in out and "slower" in out
    assert "1 rows compared: 1 slower and 0 faster" in out


def test_the_same_result_is_no_regression(before, compare):
    assert compare(before, before) == (
        0, "1 rows compared: 0 slower and 0 faster by more than 10% and their spread.\n"
    )  # fmt: skip


def test_a_machine_that_is_slower_for_both_sides_is_no_regression(tmp_path, before, compare):
    after = write(tmp_path, "after.json", row("AdamW fused", 2.0), row("AMAdamW cpu", 3.0))
    assert compare(before, after)[0] == 0


def test_a_gain_is_told_and_passes(tmp_path, before, compare):
    after = write(tmp_path, "after.json", row("AdamW fused"), row("AMAdamW cpu", 1.0))
    status, out = compare(before, after)
    assert status == 0
    assert "faster" in out and "-33.3%" in out


@pytest.mark.parametrize(("limit", "status"), [("15", 1), ("25", 0)])
def test_the_limit_is_a_choice(tmp_path, before, compare, limit, status):
    after = write(tmp_path, "after.json", row("AdamW fused"), row("AMAdamW cpu", 1.2 * 1.5))
    assert compare(before, after, "--limit", limit)[0] == status


def test_a_change_within_its_spread_is_none(tmp_path, before, compare):
    wild = [[1.0, 1.4, 1.1], [1.6, 1.2, 1.3], [1.1, 1.5, 0.9]]
    after = write(tmp_path, "after.json", row("AdamW fused"), row("AMAdamW cpu", 1.5, wild))
    status, out = compare(before, after, "--all")
    assert status == 0
    assert "+20.0%" in out and "slower" not in out.splitlines()[2]


def test_a_contestant_that_fails_now_is_a_regression(tmp_path, before, compare):
    failing = row("AMAdamW cpu", samples=[], reason="RuntimeError: no")
    after = write(tmp_path, "after.json", row("AdamW fused"), failing)
    status, out = compare(before, after)
    assert status == 1
    assert "RuntimeError: no" in out


def test_another_device_is_noted(tmp_path, compare):
    rows = [row("AdamW fused"), row("AMAdamW cpu")]
    before = write(tmp_path, "before.json", *rows, device="a")
    after = write(tmp_path, "after.json", *rows, device="b")
    assert "note: device was a and is b" in compare(before, after)[1]


def test_results_without_a_common_row_cannot_be_compared(tmp_path, before):
    after = write(tmp_path, "after.json", row("AdamW fused"))
    assert commands.main(["compare", before, after]) == 2


@pytest.mark.parametrize("content", [None, "no JSON", '{"rows": [{"name": 1}]}', "{}"])
def test_a_file_that_is_no_result_is_an_error(tmp_path, before, content, capsys):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as error:
        commands.main(["compare", before, str(path)])
    assert error.value.code == 2
    assert "other.json" in capsys.readouterr().err
