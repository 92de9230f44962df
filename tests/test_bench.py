"""The demo: it runs end to end, and its numbers mean what they say."""

import json
import math
import struct

import pytest
import torch

from adamem_fused.backends import cpu_library, ops
from bench import demo
from bench.arguments import output_folder
from bench.demo_report import Comparison, Run, format_table, steps_to_reach
from bench.demo_text import HELD_OUT_FILES, TRAINING_FILES, Text, read_text, standard_library
from bench.environment import cache_sizes, environment

needs_extension = pytest.mark.skipif(ops.unavailable is not None, reason=str(ops.unavailable))

# Quicker than --quick.
ADAPTIVE = ["AMAdamW level", "AMAdamW anchored", "AMAdamW level, row"]
SHORT = ["--quick", "--steps", "6", "--eval-every", "4", "--eval-windows", "8"]


def run_demo(out, *options):
    status = demo.main([*SHORT, "--out", str(out), *options])
    report = json.loads((out / "demo.json").read_text())
    return status, report


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    status, report = run_demo(out)
    return out, status, report


# ---- demo -----------------------------------------------------------------------------


def test_the_demo_says_at_once_that_it_needs_the_extension(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "extension", None)
    monkeypatch.setattr(cpu_library, "unavailable", "it was not compiled")
    with pytest.raises(SystemExit, match="needs the cpu backend: it was not compiled"):
        demo.main([*SHORT, "--out", str(tmp_path)])


@needs_extension
def test_quick_demo_writes_numbers_of_every_contestant(demo_run):
    _, status, report = demo_run
    assert status == 0
    assert list(report["contestants"]) == ["AdamW", *ADAPTIVE]
    assert report["unfinished"] == []
    assert report["config"]["seed"] == 0
    assert report["environment"]["torch"] == torch.__version__
    for numbers in report["contestants"].values():
        assert numbers["eval_steps"] == [0, 4, 6]
        assert len(numbers["held_out_losses"]) == 3
        assert len(numbers["mean_train_losses_between"]) == 2
        assert numbers["final_held_out_loss"] == numbers["held_out_losses"][-1]
        assert numbers["final_held_out_loss"] < numbers["held_out_losses"][0]
        assert numbers["diverged_at"] is None
        assert all(ms > 0 for ms in numbers["optimizer_ms_quartiles"])


@needs_extension
def test_contestants_start_from_the_same_loss_and_then_differ(demo_run):
    curves = [n["held_out_losses"] for n in demo_run[2]["contestants"].values()]
    assert len({curve[0] for curve in curves}) == 1
    # An untrained model knows nothing of bytes.
    assert curves[0][0] == pytest.approx(math.log(256), abs=0.2)
    assert len({curve[-1] for curve in curves}) == 4


@needs_extension
def test_beta_of_adamw_is_fixed_and_that_of_am_adamw_is_not(demo_run):
    contestants = demo_run[2]["contestants"]
    assert list(contestants["AdamW"]["mean_beta_by_tensor"].values()) == pytest.approx([0.9] * 22)
    for name in ADAPTIVE:
        betas = contestants[name]["mean_beta_by_tensor"]
        assert len(betas) == 22
        assert all(0 <= beta <= demo.BETA_CAP + 1e-6 for beta in betas.values())
        assert len(set(betas.values())) > 1


@needs_extension
def test_the_share_at_the_cap_and_the_optimizers_time_are_told(demo_run):
    contestants = demo_run[2]["contestants"]
    assert contestants["AdamW"]["mean_at_cap"] is None
    assert contestants["AdamW"]["optimizer_time_to_baseline"] == 1.0
    for name in ADAPTIVE:
        assert 1 / 6 <= contestants[name]["mean_at_cap"] <= 1  # that of the first step is 1
        assert contestants[name]["optimizer_time_to_baseline"] > 0


