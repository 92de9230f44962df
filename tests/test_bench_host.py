"""python -m bench host: what it times is a step whose addresses change as said."""

import itertools
import json

import pytest

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import tables
from bench import __main__ as commands
from bench import host


@pytest.mark.parametrize("cls", [AMAdamW, AMSGD])
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize(
    ("change", "new"),
    [("nothing", 0), ("gradients", 1), ("everything", None), ("state replaced", None)],
)
def test_the_addresses_are_new_of_which_it_is_said(monkeypatch, cls, scope, change, new):
    """new: how many of a parameter's tensors, None for all."""
    addresses = []
    open_tables = tables.open_tables

    def watched(*args):
        opened = open_tables(*args)
        addresses.append(opened.tables.addresses)
        return opened

    monkeypatch.setattr("adamem_fused.backends.triton.open_tables", watched)
    assert len(host.step_times(cls, change, tensors=3, steps=4, scope=scope)) == 4
    timed = addresses[1:]  # the first step makes the state
    assert len(timed) == 9
    if new is None:
        new = 2 + len(cls.memories) + len(cls.scalars)
    assert [int((a != b).sum()) for a, b in itertools.pairwise(timed)] == [3 * new] * 8


def test_the_command_prints_quartiles_and_writes_every_sample(tmp_path, capsys):
    assert commands.main(["host", "--tensors", "2", "--steps", "3", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("gradients") == 4
    seconds = json.loads((tmp_path / "host.json").read_text())["seconds"]
    assert list(seconds) == ["AMAdamW", "AMAdamW, row", "AMSGD", "AMSGD, row"]
    assert [list(changes) for changes in seconds.values()] == [list(host.CHANGES)] * 4
    assert all(len(times) == 3 for changes in seconds.values() for times in changes.values())


def test_a_row_is_the_median_and_the_quartiles():
    result = {"seconds": {"AMSGD": {"nothing": [1e-6 * us for us in (1, 2, 3, 4, 5, 6, 7)]}}}
    assert host.table_cells(result) == [["AMSGD", "nothing", "4 (2 to 6)"]]


def test_without_triton_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs triton"):
        commands.main(["host", "--out", str(tmp_path)])
