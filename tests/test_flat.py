"""Flat parameters whose tensors are known take the betas of these, on one rank and on several."""

import copy
import itertools
import math
import weakref
from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist
from cases import OPTIMIZERS, bits, parameters, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Embedding, Linear, Module, Parameter

from adamem_fused import AMSGD, AMAdamW, flat

both = pytest.mark.parametrize("cls", OPTIMIZERS)
SCOPES = ("tensor", "row")
BACKENDS = ("cpu", "foreach", "reference")
# Beta leaves its cap with these within a few steps.
OPTIONS = {
    cls: {"memory_plane": "anchored", "lr": lr} for cls, lr in ((AMAdamW, 0.1), (AMSGD, 1.0))
}


# ---- which pieces a rank has ------------------------------------------------------

units = st.one_of(
    st.tuples(st.just(0), st.integers(0, 40)),
    st.tuples(st.integers(1, 6), st.integers(1, 12)),
)


@given(
    units=st.lists(units, max_size=6),
    gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    world_size=st.integers(1, 5),
    padding=st.integers(0, 7),
)
def test_ranks_have_every_element_once_and_know_what_is_cut(units, gaps, world_size, padding):
    numels = [max(rows, 1) * numel for rows, numel in units]
    spaced = [numel + gap for numel, gap in zip(numels, gaps, strict=False)]
    offsets = list(accumulate(spaced, initial=0))[: len(units)]
    size = math.ceil((sum(spaced) + padding) / world_size)
    # Of each unit, (tensor, row): its elements on each rank, and its place among those cut.
    found, places, numbers = {}, {}, set()
    for rank in range(world_size):
        own = flat.find_pieces(units, offsets, size, rank, world_size)
        numbers.add(own.n_cut)
        assert all(a.stop <= b.start for a, b in pairwise(own.pieces))
        numels_of_units = iter(own.numels)
        for piece in own.pieces:
            assert 0 <= piece.start < piece.stop <= size
            rows, numel = units[piece.tensor]
            start = piece.start + rank * size - offsets[piece.tensor]
            for _ in range(piece.rows or 1):
                row, held = start // numel, next(numels_of_units)
                assert piece.cut is not None or (start % numel, held) == (0, numel)
                unit = (piece.tensor, row if rows else 0)
                found.setdefault(unit, []).append((start - row * numel, held))
                places.setdefault(unit, set()).add(piece.cut)
                start += held
            assert start == piece.stop + rank * size - offsets[piece.tensor]
            assert (piece.rows > 0) == (rows > 0 and piece.cut is None)
    for t, (rows, numel) in enumerate(units):
        for row in range(max(rows, 1)):
            if numel > 0:
                parts = found.pop((t, row))
                stops = [start + held for start, held in parts]
                assert [start for start, _ in parts] == [0, *stops[:-1]] and stops[-1] == numel
                assert (len(parts) > 1) == (places[t, row] != {None})
    assert not found
    cut = [next(iter(own)) for own in places.values() if own != {None}]
    assert all(len(own) == 1 for own in places.values())
    assert len(numbers) == 1 and sorted(cut) == list(range(numbers.pop()))


# ---- steps ------------------------------------------------------------------------


class Model(Module):
    """With an embedding of which most rows have no gradient, and tensors of odd sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = Embedding(13, 17)
        self.hidden = Linear(17, 19)
        self.out = Linear(19, 3)
        self.double()

    def forward(self, step, part):
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(13, (6,), generator=generator)[part]
        x = self.embedding(index)
        return (self.out(self.hidden(x).tanh()) - x[:, :3].sin() - 1).square().mean()


def lr_of(cls, step):
    """A schedule that begins with 0, as most with warm-up do."""
    return OPTIONS[cls]["lr"] * min(step, 3) / 3


def groups_of(model):
    """Two groups, as with and without weight decay."""
    return [
        [p for p in model.parameters() if (p.dim() > 1) == weights] for weights in (True, False)
    ]


class Flattened:
    """A model trained by parts of flat buffers, one a group, as DeepSpeed's ZeRO does."""

    def __init__(self, cls, scope, backend="cpu", ranks=True, size=None, **options):
        """size: of this rank's part of the first buffer; the least if None."""
        self.model = Model()
        options = {**OPTIONS[cls], "beta_scope": scope, "backend": backend, **options}
        self.groups = groups_of(self.model)
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
        numels = [sum(p.numel() for p in tensors) for tensors in self.groups]
        self.lengths = [math.ceil(numel / self.size) * self.size for numel in numels]
        if size is not None:
            self.lengths[0] = size * self.size
        self.flats = [
            Parameter(self.part(group, [p.detach() for p in tensors]))
            for group, tensors in enumerate(self.groups)
        ]
        self.optimizer = cls([{"params": [p]} for p in self.flats], **options)
        for part, tensors in zip(self.flats, self.groups, strict=True):
            self.optimizer.register_flat_parameter(
                part,
                [p.shape for p in tensors],
                process_group=dist.group.WORLD if ranks else None,
            )

    def part(self, group, tensors):
        """This rank's, of the mean over ranks."""
        whole = torch.cat([t.flatten() for t in tensors])
        whole = torch.cat([whole, whole.new_zeros(self.lengths[group] - len(whole))])
        if self.size > 1:
            dist.all_reduce(whole)
        return whole.chunk(self.size)[self.rank] / self.size

    def step(self, cls, step):
        per_rank = 6 // self.size
        self.model.zero_grad()
        self.model(step, slice(self.rank * per_rank, (self.rank + 1) * per_rank)).backward()
        for group, tensors in enumerate(self.groups):
            self.optimizer.param_groups[group]["lr"] = lr_of(cls, step)
            self.flats[group].grad = self.part(group, [p.grad for p in tensors])
        self.optimizer.step()
        for part, tensors in zip(self.flats, self.groups, strict=True):
            whole = part.detach()
            if self.size > 1:
                parts = [torch.empty_like(whole) for _ in range(self.size)]
                dist.all_gather(parts, whole)
                whole = torch.cat(parts)
            numels = [p.numel() for p in tensors]
            for param, values in zip(tensors, whole[: sum(numels)].split(numels), strict=True):
                param.data = values.view_as(param).clone()


