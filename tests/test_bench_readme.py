"""The tables of docs/performance.md are what the committed results say; and bench train."""

import json
import shutil

import pytest

from adamem_fused.backends import ops
from bench import __main__ as commands
from bench import pictures, readme, train
from bench.kernels.results import Report, Row
from bench.readme import BEGIN, END, PAGES, ROOT, performance, replace_section

needs_extension = pytest.mark.skipif(ops.unavailable is not None, reason=str(ops.unavailable))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_section_is_what_the_committed_results_give(page):
    text = (ROOT / page).read_text()
    assert replace_section(text, PAGES[page](ROOT)) == text


def test_the_pictures_are_what_the_committed_results_give(tmp_path):
    made = pictures.write(ROOT, tmp_path)
    assert [path.name for path in made] == ["overview.svg", "bytes.svg", "floors.svg"]
    for path in made:
        assert path.read_text() == (ROOT / pictures.FOLDER / path.name).read_text()


def test_a_section_is_replaced_and_the_rest_kept():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_section(text, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["none", BEGIN, END, f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_text_without_one_section_is_an_error(text):
    with pytest.raises(ValueError, match="not one section"):
        replace_section(text, "new")


STEPS = {
    "AMAdamW cpu": 0.003,
    "AMAdamW cpu, 20% missed": 0.0024,
    "AMAdamW cpu, anchored": 0.0036,
    "AdamW fused": 0.002,
}


@pytest.fixture
def results(tmp_path):
    """A folder of results like the repository's, with made-up numbers."""
    rows = [
        Row("8-llc", 10**6, 1, "float32", "warm", contestant, "adamw", step=[[seconds]] * 2)
        for contestant, seconds in STEPS.items()
    ]
    failed = Row("8-llc", 10**6, 1, "float32", "warm", "a peer", "adamw", reason="ValueError: no")
    report = Report(
        {"device": "cpu", "threads": 2},
        {"device": "A CPU", "torch": "2.13.0", "date": "2026-11-24"},
        {"another peer": "not installed"},
        [*rows, failed],
    )
    folder = tmp_path / "bench" / "results" / "a-cpu"
    folder.mkdir(parents=True)
    report.write(folder / "kernels.json")
    return tmp_path


def test_numbers_targets_and_reasons_are_in_the_section(results):
    text = performance(results)
    assert "### A CPU" in text and "2 threads, torch 2.13.0, 2026-11-24" in text
    targets, row, ratios = [
        [cell.strip() for cell in line.split("|")][1:-1]
        for line in text.splitlines()
        if "AMAdamW cpu / AdamW fused" in line or "| parameters" in line
    ][:3]
    # Nothing of what was not measured: an older report has no betas by row.
    assert targets[3:] == ["nothing missed", "20% missed", "anchored"]
    assert "beta_scope" not in text
    assert row[:3] == ["8-llc", "float32", "AMAdamW cpu / AdamW fused"]
    assert row[3:] == ["1.50 of 1.00, not met", "1.20 of 1.20", "1.80 of 1.90"]
    assert ratios[7:] == ["AMAdamW cpu", "AMAdamW cpu, 20% missed", "AMAdamW cpu, anchored"]
    assert "| 1.50 (1.50 to 1.50) | 1.20 (1.20 to 1.20)       | 1.80 (1.80 to 1.80)" in text
    assert "- a peer: ValueError: no. On 8-llc (float32)" in text
    assert "- another peer: not installed" in text
    assert ".png" not in text  # none is there


def test_betas_by_row_are_in_the_section_where_they_were_measured(results):
    path = results / "bench/results/a-cpu/kernels.json"
    report = Report.read(path)
    took = {"AdamW fused": 0.002, "AMAdamW cpu, row": 0.0026, "AMAdamW cpu, anchored, row": 0.002}
    report.rows += [
        Row("l2", 10**6, 1, "float32", "warm", contestant, "adamw", step=[[seconds]] * 2)
        for contestant, seconds in took.items()
    ]
    report.write(path)
    text = performance(results)
    table = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    headers, of_l2 = table[0], next(row for row in table if row[1].strip() == "l2")
    cells = {h.strip(): cell.strip() for h, cell in zip(headers, of_l2, strict=True)}
    assert (cells["row"], cells["anchored, row"]) == ("1.30 of 1.30", "1.00 of 1.30")
    assert cells["nothing missed"] == "-"
    assert 'Row: `beta_scope="row"`' in text


def test_pictures_that_are_there_are_in_the_section(results):
    (results / "bench/results/a-cpu/ratios.png").write_bytes(b"")
    assert "](../bench/results/a-cpu/ratios.png)" in performance(results)


def test_without_results_there_are_no_numbers(tmp_path):
    assert "Nothing was measured yet." in performance(tmp_path)


def test_the_command_writes_the_sections(results, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", results)
    monkeypatch.setattr(pictures, "write", lambda root, folder: None)
    shutil.copytree(ROOT / readme.RESULTS / readme.LARGER, results / readme.RESULTS / readme.LARGER)
    for page in PAGES:
        (results / page).parent.mkdir(exist_ok=True)
        (results / page).write_text(f"a\n{BEGIN}\n{END}\nb\n")
    assert commands.main(["readme"]) == 0
    for page, section in PAGES.items():
        assert (results / page).read_text() == f"a\n{BEGIN}\n{section(results)}{END}\nb\n"


@needs_extension
def test_training_writes_the_optimizers_time_and_the_share_at_the_cap(tmp_path, capsys):
    assert commands.main(["train", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "train.json").read_text())
    assert [round(m["parameters"] / 1e6, 1) for m in result["models"].values()] == [0.4, 1.9]
    for found in result["models"].values():
        assert found["tokens"] == found["config"]["batch_size"] * found["config"]["context"]
        for name, measured in found["contestants"].items():
            steps, own = measured["step_seconds"], measured["optimizer_seconds"]
            assert len(steps) == len(own) == 3
            assert all(0 < b < a for a, b in zip(steps, own, strict=True))
            assert len(measured["at_cap"]) == (3 if name.startswith("AMAdamW fused") else 0)
            assert measured["at_cap"][:1] in ([], [1.0])  # the first step's beta is the cap
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("AMAdamW fused") for line in lines].count(1) == 4
    assert [line.count("AMAdamW fused, row") for line in lines].count(1) == 2


@pytest.mark.parametrize(
    ("own", "ratio"),
    [(0.021, "1.05 (1.05 to 1.05) of 1.05"), (0.022, "1.10 (1.10 to 1.10) of 1.05, not met")],
)
def test_a_training_is_told_in_means(own, ratio):
    def measured(seconds, at_cap):
        return {"step_seconds": [0.2, 0.4], "optimizer_seconds": seconds, "at_cap": at_cap}

    contestants = {
        "AdamW fused": measured([0.02, 0.04], []),
        "AMAdamW fused": measured([own, 2 * own], [0.8, 0.9]),
        "AMAdamW fused, row": measured([0.03, 0.06], [0.5, 0.6]),  # without a target
    }
    model = {"parameters": 2e6, "tokens": 30, "config": {"steps": 600}, "contestants": contestants}
    rows = train.table_cells({"models": {"a GPT": model}})
    assert rows[0][:5] == ["a GPT", "2.00 M", "600", "AdamW fused", "100"]
    assert rows[0][5:] == ["300.00", "30.000", "10.0%", "-", "-"]
    assert rows[1][-2:] == ["85%", ratio]
    assert rows[2][-2:] == ["55%", "1.50 (1.50 to 1.50)"]


def test_means_are_of_parts_in_order():
    assert train.means(range(25)) == [0.5, 3.0, 5.5, 8.0, 10.5, 13.0, 15.5, 18.0, 20.5, 23.0]
    assert train.means([1.0, 3.0]) == [1.0, 3.0]
    assert train.means([]) == []
