"""The reference against oracles that share nothing with it."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    gradient,
    make_optimizer,
    parameters,
    random_tensor,
    relative_error,
    restore,
    set_gradients,
    snapshot,
    take_step,
)

from adamem_fused import AMSGD, AMAdamW

DOUBLE = torch.float64


def reference(cls, groups, **options):
    return make_optimizer(cls, groups, "reference", **options)


# ---- beta solves the model --------------------------------------------------------


class Model:
    """The two-plane model of one step, over the direction c that the step is to take.

    Decoupled weight decay mu stands in it as mu / 2 |z|_P^2, which scales the step: from
    direction c comes z = x - eta' (c / P + mu x), eta' = eta / (1 + mu eta).
    """

    def __init__(self, x, g, d, P, gap, eta, mu, lam):
        self.x, self.g, self.d, self.P, self.gap = x, g, d, P, gap
        self.eta, self.mu, self.lam = eta, mu, lam

    def planes(self, c):
        """The planes' values where direction c leads to, and all the other terms."""
        eta = self.eta / (1 + self.mu * self.eta)
        z = self.x - eta * (c / self.P + self.mu * self.x)
        gradient_plane = self.g @ (z - self.x)
        memory_plane = self.gap + self.d @ (z - self.x)
        proximal = (self.P * (z - self.x) ** 2).sum() / (2 * self.eta)
        decay = self.mu / 2 * (self.P * (z**2 - self.x**2)).sum()
        change = self.lam * eta / 2 * ((c - self.d) ** 2).sum()
        return gradient_plane, memory_plane, proximal + decay + change

    def value(self, c):
        gradient_plane, memory_plane, rest = self.planes(c)
        return max(gradient_plane, memory_plane) + rest

    def dual(self, beta):
        """The least value of the planes' mixture by beta; its c is a quadratic's minimum."""
        mixture = (1 - beta) * self.g + beta * self.d
        c = (mixture + self.lam * self.P * self.d) / (1 + self.lam * self.P)
        gradient_plane, memory_plane, rest = self.planes(c)
        return (1 - beta) * gradient_plane + beta * memory_plane + rest

    def best_beta(self, cap):
        """The beta in [0, cap] of the largest dual value, by golden section."""
        low, high, ratio = 0.0, cap, (math.sqrt(5) - 1) / 2
        while high - low > 1e-9:
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            if self.dual(left) < self.dual(right):
                low = left
            else:
                high = right
        return (low + high) / 2


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("plane", ["level", "anchored"])
@pytest.mark.parametrize("lam", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_beta_solves_the_two_plane_model(cls, plane, lam, mu):
    cap = 0.89
    options = {"betas": (cap, 0.9)} if cls is AMAdamW else {"beta_max": cap}
    optimizer = reference(
        cls,
        [Group([(12,)], DOUBLE)],
        memory_plane=plane,
        memory_lambda=lam,
        weight_decay=mu,
        beta_scope="tensor",
        **options,
    )
    (param,) = parameters(optimizer)
    generator = torch.Generator().manual_seed(0)
    interior = 0
    for step in range(30):
        prev_eta = optimizer.param_groups[0]["lr"]
        eta = optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.sin(step)) + 0.01
        set_gradients(optimizer, step=step)
        before = snapshot(optimizer)[0]
        optimizer.step()
        state = optimizer.state[param]
        if step == 0:
            continue
        x, g = before["param"], param.grad
        if cls is AMAdamW:
            d, P = before["exp_avg"], (state["exp_avg_sq"] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8
            P = P * (1 - cap * before["beta_prod"])
            c, decay = state["exp_avg"], mu
        else:
            d, P = before["momentum_buffer"], torch.ones_like(x)
            g, c, decay = g + mu * x, state["momentum_buffer"], 0.0
        slope = g - d if plane == "anchored" else g
        gap = prev_eta * (slope @ (d / P + decay * x))
        model = Model(x, g, d, P, gap, eta, decay, lam)

        beta = state["beta"].item()
        assert abs(model.best_beta(cap) - beta) < 1e-6
        if 0 < beta < cap:
            # There the memory is the direction that minimises the model itself.
            interior += 1
            least = model.value(c)
            for size in (1e-1, 1e-3):
                for _ in range(10):
                    shift = torch.randn(c.shape, generator=generator, dtype=DOUBLE)
                    assert model.value(c + size * shift) > least
    assert interior >= 3


# ---- a loop over Python's floats --------------------------------------------------


pairs = partial(zip, strict=True)


def clip(num, den, cap):
    return 0.0 if den == 0 else min(max(num / den, 0.0), cap)


class ScalarAMAdamW:
    """docs/algorithm.md's AM-AdamW over lists of floats, one list a tensor; no torch."""

    def __init__(self, tensors, cap, beta2, eps, mu, lam, kappa, scope, gap, sign):
        self.x = [list(t) for t in tensors]
        self.d = [[0.0] * len(t) for t in tensors]
        self.v = [[0.0] * len(t) for t in tensors]
        self.cap, self.beta2, self.eps, self.mu, self.lam = cap, beta2, eps, mu, lam
        self.kappa, self.scope, self.gap, self.sign = kappa, scope, gap, sign
        self.t, self.beta_prod = 0, [1.0] * len(tensors)
        self.prev_eta, self.prev_loss = 0.0, None

    def step(self, grads, eta, loss):
        self.t += 1
        cap, mu, lam, kappa = self.cap, self.mu, self.lam, self.kappa
        bias2 = 1 - self.beta2**self.t
        nums, dens, all_p, all_g = [], [], [], []
        for k, grad in enumerate(grads):
            gs, ps, num, den, gap = [], [], [], [], []
            for i, raw in enumerate(grad):
                g, d, x = self.sign * raw, self.d[k][i], self.x[k][i]
                v = self.v[k][i] = self.beta2 * self.v[k][i] + (1 - self.beta2) * g * g
                p = (1 - cap * self.beta_prod[k]) * (math.sqrt(v / bias2) + self.eps)
                m = 1 / (p * (1 + lam * p))
                e = d - g
                slope = (0.0 if self.gap == "loss" else g) - kappa * d
                gap.append(self.prev_eta * slope * (d / p + mu * x))
                num.append(-e * (g + lam * p * d) * m - mu * x * e)
                den.append(e * e * m)
                gs.append(g)
                ps.append(p)
            weight = (1 + mu * eta) / eta if eta != 0 else 0.0
            nums.append(math.fsum(num) + weight * math.fsum(gap))
            dens.append(math.fsum(den))
            all_g.append(gs)
            all_p.append(ps)
        if self.gap == "loss" and eta != 0 and self.prev_loss is not None:
            nums[0] += (1 + mu * eta) / eta * self.sign * (self.prev_loss - loss)
        if self.scope == "global":
            nums, dens = [math.fsum(nums)] * len(nums), [math.fsum(dens)] * len(dens)
        self.beta = [cap if self.t == 1 else clip(n, m, cap) for n, m in pairs(nums, dens)]
        for k, beta in enumerate(self.beta):
            for i, (g, p) in enumerate(pairs(all_g[k], all_p[k])):
                d = ((1 - beta) * g + (beta + lam * p) * self.d[k][i]) / (1 + lam * p)
                self.d[k][i] = d
                self.x[k][i] = (1 - eta * mu) * self.x[k][i] - eta * d / p
            self.beta_prod[k] *= beta
        self.prev_eta, self.prev_loss = eta, loss


class ScalarAMSGD:
    """docs/algorithm.md's AM-SGD likewise."""

    def __init__(self, tensors, cap, mu, lam, kappa, scope, gap, sign):
        self.x = [list(t) for t in tensors]
        self.d = None
        self.cap, self.mu, self.lam = cap, mu, lam
        self.kappa, self.scope, self.gap, self.sign = kappa, scope, gap, sign
        self.prev_eta, self.prev_loss = 0.0, None

    def step(self, grads, eta, loss):
        lam, kappa = self.lam, self.kappa
        gs = [
            [self.sign * g + self.mu * x for g, x in pairs(grad, xs)]
            for grad, xs in pairs(grads, self.x)
        ]
        if self.d is None:
            self.d, self.beta = [list(g) for g in gs], [0.0] * len(gs)
        else:
            nums, dens = [], []
            for g, d in pairs(gs, self.d):
                gd = math.fsum(a * b for a, b in pairs(g, d))
                gg = math.fsum(a * a for a in g)
                dd = math.fsum(b * b for b in d)
                num = -(gd - gg) - lam * (dd - gd)
                if eta != 0:
                    slope = (0.0 if self.gap == "loss" else gd) - kappa * dd
                    num += (1 + lam) * self.prev_eta / eta * slope
                nums.append(num)
                dens.append(math.fsum((b - a) ** 2 for a, b in pairs(g, d)))
            if self.gap == "loss" and eta != 0:
                nums[0] += (1 + lam) / eta * self.sign * (self.prev_loss - loss)
            if self.scope == "global":
                nums, dens = [math.fsum(nums)] * len(nums), [math.fsum(dens)] * len(dens)
            self.beta = [clip(n, m, self.cap) for n, m in pairs(nums, dens)]
            self.d = [
                [((beta + lam) * b + (1 - beta) * a) / (1 + lam) for a, b in pairs(g, d)]
                for g, d, beta in pairs(gs, self.d, self.beta)
            ]
        self.x = [[x - eta * b for x, b in pairs(xs, d)] for xs, d in pairs(self.x, self.d)]
        self.prev_eta, self.prev_loss = eta, loss


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("plane", ["level", "anchored"])
@pytest.mark.parametrize(
    "scope, gap", [("tensor", "gradient"), ("global", "gradient"), ("global", "loss")]
)
@pytest.mark.parametrize(
    "mu, lam, maximize", [(0.0, 0.0, False), (0.2, 0.1, False), (0.1, 1, True)]
)
def test_30_steps_equal_a_loop_over_floats(cls, plane, scope, gap, mu, lam, maximize):
    shapes = [(1,), (3,), (5,)]
    options = {"betas": (0.89, 0.95), "eps": 1e-6} if cls is AMAdamW else {"beta_max": 0.8}
    optimizer = reference(
        cls,
        [Group(shapes, DOUBLE)],
        weight_decay=mu,
        memory_lambda=lam,
        memory_plane=plane,
        beta_scope=scope,
        gap=gap,
        maximize=maximize,
        **options,
    )
    params = parameters(optimizer)
    tensors = [param.tolist() for param in params]
    kappa, sign = float(plane == "anchored"), -1.0 if maximize else 1.0
    if cls is AMAdamW:
        oracle = ScalarAMAdamW(tensors, 0.89, 0.95, 1e-6, mu, lam, kappa, scope, gap, sign)
    else:
        oracle = ScalarAMSGD(tensors, 0.8, mu, lam, kappa, scope, gap, sign)
    for step in range(30):
        eta = 0.0 if step % 10 == 9 else 0.02 * (1 + math.sin(step))
        optimizer.param_groups[0]["lr"] = eta
        set_gradients(optimizer, step=step)
        loss = 0.1 * math.cos(0.5 * step)
        optimizer.step(lambda loss=loss: loss)
        oracle.step([param.grad.tolist() for param in params], eta, loss)
        for k, param in enumerate(params):
            state = optimizer.state[param]
            memory = state["exp_avg" if cls is AMAdamW else "momentum_buffer"]
            compared = [(param, oracle.x[k]), (memory, oracle.d[k])]
            if cls is AMAdamW:
                compared.append((state["exp_avg_sq"], oracle.v[k]))
                assert state["beta_prod"].item() == pytest.approx(oracle.beta_prod[k], abs=1e-12)
            for actual, expected in compared:
                expected = torch.tensor(expected, dtype=DOUBLE)
                # The memory may cancel, down to 0 for one element: hence beside the gradient.
                assert relative_error(actual, expected, param.grad) <= 1e-12
            assert state["beta"].item() == pytest.approx(oracle.beta[k], abs=1e-12)


# ---- what the first step is -------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
def test_the_first_step_without_lambda_is_adamw(maximize):
    ours = reference(
        AMAdamW,
        [Group([(4, 5), ()], DOUBLE)],
        memory_lambda=0.0,
        weight_decay=0.1,
        maximize=maximize,
    )
    copies = [p.detach().clone().requires_grad_() for p in parameters(ours)]
    adamw = torch.optim.AdamW(copies, betas=(0.89, 0.999), weight_decay=0.1, maximize=maximize)
    set_gradients(ours, step=0)
    for copy, param in zip(copies, parameters(ours), strict=True):
        copy.grad = param.grad.clone()
    ours.step()
    adamw.step()
    for copy, param in zip(copies, parameters(ours), strict=True):
        assert relative_error(param, copy) < 1e-14
        assert relative_error(ours.state[param]["exp_avg"], adamw.state[copy]["exp_avg"]) < 1e-14
        assert ours.state[param]["beta"] == 0.89


@pytest.mark.parametrize("memory_lambda", [0.0, 0.1])
def test_the_first_step_of_amsgd_is_sgd(memory_lambda):
    options = {"lr": 0.1, "weight_decay": 0.1}
    ours = reference(AMSGD, [Group([(4, 5), ()], DOUBLE)], memory_lambda=memory_lambda, **options)
    copies = [p.detach().clone().requires_grad_() for p in parameters(ours)]
    sgd = torch.optim.SGD(copies, momentum=0.9, **options)
    set_gradients(ours, step=0)
    for copy, param in zip(copies, parameters(ours), strict=True):
        copy.grad = param.grad.clone()
    ours.step()
    sgd.step()
    for copy, param in zip(copies, parameters(ours), strict=True):
        assert relative_error(param, copy) < 1e-14
        assert ours.state[param]["beta"] == 0


# ---- conventions ------------------------------------------------------------------


def test_a_gradient_equal_to_the_memory_gives_beta_0():
    for cls in OPTIMIZERS:
        optimizer = reference(cls, [Group([(6,)], DOUBLE)], weight_decay=0.0)
        (param,) = parameters(optimizer)
        set_gradients(optimizer, step=0)
        optimizer.step()
        state = optimizer.state[param]
        memory = state["exp_avg" if cls is AMAdamW else "momentum_buffer"].clone()
        state["beta"].fill_(0.5)
        param.grad = memory.clone()
        optimizer.step()
        assert state["beta"] == 0
        assert torch.allclose(
            state["exp_avg" if cls is AMAdamW else "momentum_buffer"], memory, rtol=1e-14
        )


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_zero_gradients_give_beta_0_and_leave_x(cls, scope):
    optimizer = reference(cls, [Group([(6,), ()], DOUBLE)], weight_decay=0.0, beta_scope=scope)
    before = [param.detach().clone() for param in parameters(optimizer)]
    for _ in range(3):
        for param in parameters(optimizer):
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for param, old in zip(parameters(optimizer), before, strict=True):
        assert optimizer.state[param]["beta"] == 0
        assert torch.equal(param, old)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_lr_0_leaves_x_and_moves_the_moments(cls):
    optimizer = reference(cls, [Group([(6,)], DOUBLE)], weight_decay=0.1)
    (param,) = parameters(optimizer)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.0 if step % 3 == 0 else 1e-2
        set_gradients(optimizer, step=step)
        before = snapshot(optimizer)[0]
        optimizer.step()
        state = optimizer.state[param]
        assert torch.equal(param, before["param"]) == (step % 3 == 0)
        assert math.isfinite(state["beta"])
        assert state["prev_lr"] == optimizer.param_groups[0]["lr"]
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in before:
                assert not torch.equal(state[name], before[name])


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_tensor_without_gradient_is_skipped_whole(cls):
    """Its neighbour moves as if it were alone, and it as if the step had not been."""
    optimizer = reference(cls, [Group([(6,), (4,)], DOUBLE)], beta_scope="global")
    alone = reference(cls, [Group([(6,)], DOUBLE)], beta_scope="global")
    for step in range(3):
        set_gradients(alone, step=step)
        kept, skipped = parameters(optimizer)
        kept.grad, skipped.grad = parameters(alone)[0].grad, None
        optimizer.step()
        alone.step()
    assert not optimizer.state[skipped]
    assert torch.equal(kept, parameters(alone)[0])

    skipped.grad = gradient(skipped, 0)
    optimizer.step()
    before = snapshot(optimizer)
    skipped.grad = None
    optimizer.step()
    after = snapshot(optimizer)
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])
    assert after[0]["step"] == before[0]["step"] + 1