def one_process(cls, scope, steps, **options):
    model = Model()
    optimizer = cls(
        [{"params": params} for params in groups_of(model)],
        **{**OPTIONS[cls], "beta_scope": scope, "backend": "reference", **options},
    )
    for step in range(steps):
        optimizer.zero_grad()
        model(step, slice(None)).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr_of(cls, step)
        optimizer.step()
    betas = torch.cat([optimizer.state[p]["beta"].reshape(-1) for p in model.parameters()])
    assert any(0 < beta < 0.88 for beta in betas), f"beta says nothing here: {betas}"
    return model, optimizer


def assert_like_one_process(cls, scope, ours, steps=6, **options):
    model, optimizer = one_process(cls, scope, steps, **options)
    for actual, expected in zip(ours.model.parameters(), model.parameters(), strict=True):
        assert relative_error(actual.detach(), expected.detach()) <= 1e-12
    return optimizer


@both
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_buffer_takes_the_steps_of_its_tensors(cls, scope, backend):
    ours = Flattened(cls, scope, backend, ranks=False)
    for step in range(6):
        ours.step(cls, step)
    theirs = assert_like_one_process(cls, scope, ours)
    tensors = [p for group in theirs.param_groups for p in group["params"]]
    for name in ("beta", "step"):
        values = [ours.optimizer.state[p][name] for p in ours.flats]
        expected = torch.cat([theirs.state[p][name].reshape(-1) for p in tensors])
        torch.testing.assert_close(torch.cat(values), expected)
    # In metrics a beta counts with its elements.
    for name, value in theirs.metrics().items():
        torch.testing.assert_close(ours.optimizer.metrics()[name], value)


def take_the_steps_of_one_process(cls, scope):
    # Between rows, between elements of one, and so that the last of three ranks has padding alone.
    sizes = {2: (301, 323), 3: (201, 204, 306)}[dist.get_world_size()]
    for backend, size in itertools.chain(
        itertools.product(("cpu",), sizes), itertools.product(BACKENDS[1:], sizes[:1])
    ):
        ours = Flattened(cls, scope, backend, size=size)
        for step in range(6):
            ours.step(cls, step)
        assert_like_one_process(cls, scope, ours)


@both
@pytest.mark.parametrize("scope", SCOPES)
def test_two_ranks_take_the_steps_of_one_process(two_ranks, cls, scope):
    two_ranks.run(take_the_steps_of_one_process, cls, scope)


@both
@pytest.mark.parametrize("scope", SCOPES)
def test_three_ranks_take_the_steps_of_one_process(three_ranks, cls, scope):
    three_ranks.run(take_the_steps_of_one_process, cls, scope)


def go_on_from_a_checkpoint(cls, scope):
    ours, saved = Flattened(cls, scope), None
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(ours.optimizer.state_dict())
            params = (
                [p.detach().clone() for p in ours.flats],
                [p.detach().clone() for p in ours.model.parameters()],
            )
        ours.step(cls, step)
    again = Flattened(cls, scope)
    again.optimizer.load_state_dict(saved)
    for values, targets in zip(params, (again.flats, again.model.parameters()), strict=True):
        for value, param in zip(values, targets, strict=True):
            param.data.copy_(value)
    for step in range(3, 6):
        again.step(cls, step)
    for a, b in zip(ours.flats, again.flats, strict=True):
        assert torch.equal(bits(a.detach()), bits(b.detach()))
        for name, value in ours.optimizer.state[a].items():
            assert torch.equal(bits(value), bits(again.optimizer.state[b][name])), name


