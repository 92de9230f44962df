"""A warning where backend=None takes what is slower, and only there.

That is foreach where a fused backend is missing, and cpu where the compiled extension is.
"""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
from cases import OPTIMIZERS, Group, make_optimizer, set_gradients

from adamem_fused import AMAdamW, backends
from adamem_fused.backends import cpu_library, cuda, ops, triton

both = pytest.mark.parametrize("cls", OPTIMIZERS)
ABSENT = "the C++ extension was compiled against torch 2.9, and this is torch 2.13.0; reinstall"
ANY = {"backend": None, "foreach": None, "fused": None}


@pytest.fixture(autouse=True)
def no_extension(monkeypatch):
    """As where nothing was compiled, in a process that has not warned yet."""
    monkeypatch.setattr(ops, "unavailable", ABSENT)
    monkeypatch.setattr(ops, "extension", None)
    monkeypatch.setattr(cpu_library, "unavailable", ABSENT)
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture
def library(monkeypatch):
    """As after torch was upgraded: the kernels are there, and can be called through ctypes."""
    monkeypatch.setattr(cpu_library, "unavailable", None)


def stepped(cls, **options):
    optimizer = make_optimizer(cls, [Group([(2,)])], **options)
    set_gradients(optimizer, step=0)
    optimizer.step()
    return optimizer


def lines_that_warn(caught, words="foreach backend"):
    return [(Path(w.filename).name, w.lineno) for w in caught if words in str(w.message)]


@both
def test_a_fall_to_foreach_warns_once_with_the_reason(cls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = cls([torch.ones(2, requires_grad=True)])
        line = inspect.currentframe().f_lineno - 1
        optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)]})
        for _ in range(2):
            set_gradients(optimizer, step=0)
            optimizer.step()
        cls([torch.ones(2, requires_grad=True)])
    assert lines_that_warn(caught) == [(Path(__file__).name, line)]
    message = next(str(w.message) for w in caught if "foreach backend" in str(w.message))
    assert f"cpu: {ABSENT}" in message and "foreach=True" in message
    assert "cuda" not in message and "triton" not in message


@both
def test_a_fall_to_foreach_warns_at_the_step_of_an_optimizer_made_before(cls):
    optimizer = cls([torch.ones(2, requires_grad=True)], foreach=True)
    optimizer.param_groups[0]["foreach"] = None
    set_gradients(optimizer, step=0)
    with pytest.warns(UserWarning, match="which is slower") as caught:
        optimizer.step()
    assert [name for name, _ in lines_that_warn(caught)] == [Path(__file__).name]


@both
@pytest.mark.parametrize(
    "options",
    [
        {"foreach": True},
        {"foreach": False},
        {"fused": False},
        {"foreach": False, "fused": False},
        {"backend": "foreach"},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_what_was_asked_for_does_not_warn(cls, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(cls, **options)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda"])
def test_a_device_that_no_fused_backend_is_made_for_does_not_warn(monkeypatch, device):
    """Nor a GPU that is not there, on which fake tensors may be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(ANY, torch.device(device)).name == "foreach"


@pytest.mark.skipif(torch.version.hip is not None, reason="the cuda backend is for NVIDIA GPUs")
def test_on_a_gpu_foreach_alone_warns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "unavailable", lambda device: "no library")
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    device = torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(ANY, device) is triton
    monkeypatch.setattr(triton, "unavailable", lambda device: "not installed")
    with pytest.warns(UserWarning, match=r"\(cuda: no library; triton: not installed\)"):
        assert backends.choose(ANY, device).name == "foreach"


def test_a_compiled_step_does_not_warn(monkeypatch):
    optimizer = stepped(AMAdamW)
    backends._warned.clear()
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert lines_that_warn(caught) == []


# ---- the cpu backend without the extension ------------------------------------------------


@both
@pytest.mark.usefixtures("library")
def test_kernels_through_ctypes_warn_once_with_the_reason(cls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = cls([torch.ones(2, requires_grad=True)])
        line = inspect.currentframe().f_lineno - 1
        for _ in range(2):
            set_gradients(optimizer, step=0)
            optimizer.step()
        cls([torch.ones(2, requires_grad=True)])
    assert lines_that_warn(caught, "ctypes") == [(Path(__file__).name, line)]
    assert lines_that_warn(caught) == []
    message = next(str(w.message) for w in caught if "ctypes" in str(w.message))
    assert ABSENT in message and 'backend="cpu"' in message


@both
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "options", [{"backend": "cpu"}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
def test_what_was_asked_for_does_not_warn_of_ctypes(cls, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(cls, **options)


@pytest.mark.usefixtures("library")
def test_a_compiled_step_does_not_warn_of_ctypes():
    optimizer = stepped(AMAdamW, backend="cpu")
    optimizer.param_groups[0]["backend"] = None
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert lines_that_warn(caught, "ctypes") == []