def test_a_first_gradient_adds_nothing_to_the_shared_sums_of_amsgd():
    """By hand: with d = 1 and then g = -1/2, num is g^2 and den (3/2)^2. The 2 is in neither."""
    optimizer = reference(AMSGD, [Group([(), ()], DOUBLE)], memory_lambda=0.0, beta_scope="global")
    known, new = parameters(optimizer)
    known.grad = torch.ones((), dtype=DOUBLE)
    optimizer.step()
    known.grad, new.grad = torch.full_like(known, -0.5), torch.full_like(new, 2.0)
    optimizer.step()
    assert optimizer.state[known]["beta"].item() == pytest.approx(1 / 9, abs=1e-15)
    assert optimizer.state[new]["beta"] == 0
    assert optimizer.state[new]["momentum_buffer"] == 2


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("plane", ["level", "anchored"])
def test_a_global_beta_is_that_of_one_concatenated_tensor(cls, plane):
    """For AM-AdamW because the tensors' step counts and beta_prods agree."""
    options = {"beta_scope": "global", "memory_plane": plane, "weight_decay": 0.1}
    apart = reference(cls, [Group([(6,), (3, 4), ()], DOUBLE)], **options)
    joined = reference(cls, [Group([(19,)], DOUBLE)], **options)
    (whole,) = parameters(joined)
    whole.data = torch.cat([param.detach().flatten() for param in parameters(apart)])
    betas = []
    for step in range(30):
        set_gradients(apart, step=step)
        whole.grad = torch.cat([param.grad.flatten() for param in parameters(apart)])
        take_step(apart, step)
        take_step(joined, step)
        betas.append(joined.state[whole]["beta"].item())
        for param in parameters(apart):
            assert apart.state[param]["beta"].item() == pytest.approx(betas[-1], abs=1e-12)
        parts = torch.cat([param.detach().flatten() for param in parameters(apart)])
        assert relative_error(parts, whole) < 1e-12
    assert len(set(betas)) > 5


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_complex_tensor_is_pairs_of_reals(cls):
    complex_one = reference(cls, [Group([(5, 3)], torch.complex128)], weight_decay=0.1)
    real_one = reference(cls, [Group([(5, 3, 2)], DOUBLE)], weight_decay=0.1)
    (z,), (pairs,) = parameters(complex_one), parameters(real_one)
    pairs.data = torch.view_as_real(z.detach()).clone()
    for step in range(10):
        set_gradients(complex_one, step=step)
        pairs.grad = torch.view_as_real(z.grad).clone()
        complex_one.step()
        real_one.step()
        assert torch.equal(torch.view_as_real(z.detach()), pairs)
        assert torch.equal(complex_one.state[z]["beta"], real_one.state[pairs]["beta"])


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("gap", ["gradient", "loss"])
def test_maximize_is_minimizing_the_negated_loss(cls, gap):
    options = {"weight_decay": 0.1, "gap": gap, "beta_scope": "global"}
    up = reference(cls, [Group([(6,), (2, 3)], DOUBLE)], maximize=True, **options)
    down = reference(cls, [Group([(6,), (2, 3)], DOUBLE)], **options)
    for step in range(10):
        set_gradients(up, step=step)
        for ours, theirs in zip(parameters(up), parameters(down), strict=True):
            theirs.grad = -ours.grad
        loss = math.cos(step)
        up.step(lambda loss=loss: loss)
        down.step(lambda loss=loss: -loss)
        for ours, theirs in zip(parameters(up), parameters(down), strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(up.state[ours]["beta"], down.state[theirs]["beta"])


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_low_precision_is_rounded_once_from_float64(cls):
    """bfloat16 parameters are those of a float64 optimizer, rounded; state is kept in float32."""
    low = reference(cls, [Group([(50,)], torch.bfloat16)])
    double = reference(cls, [Group([(50,)], DOUBLE)])
    for step in range(5):
        set_gradients(low, step=step)
        (ours,), (theirs,) = parameters(low), parameters(double)
        restore(double, [{n: v.double() for n, v in saved.items()} for saved in snapshot(low)])
        theirs.grad = ours.grad.double()
        low.step()
        double.step()
        assert torch.equal(ours, theirs.to(torch.bfloat16))
        for name, value in double.state[theirs].items():
            assert torch.equal(low.state[ours][name], value.float())


def test_beta_of_amsgd_where_the_memory_is_near_the_gradient():
    """Against rational numbers: the sums are differences of far larger ones."""
    g = gradient(torch.zeros(50, dtype=DOUBLE), step=0)
    lr, prev_lr, lam = 0.0117, 0.013, 0.1
    c = (1 + lam) * prev_lr / lr
    # With e this far from being orthogonal to g, beta is 1/2.
    e = random_tensor((50,), DOUBLE) * 1e-6
    e -= (e @ g + (0.5 + c + lam) / (1 + c + lam) * (e @ e)) / (g @ g) * g
    d = g + e
    optimizer = reference(AMSGD, [Group([(50,)], DOUBLE)], memory_plane="anchored")
    (param,) = parameters(optimizer)
    param.grad = g
    optimizer.step()
    state = optimizer.state[param]
    state["momentum_buffer"].copy_(d)
    state["prev_lr"].fill_(prev_lr)
    optimizer.param_groups[0].update(lr=lr, memory_lambda=lam)
    optimizer.step()

    num = den = Fraction(0)
    factor = (1 + Fraction(lam)) * Fraction(prev_lr) / Fraction(lr)
    for gi, di in zip(map(Fraction, g.tolist()), map(Fraction, d.tolist()), strict=True):
        num += factor * (gi - di) * di - (di - gi) * (gi + Fraction(lam) * di)
        den += (di - gi) ** 2
    assert 0.4 < num / den < 0.6
    assert state["beta"].item() == pytest.approx(float(num / den), abs=1e-9)