@both
@pytest.mark.parametrize("scope", SCOPES)
def test_a_checkpoint_goes_on_with_the_same_bits(two_ranks, cls, scope):
    two_ranks.run(go_on_from_a_checkpoint, cls, scope)


# ---- from other state -------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_state_of_adamw_is_taken_for_each_tensor(scope):
    ours = Flattened(AMAdamW, scope, ranks=False)
    theirs = torch.optim.AdamW([{"params": [p]} for p in ours.flats], lr=0.1)
    for part in ours.flats:
        part.grad = torch.ones_like(part)
    theirs.step()
    ours.optimizer.load_state_dict(theirs.state_dict())
    state = ours.optimizer.state[ours.flats[0]]
    assert list(state["beta"].shape) == ([3] if scope == "tensor" else [13 + 19 + 3])
    assert state["step"].tolist() == [1, 1, 1]
    torch.testing.assert_close(state["beta"], torch.full_like(state["beta"], 0.9))
    ours.optimizer.step()


@both
def test_a_parameter_that_has_been_stepped_as_one_tensor_takes_its_beta_for_all(cls):
    part = Parameter(torch.randn(40, dtype=torch.float64))
    part.grad = torch.randn(40, dtype=torch.float64)
    optimizer = cls([part], beta_scope="tensor", **OPTIONS[cls])
    for _ in range(3):
        optimizer.step()
    beta = optimizer.state[part]["beta"].clone()
    optimizer.register_flat_parameter(part, [(3, 5), (7,)], offsets=[2, 30])
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[part]["beta"], beta.repeat(2))
    optimizer.step()
    assert optimizer.state[part]["step"].tolist() == [4, 4]


def test_what_is_in_no_tensor_is_not_stepped():
    part = Parameter(torch.ones(40))
    part.grad = torch.ones(40)
    optimizer = AMSGD([part], beta_scope="tensor")
    optimizer.register_flat_parameter(part, [(3, 5), (7,)], offsets=[2, 30])
    optimizer.step()
    stepped = [*range(2, 17), *range(30, 37)]
    assert (part != 1).nonzero().flatten().tolist() == stepped


def test_an_empty_tensor_has_no_pieces():
    """Though its rows would have elements enough for a beta each."""
    part = Parameter(torch.ones(40))
    part.grad = torch.ones(40)
    optimizer = AMAdamW([part], beta_scope="row")
    optimizer.register_flat_parameter(part, [(2,), (0, 16)])
    optimizer.step()
    assert (part != 1).nonzero().flatten().tolist() == [0, 1]


@both
def test_nothing_is_kept_alive(cls):
    part = Parameter(torch.randn(40))
    part.grad = torch.randn(40)
    optimizer = cls([part], beta_scope="row")
    optimizer.register_flat_parameter(part, [(2, 16)])
    optimizer.step()
    old = [weakref.ref(part.grad), *map(weakref.ref, optimizer.state[part].values())]
    part.grad = None
    optimizer.state.clear()
    assert [ref() for ref in old] == [None] * len(old)
    # Nor are those that a scheme has replaced.
    old = weakref.ref(part)
    part = Parameter(torch.randn(40))
    optimizer.param_groups[0]["params"] = [part]
    optimizer.register_flat_parameter(part, [(2, 16)])
    assert old() is None