@needs_extension
def test_betas_by_row_are_told_of_one_matrix(demo_run):
    for name, numbers in demo_run[2]["contestants"].items():
        found = numbers.get("beta_by_row_of_embedding")
        assert (found is not None) is (name == "AMAdamW level, row")
    means, deciles = found["mean_by_other_row"], found["deciles_of_the_rows_by_part_of_the_run"]
    assert len(means) + found["rows_without_a_gradient"] == 256  # a byte each
    assert 10 < len(means) < 200 and len(set(means)) > 5
    assert [len(of_part) for of_part in deciles] == [11] * 6  # steps
    assert all(of_part == sorted(of_part) for of_part in deciles)
    assert deciles[0] == pytest.approx([demo.BETA_CAP] * 11, abs=1e-4)


@needs_extension
def test_same_seed_gives_the_same_losses_and_another_seed_others(demo_run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "plot", lambda *args: None)

    def curves(report):
        return [n["held_out_losses"] for n in report["contestants"].values()]

    first = curves(demo_run[2])
    assert curves(run_demo(tmp_path)[1]) == first
    assert curves(run_demo(tmp_path, "--seed", "1")[1]) != first


@needs_extension
def test_picture_is_a_png_of_a_readable_size(demo_run):
    content = (demo_run[0] / "demo.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (2100, 1912)
    assert len(content) > 20_000


@needs_extension
def test_interrupted_demo_keeps_the_runs_that_finished(tmp_path, monkeypatch, capsys):
    train = demo.train

    def interrupted(name, *args):
        if name == "AMAdamW level":
            raise KeyboardInterrupt
        return train(name, *args)

    monkeypatch.setattr(demo, "train", interrupted)
    status, report = run_demo(tmp_path)
    assert status == 130
    assert list(report["contestants"]) == ["AdamW"]
    assert report["unfinished"] == ADAPTIVE
    assert (tmp_path / "demo.png").exists()
    assert f"Interrupted. Not finished: {', '.join(ADAPTIVE)}." in capsys.readouterr().out


def test_demo_interrupted_at_once_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    assert demo.main([*SHORT, "--out", str(tmp_path)]) == 130
    assert "Interrupted. Not finished: AdamW," in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@needs_extension
def test_diverging_contestant_is_a_row_that_says_when(tmp_path, capsys):
    status, report = run_demo(tmp_path, "--lr", "1e30")
    assert status == 0
    for numbers in report["contestants"].values():
        assert numbers["final_held_out_loss"] is None
        assert numbers["steps_to_baseline_loss"] is None
        assert 1 <= numbers["diverged_at"] <= 6
    assert capsys.readouterr().out.count("diverged at step") == 4


def test_quick_yields_to_options_that_are_given(tmp_path):
    args = demo.parse_args(["--quick", "--steps", "7", "--out", str(tmp_path)])
    assert args.steps == 7
    assert args.batch_size == demo.QUICK["batch_size"]


def test_held_out_files_are_not_trained_on():
    assert not set(TRAINING_FILES) & set(HELD_OUT_FILES)
    assert list(TRAINING_FILES) == sorted(TRAINING_FILES)
    training = read_text(TRAINING_FILES, standard_library()).content
    for name in HELD_OUT_FILES:
        assert read_text((name,), standard_library()).content not in training


def test_batches_come_from_the_training_text_alone():
    config = demo.Config(
        steps=3, batch_size=5, lr=1e-3, weight_decay=0.0, seed=0, threads=1, eval_every=1,
        eval_windows=4, context=8,
    )  # fmt: skip
    text = bytes(range(100))
    batches = list(demo.training_batches(text, config))
    assert [tuple(batch.shape) for batch in batches] == [(5, 9)] * 3
    assert all(bytes(window.tolist()) in text for batch in batches for window in batch)
    windows = demo.held_out_windows(text, config)
    assert windows[:, 0].tolist() == [0, 30, 60, 91]


def test_missing_source_files_are_named(tmp_path):
    (tmp_path / "a.py").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"lacks b\.py, c\.py"):
        read_text(("a.py", "b.py", "c.py"), tmp_path)