def compile_steps(cls, scope):
    ours, compiled = Flattened(cls, scope), Flattened(cls, scope)
    compiled.optimizer.step = torch.compile(compiled.optimizer.step, backend="eager")
    for step in range(3):
        ours.step(cls, step)
        compiled.step(cls, step)
    for a, b in zip(ours.flats, compiled.flats, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_compiled_step_is_the_step(two_ranks, scope):
    two_ranks.run(compile_steps, AMAdamW, scope)


@both
def test_metrics_are_those_of_the_last_step_until_the_next(cls):
    part = Parameter(torch.randn(80))
    part.grad = torch.randn(80)
    optimizer = cls([part], beta_scope="tensor", **OPTIONS[cls])
    optimizer.step()
    before = optimizer.metrics()
    optimizer.register_flat_parameter(part, [(4, 16), (7,)])
    torch.testing.assert_close(optimizer.metrics(), before)
    optimizer.step()
    optimizer.param_groups[0]["beta_scope"] = "row"
    assert 0 <= optimizer.metrics()["beta_mean"] <= 0.9


def test_names_of_what_was_replaced_are_said_to_be():
    model = Linear(3, 4)
    optimizer = AMAdamW(model.named_parameters())
    optimizer.param_groups[0]["params"] = [Parameter(torch.ones(16))]
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO has replaced them"):
        optimizer.betas_by_name()


def test_a_checkpoint_is_this_packages_own_though_a_tool_has_brought_adamws_options():
    param = Parameter(torch.ones(4))
    optimizer = AMAdamW([param], **OPTIONS[AMAdamW])
    for step in range(4):
        param.grad = torch.linspace(-1, 1, 4).roll(step)
        optimizer.step()
    beta = optimizer.state[param]["beta"].clone()
    assert 0 < beta < 0.88
    optimizer.param_groups[0].update(
        torch.optim.AdamW([param]).param_groups[0] | {"params": [param]}
    )
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(optimizer.state[param]["beta"], beta)


# ---- what is refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "shapes", "options", "match"),
    [
        ([4, 4], [(16,)], {}, "one dimension"),
        ([16], [(17,)], {}, "do not fit"),
        ([16], [(4,), (4,)], {"offsets": [0, 3]}, "overlap"),
        ([16], [(4,)], {"offsets": [-1]}, "overlap"),
        ([16], [(4,)], {"offsets": [0, 4]}, "2 offsets for 1 shapes"),
        ([16], [(-3,)], {}, "whole numbers from 0 on"),
    ],
)
def test_what_cannot_be_a_flat_parameter_is_refused(shape, shapes, options, match):
    param = Parameter(torch.ones(shape))
    optimizer = AMAdamW([param])
    with pytest.raises(ValueError, match=match):
        optimizer.register_flat_parameter(param, shapes, **options)
    with pytest.raises(ValueError, match="none of the optimizer's parameter groups"):
        optimizer.register_flat_parameter(Parameter(torch.ones(4)), [(4,)])


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"beta_scope": "global"}, 'beta_scope="global" .* take beta_scope="tensor"'),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"skip_nonfinite": True}, "skip_nonfinite"),
        ({"state_dtype": "int8"}, "few bits"),
    ],
)
def test_options_that_take_more_are_refused_also_between_steps(option, match):
    part = Parameter(torch.ones(8192))
    part.grad = torch.ones(8192)
    with pytest.raises(RuntimeError, match=match):
        AMAdamW([part], **option).register_flat_parameter(part, [(64, 128)])
    optimizer = AMAdamW([part])
    optimizer.register_flat_parameter(part, [(64, 128)])
    for name, value in option.items():
        if name in optimizer.param_groups[0]:
            optimizer.param_groups[0][name] = value
        else:
            setattr(optimizer, name, value)
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert part.eq(1).all() and not optimizer.state


@both
def test_another_scope_of_a_flat_parameter_is_refused(cls):
    part = Parameter(torch.ones(64))
    part.grad = torch.ones(64)
    optimizer = cls([part], beta_scope="row")
    optimizer.register_flat_parameter(part, [(4, 16)])
    optimizer.step()
    optimizer.param_groups[0]["beta_scope"] = "tensor"
    with pytest.raises(ValueError, match=r"has shape \[4\]; .* cannot be converted"):
        optimizer.step()
    # Nor are other tensors in the same buffer.
    with pytest.raises(ValueError, match="was registered with before"):
        optimizer.register_flat_parameter(part, [(2, 32)])
    # Nor is a copy, which knows of no tensors, taken for a vector.
    optimizer.param_groups[0]["beta_scope"] = "row"
    copied = copy.deepcopy(optimizer)
    for param in parameters(copied):
        param.grad = torch.ones(64)
    with pytest.raises(ValueError, match=r"beta(_prod)? has shape \[4\]"):
        copied.step()


def unequal_parts():
    part = Parameter(torch.ones(45 + dist.get_rank()))
    optimizer = AMSGD([part], beta_scope="tensor")
    with pytest.raises(ValueError, match="parts of 45 to 46 elements"):
        optimizer.register_flat_parameter(part, [(91,)], process_group=dist.group.WORLD)
    alone = [dist.new_group([rank]) for rank in range(2)][1 - dist.get_rank()]
    with pytest.raises(ValueError, match="this rank is not in process_group"):
        optimizer.register_flat_parameter(part, [(40,)], process_group=alone)


def test_ranks_with_unequal_parts_are_refused(two_ranks):
    two_ranks.run(unequal_parts)


def test_a_part_that_has_changed_its_size_is_refused():
    part = Parameter(torch.ones(40))
    part.grad = torch.ones(40)
    optimizer = AMSGD([part], beta_scope="tensor")
    optimizer.register_flat_parameter(part, [(40,)])
    part.data, part.grad = torch.ones(60), torch.ones(60)
    with pytest.raises(ValueError, match="registered with 40 elements"):
        optimizer.step()
    assert part.eq(1).all()