# ---- demo: numbers from made-up curves ------------------------------------------------


def made_up(name, losses, **values):
    steps = list(range(0, 10 * len(losses), 10))
    return Run(name, ["a", "b"], eval_steps=steps, held_out_losses=losses, **values)


@pytest.mark.parametrize(
    ("target", "reached"),
    [(5.0, 0), (3.0, 10), (2.9, 20), (2.0, 20), (1.9, None), (None, None)],
)
def test_steps_to_reach_is_the_first_loss_at_or_below_the_target(target, reached):
    assert steps_to_reach(made_up("x", [5.0, 3.0, 2.0, 2.5]), target) == reached


def test_run_averages_betas_and_training_losses():
    run = made_up(
        "x", [5.0, 3.0], train_losses=[float(i) for i in range(10)], betas=[[0.0, 0.5], [0.2, 0.7]]
    )
    assert run.train_curve == [4.5]
    assert run.mean_betas == pytest.approx([0.1, 0.6])
    assert run.mean_beta == pytest.approx(0.35)
    assert run.final_loss == 3.0
    assert made_up("x", [5.0, 3.0], diverged_at=11).final_loss is None
    assert made_up("x", [5.0], at_cap=[1.0, 0.5]).mean_at_cap == 0.75


def test_table_compares_with_the_baseline():
    text = Text((), b"")
    config = {"steps": 20, "batch_size": 1, "context": 8, "lr": 0.1, "weight_decay": 0.0}
    config |= {"seed": 0, "threads": 1, "eval_every": 10}
    runs = [
        made_up("AdamW", [5.0, 3.0, 2.0], optimizer_ms=[1.0, 2.0, 3.0]),
        made_up("AMAdamW level", [5.0, 1.9, 1.0], optimizer_ms=[2.0, 2.0, 3.5], at_cap=[0.8]),
        made_up("AMAdamW anchored", [5.0], optimizer_ms=[2.0], diverged_at=2),
    ]
    table = format_table(Comparison(config, [1, 2], "AdamW", 0.89, text, text, runs))
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    assert rows["AdamW"][1:3] == ["2.0000", "20"]
    assert rows["AMAdamW level"][2:4] == ["1.0000", "10"]
    assert rows["AMAdamW level"][5] == "80%" and rows["AMAdamW level"][-2] == "1.25"
    assert rows["AdamW"][-2] == "1.00" and rows["AMAdamW anchored"][-2] == "-"


# ---- command line --------------------------------------------------------------------------


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as error:
        demo.main(["--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert "python -m bench.demo" in out
    assert "--threads" in out and "--out" in out and "--quick" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number of at least 1"),
        (["--steps", "1.5"], "argument --steps: '1.5' is not a whole number"),
        (["--lr", "nan"], "argument --lr: 'nan' is not a finite number above 0"),
        (["--lr", "much"], "argument --lr: 'much' is not a finite number above 0"),
        (["--weight-decay", "-1"], "argument --weight-decay: '-1' is not a finite number"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number in [0, 2**63)"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_option_is_named_with_its_value(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        demo.main([*options, "--out", str(tmp_path)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_output_folder_that_cannot_be_made_is_an_error_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        demo.main(["--out", str(tmp_path / "file" / "folder")])
    assert error.value.code == 2
    assert "argument --out" in capsys.readouterr().err


def test_output_folder_is_made_with_its_parents(tmp_path):
    assert output_folder(str(tmp_path / "a" / "b")).is_dir()


def test_cache_sizes_are_read_by_level_without_the_instruction_cache(tmp_path):
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "1M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert cache_sizes(tmp_path) == {1: 2**15, 2: 2**20}
    assert cache_sizes(tmp_path / "none") == {}


def test_environment_names_versions_and_cpu():
    found = environment()
    assert found["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in found.values())
