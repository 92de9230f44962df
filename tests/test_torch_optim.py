"""What torch asks of its own optimizers, asked of AMAdamW and AMSGD.

The checklist is torch's test/test_optim.py for an optimizer with foreach and fused
implementations; inputs, error inputs and the tracker come from torch's own test kit.
"""

import io
import itertools
import pickle
from copy import deepcopy

import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_optim_shim import (
    IMPLEMENTATIONS,
    OptimizerErrorEnum,
    TensorTracker,
    TestCase,
    am_optims,
    configurations,
    instantiate_device_type_tests,
    parametrize,
    subtest,
)

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 2), (), (0,), (1, 70))
AGAINST_FORLOOP = parametrize("implementation", ["foreach", "fused"])
NAMED = parametrize("named", [False, True])


def make_tensors(device, dtype, contiguous=True):
    """A weight and a bias to train, and an input: the loss is |weight input + bias|^2."""
    if contiguous:
        weight = torch.randn(10, 5, device=device, dtype=dtype)
        bias = torch.randn(10, device=device, dtype=dtype)
    else:
        weight = torch.randn(10, 5, 2, device=device, dtype=dtype)[..., 0]
        bias = torch.randn(10, 2, device=device, dtype=dtype)[..., 0]
    return Parameter(weight), Parameter(bias), torch.randn(5, device=device, dtype=dtype)


def make_closure(optimizer, weight, bias, x):
    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def with_random_grads(params):
    for param in params:
        param.grad = torch.randn_like(param)


def stepped(optim_info, device, dtype, steps=3, **kwargs):
    """An optimizer that has taken some steps, and its closure."""
    weight, bias, x = make_tensors(device, dtype)
    optimizer = optim_info.optim_cls([weight, bias], **kwargs)
    closure = make_closure(optimizer, weight, bias, x)
    for _ in range(steps):
        optimizer.step(closure)
    return optimizer, closure


def without_names(state_dict):
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


class TestConstruction(TestCase):
    @am_optims()
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            self.assertEqual(error.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            given = error.optimizer_error_input
            params = given.params
            if params is None:
                params = [Parameter(torch.randn(2, device=device, dtype=dtype))]
            expect = (
                self.assertWarnsRegex
                if issubclass(error.error_type, Warning)
                else self.assertRaisesRegex
            )
            with self.subTest(given.desc), expect(error.error_type, error.error_regex):
                optim_info.optim_cls(params, **given.kwargs)

    @am_optims()
    def test_fused_errors_on_meta_params(self, device, dtype, optim_info):
        meta = Parameter(torch.empty(2, device="meta", dtype=dtype))
        meta.grad = torch.empty_like(meta)
        optimizer = optim_info.optim_cls([meta], fused=True)
        with self.assertRaisesRegex(RuntimeError, "fused=True: no fused backend.*on meta"):
            optimizer.step()

    @am_optims()
    def test_can_be_printed(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            weight, bias, _ = make_tensors(device, dtype)
            groups = [{"params": [weight]}, {"params": [bias], "lr": 0.5}]
            printed = repr(optim_info.optim_cls(groups, **kwargs))
            self.assertIn(optim_info.name, printed)
            self.assertIn("Parameter Group 1", printed)
            for key in ("memory_lambda", "memory_plane", "beta_scope", "lr: 0.5"):
                self.assertIn(key, printed)

    @am_optims()
    def test_profiler_sees_the_step_by_name(self, device, dtype, optim_info):
        optimizer, closure = stepped(optim_info, device, dtype)
        with torch.profiler.profile() as profile:
            optimizer.step(closure)
        names = [event.key for event in profile.key_averages()]
        self.assertIn(f"Optimizer.step#{optim_info.name}.step", names)


class TestDirection(TestCase):
    @parametrize("contiguous", [True, False])
    @am_optims()
    def test_goes_right_direction(self, device, dtype, optim_info, contiguous):
        for kwargs in configurations(optim_info, device):
            self._descend(optim_info, device, dtype, kwargs, [], contiguous)

    @parametrize("bias_lr", [None, 0.01])
    @am_optims()
    def test_goes_right_direction_with_schedulers(self, device, dtype, optim_info, bias_lr):
        # Three implementations, five sets of schedulers: each meets each.
        schedulers = itertools.cycle(optim_info.scheduler_inputs)
        for kwargs in configurations(optim_info, device):
            self._descend(optim_info, device, dtype, kwargs, next(schedulers), bias_lr=bias_lr)

    def _descend(
        self, optim_info, device, dtype, kwargs, schedulers, contiguous=True, bias_lr=None
    ):
        weight, bias, x = make_tensors(device, dtype, contiguous)
        groups = [{"params": [weight]}, {"params": [bias]}]
        if bias_lr is not None:
            groups[1]["lr"] = bias_lr
        optimizer = optim_info.optim_cls(groups, **kwargs)
        schedulers = [make(optimizer) for make in schedulers]
        closure = make_closure(optimizer, weight, bias, x)
        first = closure().item()
        for _ in range(20):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(loss.item())
                else:
                    scheduler.step()
        last = closure().item()
        better, worse = (last, first) if kwargs.get("maximize") else (first, last)
        self.assertGreater(better, worse, f"{kwargs}")


class TestParamGroups(TestCase):
    @am_optims()
    def test_param_groups_lr(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            weight, bias, x = make_tensors(device, dtype)
            weight_start, bias_start = weight.detach().clone(), bias.detach().clone()
            kwargs["lr"] = 0.0
            groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
            optimizer = optim_info.optim_cls(groups, **kwargs)
            for _ in range(3):
                optimizer.step(make_closure(optimizer, weight, bias, x))
            self.assertTrue(torch.equal(weight, weight_start), f"{kwargs}")
            self.assertNotEqual(bias, bias_start)

    @am_optims()
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            weight, bias, _ = make_tensors(device, dtype)
            bias_start, weight_norm = bias.detach().clone(), weight.norm().item()
            kwargs.update(weight_decay=0.0, lr=0.1, maximize=False)
            groups = [{"params": [weight], "weight_decay": 0.3}, {"params": [bias]}]
            optimizer = optim_info.optim_cls(groups, **kwargs)
            for _ in range(3):
                weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
                optimizer.step()
            self.assertTrue(torch.equal(bias, bias_start), f"{kwargs}")
            self.assertLess(weight.norm().item(), weight_norm)

    @NAMED
    @am_optims()
    def test_add_param_group(self, device, dtype, optim_info, named):
        for kwargs in configurations(optim_info, device):
            weight, bias, x = make_tensors(device, dtype)
            first = [("weight", weight)] if named else [weight]
            second = [("bias", bias)] if named else [bias]
            optimizer = optim_info.optim_cls(first, **kwargs)
            closure = make_closure(optimizer, weight, bias, x)
            optimizer.step(closure)
            optimizer.add_param_group({"params": second, "lr": 0.02})

            self.assertEqual(optimizer.param_groups[1]["lr"], 0.02)
            for key in set(optimizer.defaults) - {"lr"}:
                self.assertEqual(optimizer.param_groups[1][key], optimizer.defaults[key])
            names = [group.get("param_names") for group in optimizer.param_groups]
            self.assertEqual(names, [["weight"], ["bias"]] if named else [None, None])

            before = bias.detach().clone()
            optimizer.step(closure)
            self.assertNotEqual(bias, before)
            self.assertEqual([optimizer.state[p]["step"].item() for p in (weight, bias)], [2, 1])

    @am_optims()
    def test_groups_must_be_all_named_or_all_unnamed(self, device, dtype, optim_info):
        weight, bias, _ = make_tensors(device, dtype)
        optimizer = optim_info.optim_cls([("weight", weight)])
        with self.assertRaisesRegex(ValueError, "with/without names"):
            optimizer.add_param_group({"params": [bias]})
        self.assertEqual(len(optimizer.param_groups), 1)


class TestTensorLr(TestCase):
    @parametrize("shape", [subtest((), name="0_dim"), subtest((1,), name="1_element")])
    @am_optims()
    def test_tensor_lr(self, device, dtype, optim_info, shape):
        for kwargs in configurations(optim_info, device):
            kwargs["lr"] = 0.01
            torch.manual_seed(0)
            expected, closure = stepped(optim_info, device, dtype, steps=0, **kwargs)
            lr = torch.full(shape, 0.01, device=device)
            torch.manual_seed(0)
            actual, actual_closure = stepped(
                optim_info, device, dtype, steps=0, **{**kwargs, "lr": lr}
            )
            optimizers = (expected, actual)
            schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in optimizers]
            for _ in range(5):
                self.assertEqual(expected.step(closure), actual.step(actual_closure))
                for scheduler in schedulers:
                    scheduler.step()
            self.assertEqual(expected.param_groups[0]["params"], actual.param_groups[0]["params"])
            self.assertEqual(
                list(expected.state.values()), list(actual.state.values()), exact_dtype=True
            )
            # A scheduler fills the tensor, which stays the user's own.
            self.assertIs(actual.param_groups[0]["lr"], lr)
            self.assertEqual(lr, torch.full(shape, 0.0025))

    @am_optims()
    def test_groups_with_tensor_and_float_lr(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            kwargs.pop("lr", None)
            results = []
            for lr in (0.02, torch.tensor(0.02, device=device)):
                torch.manual_seed(0)
                weight, bias, x = make_tensors(device, dtype)
                groups = [{"params": [weight], "lr": 0.01}, {"params": [bias], "lr": lr}]
                optimizer = optim_info.optim_cls(groups, **kwargs)
                for _ in range(3):
                    optimizer.step(make_closure(optimizer, weight, bias, x))
                results.append((weight, bias))
            self.assertEqual(results[0], results[1])


class TestImplementations(TestCase):
    @AGAINST_FORLOOP
    @am_optims(dtypes=FLOATING)
    def test_matches_forloop(self, device, dtype, optim_info, implementation):
        self._compare(optim_info, device, implementation, [dtype])

    @AGAINST_FORLOOP
    @am_optims()
    def test_mixed_dtypes_match_forloop(self, device, dtype, optim_info, implementation):
        dtypes = [*FLOATING, torch.complex64]
        self._compare(optim_info, device, implementation, dtypes, shapes=[(3, 2)])

    @AGAINST_FORLOOP
    @am_optims()
    def test_set_default_dtype_works(self, device, dtype, optim_info, implementation):
        default = torch.get_default_dtype()
        for other in (torch.float64, torch.float16):
            torch.set_default_dtype(other)
            try:
                self._compare(optim_info, device, implementation, [torch.float32])
            finally:
                torch.set_default_dtype(default)

    def _compare(self, optim_info, device, implementation, dtypes, shapes=SHAPES):
        """Five steps, aligned after each of them, one tensor without gradient in the fourth."""
        for config, forloop in zip(
            configurations(optim_info, device, [implementation]),
            configurations(optim_info, device, ["forloop"]),
            strict=True,
        ):
            torch.manual_seed(0)
            start = [
                torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
                for dtype in dtypes
                for shape in shapes
            ]
            tracker = TensorTracker()
            optimizers = []
            for kwargs in (forloop, config):
                params = [Parameter(tensor.clone()) for tensor in start]
                optimizers.append((params, optim_info.optim_cls(params, **kwargs)))
            for step in range(5):
                grads = [torch.randn_like(tensor) for tensor in start]
                for params, optimizer in optimizers:
                    for param, grad in zip(params, grads, strict=True):
                        param.grad = grad.clone()
                    if step == 3:
                        params[0].grad = None
                    optimizer.step()
                    for param in params:
                        for tensor in (param, *optimizer.state[param].values()):
                            if optimizer is optimizers[0][1]:
                                tracker.add(tensor)
                            else:
                                tracker.pop_check_set(tensor, self)
            self.assertTrue(tracker.all_popped())


class TestComplex(TestCase):
    @am_optims(dtypes=[torch.complex64, torch.complex128])
    def test_complex_is_pairs_of_reals(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            real_dtype = dtype.to_real()
            complex_params = [
                torch.randn(10, 5, dtype=dtype, requires_grad=True),
                torch.randn(10, dtype=dtype, requires_grad=True),
                torch.randn(10, 5, dtype=real_dtype, requires_grad=True),
            ]
            real_params = [
                (torch.view_as_real(p) if p.is_complex() else p).detach().clone().requires_grad_()
                for p in complex_params
            ]
            complex_optimizer = optim_info.optim_cls(complex_params, **kwargs)
            real_optimizer = optim_info.optim_cls(real_params, **kwargs)
            for _ in range(3):
                with_random_grads(complex_params)
                for ours, theirs in zip(complex_params, real_params, strict=True):
                    grad = ours.grad
                    theirs.grad = torch.view_as_real(grad) if grad.is_complex() else grad
                complex_optimizer.step()
                real_optimizer.step()
                for ours, theirs in zip(complex_params, real_params, strict=True):
                    ours = torch.view_as_real(ours) if ours.is_complex() else ours
                    self.assertEqual(ours, theirs)

    @am_optims(dtypes=[torch.complex64])
    def test_complex_2d(self, device, dtype, optim_info):
        """A complex tensor is its real and imaginary parts, where all share one beta."""
        for kwargs in configurations(optim_info, device):
            kwargs["beta_scope"] = "global"
            z = torch.randn(2, dtype=dtype, device=device, requires_grad=True)
            parts = [z.real.detach().clone(), z.imag.detach().clone()]
            real, imag = (part.requires_grad_() for part in parts)
            complex_optimizer = optim_info.optim_cls([z], **kwargs)
            real_optimizer = optim_info.optim_cls([real, imag], **kwargs)
            for _ in range(10):
                for optimizer, (x, y) in (
                    (complex_optimizer, z),
                    (real_optimizer, torch.complex(real, imag)),
                ):
                    optimizer.zero_grad()
                    loss = (1 - x).abs().pow(2) + (y - x**2).abs().pow(2)
                    loss.backward()
                    optimizer.step()
                self.assertEqual(z.real, real)
                self.assertEqual(z.imag, imag)


class TestNoOp(TestCase):
    @am_optims()
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            optimizer, _ = stepped(optim_info, device, dtype, **kwargs)
            params = optimizer.param_groups[0]["params"]
            before = deepcopy((params, optimizer.state_dict()))
            optimizer.zero_grad()
            optimizer.step()
            self.assertEqual((params, optimizer.state_dict()), before, rtol=0, atol=0)

            never = optim_info.optim_cls([p.detach().clone() for p in params], **kwargs)
            never.step()
            self.assertEqual(never.state_dict()["state"], {})

    @am_optims()
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        """Without a memory and without weight decay; AdamW's decay is all that is left."""
        for kwargs in configurations(optim_info, device):
            weight, _, _ = make_tensors(device, dtype)
            decay = kwargs.get("weight_decay", 0.01)
            decoupled = optim_info.name == "AMAdamW"
            kwargs.update(lr=0.1, weight_decay=decay if decoupled else 0.0)
            expected = weight.detach().double()
            optimizer = optim_info.optim_cls([weight], **kwargs)
            for _ in range(3):
                weight.grad = torch.zeros_like(weight)
                optimizer.step()
                if decoupled:
                    expected = expected * (1 - 0.1 * decay)
            self.assertEqual(weight, expected.float(), f"{kwargs}")
            self.assertEqual(optimizer.state[weight]["beta"].item(), 0.0)

    @am_optims()
    def test_fused_does_not_step_if_found_inf(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device, ["fused"]):
            optimizer, closure = stepped(optim_info, device, dtype, **kwargs)
            self.assertTrue(optimizer._step_supports_amp_scaling)
            params = optimizer.param_groups[0]["params"]
            before = deepcopy((params, optimizer.state_dict()))
            closure()
            optimizer.grad_scale = None
            optimizer.found_inf = torch.tensor(1.0, device=device)
            optimizer.step()
            self.assertEqual((params, optimizer.state_dict()), before, rtol=0, atol=0)
            optimizer.found_inf = torch.tensor(0.0, device=device)
            optimizer.step()
            self.assertEqual(optimizer.state[params[0]]["step"].item(), 4)


class TestStateDict(TestCase):
    @NAMED
    @am_optims()
    def test_state_dict_deterministic(self, device, dtype, optim_info, named):
        for kwargs in configurations(optim_info, device):
            weight, bias, x = make_tensors(device, dtype)
            twins = [Parameter(p.detach().clone()) for p in (weight, bias)]

            def pair(params, named=named):
                names = ["weight", "bias"]
                return list(zip(names, params, strict=True)) if named else params

            optimizer = optim_info.optim_cls(pair([weight, bias]), **kwargs)
            closure = make_closure(optimizer, weight, bias, x)
            for _ in range(3):
                optimizer.step(closure)
            with torch.no_grad():
                for twin, param in zip(twins, (weight, bias), strict=True):
                    twin.copy_(param)
            other = optim_info.optim_cls(pair(twins), **kwargs)
            saved = deepcopy(optimizer.state_dict())
            kept = deepcopy(saved)
            other.load_state_dict(saved)
            other_closure = make_closure(other, *twins, x)
            for _ in range(5):
                optimizer.step(closure)
                other.step(other_closure)
                self.assertEqual([weight, bias], twins, rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)
            self.assertEqual(saved, kept, rtol=0, atol=0)
            # Repeated parameters have one representation.
            other.param_groups.extend(other.param_groups)
            self.assertEqual(
                optimizer.state_dict()["param_groups"][-1],
                other.state_dict()["param_groups"][-1],
            )

    @am_optims()
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        """A group that lacks an option takes this optimizer's own value."""
        for kwargs in configurations(optim_info, device):
            optimizer, closure = stepped(optim_info, device, dtype, **kwargs)
            for missing in (
                *([key] for key in optimizer.defaults),
                [key for key in optimizer.defaults if key not in ("lr", "weight_decay")],
            ):
                older = deepcopy(optimizer.state_dict())
                for key in missing:
                    del older["param_groups"][0][key]
                optimizer.load_state_dict(older)
                for key in missing:
                    self.assertEqual(optimizer.param_groups[0][key], optimizer.defaults[key])
                optimizer.step(closure)

    @parametrize("source_named", [False, True])
    @parametrize("target_named", [False, True])
    @am_optims()
    def test_can_load_from_and_to_named_state_dict(
        self, device, dtype, optim_info, source_named, target_named
    ):
        for kwargs in configurations(optim_info, device):
            weight, bias, x = make_tensors(device, dtype)
            plain, names = [weight, bias], [("weight", weight), ("bias", bias)]
            source = optim_info.optim_cls(names if source_named else plain, **kwargs)
            for _ in range(3):
                source.step(make_closure(source, weight, bias, x))
            target = optim_info.optim_cls(names if target_named else plain, **kwargs)
            target.load_state_dict(source.state_dict())
            self.assertEqual(without_names(source.state_dict()), without_names(target.state_dict()))
            self.assertEqual("param_names" in target.param_groups[0], source_named or target_named)
            target.step(make_closure(target, weight, bias, x))

    @am_optims()
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            optimizer, _ = stepped(optim_info, device, dtype, **kwargs)
            saved = optimizer.state_dict()
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            self.assertEqual(loaded, saved, rtol=0, atol=0)

    @am_optims()
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            optimizer, closure = stepped(optim_info, device, dtype, **kwargs)
            saved = deepcopy(optimizer.state_dict())
            for state in saved["state"].values():
                state["step"] = state["step"].item()
            optimizer.load_state_dict(saved)
            optimizer.step(closure)
            for state in optimizer.state.values():
                self.assertIsInstance(state["step"], torch.Tensor)
                self.assertEqual(state["step"].item(), 4)

    @am_optims()
    def test_non_empty_state(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            optimizer, _ = stepped(optim_info, device, dtype, steps=1, **kwargs)
            states = list(optimizer.state.values())
            self.assertEqual(len(states), 2)
            for state in states:
                for name, value in state.items():
                    self.assertIsInstance(value, torch.Tensor, name)
                    self.assertFalse(value.requires_grad, name)


class TestCopies(TestCase):
    @am_optims()
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            optimizer, _ = stepped(optim_info, device, dtype, **kwargs)
            copied = deepcopy(optimizer)
            public = [
                {key for key in vars(o) if not key.startswith("_")} for o in (optimizer, copied)
            ]
            self.assertEqual(public[0], public[1])
            self._continues_alike(optimizer, copied)

    @am_optims()
    def test_pickle(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            optimizer, _ = stepped(optim_info, device, dtype, **kwargs)
            self._continues_alike(optimizer, pickle.loads(pickle.dumps(optimizer)))

    def _continues_alike(self, optimizer, other):
        params = [o.param_groups[0]["params"] for o in (optimizer, other)]
        self.assertTrue(all(a is not b for a, b in zip(*params, strict=True)))
        for _ in range(2):
            with_random_grads(params[0])
            for ours, theirs in zip(*params, strict=True):
                theirs.grad = ours.grad.clone()
            optimizer.step()
            other.step()
            self.assertEqual(params[0], params[1], rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)


class TestClosure(TestCase):
    @am_optims()
    def test_closure_is_called_once_and_its_loss_returned(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            optimizer, closure = stepped(optim_info, device, dtype, **kwargs)
            losses = []

            def counted(closure=closure, losses=losses):
                self.assertTrue(torch.is_grad_enabled())
                losses.append(closure())
                return losses[-1]

            loss = optimizer.step(counted)
            self.assertEqual(len(losses), 1)
            self.assertIs(loss, losses[0])
            self.assertIsNone(optimizer.step())


class TestHooks(TestCase):
    @am_optims()
    def test_step_hooks(self, device, dtype, optim_info):
        """Called around the step in order, global ones outside; removed ones no more."""
        optimizer, closure = stepped(optim_info, device, dtype)
        calls = []

        def hook(name):
            return lambda *args: calls.append(name)

        handles = [
            register_optimizer_step_pre_hook(hook("global pre")),
            register_optimizer_step_post_hook(hook("global post")),
            optimizer.register_step_pre_hook(hook("pre")),
            optimizer.register_step_post_hook(hook("post")),
        ]

        def observed():
            calls.append("step")
            return closure()

        try:
            optimizer.step(observed)
        finally:
            for handle in handles:
                handle.remove()
        self.assertEqual(calls, ["global pre", "pre", "step", "post", "global post"])
        optimizer.step(closure)
        self.assertEqual(len(calls), 5)

    @am_optims()
    def test_step_pre_hook_may_change_the_arguments(self, device, dtype, optim_info):
        optimizer, closure = stepped(optim_info, device, dtype)

        def double_loss(_, args, kwargs):
            optimizer, closure = args
            return (optimizer, lambda: 2 * closure()), kwargs

        optimizer.register_step_pre_hook(double_loss)
        expected = 2 * closure().item()
        self.assertEqual(optimizer.step(closure).item(), expected)

    @am_optims()
    def test_state_dict_hooks(self, device, dtype, optim_info):
        optimizer, _ = stepped(optim_info, device, dtype)
        calls = []
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))

        def rename(optimizer, state_dict):
            calls.append("post")
            return {**state_dict, "ran": True}

        handle = optimizer.register_state_dict_post_hook(rename)
        self.assertTrue(optimizer.state_dict()["ran"])
        self.assertEqual(calls, ["pre", "post"])
        handle.remove()
        self.assertNotIn("ran", optimizer.state_dict())

    @am_optims()
    def test_load_state_dict_hooks(self, device, dtype, optim_info):
        """Pre-hooks in order, a prepended one first, then the load, then post-hooks."""
        optimizer, closure = stepped(optim_info, device, dtype)
        saved = deepcopy(optimizer.state_dict())
        calls = []

        def slow(optimizer, state_dict):
            calls.append("pre")
            for group in state_dict["param_groups"]:
                group["lr"] = 0.002

        def fast(optimizer, state_dict):
            calls.append("prepended")
            changed = deepcopy(state_dict)
            for group in changed["param_groups"]:
                group["lr"] = 0.5
            return changed

        def post(optimizer):
            calls.append("post")
            for state in optimizer.state.values():
                for name, value in state.items():
                    self.assertIsInstance(value, torch.Tensor, name)
            optimizer.param_groups[0]["weight_decay"] = 0.25

        handles = [
            optimizer.register_load_state_dict_pre_hook(slow),
            optimizer.register_load_state_dict_pre_hook(fast, prepend=True),
            optimizer.register_load_state_dict_post_hook(post),
        ]
        given = deepcopy(saved)
        optimizer.load_state_dict(given)
        self.assertEqual(calls, ["prepended", "pre", "post"])
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)
        self.assertEqual(optimizer.param_groups[0]["weight_decay"], 0.25)
        self.assertEqual(given, saved)
        for handle in handles:
            handle.remove()
        optimizer.load_state_dict(saved)
        self.assertEqual(len(calls), 3)
        self.assertEqual(optimizer.state_dict(), saved, rtol=0, atol=0)
        optimizer.step(closure)


class TestGradScaling(TestCase):
    @parametrize("separate_unscale", [False, True])
    @am_optims()
    def test_grad_scaling_autocast_fused_optimizers(
        self, device, dtype, optim_info, separate_unscale
    ):
        for kwargs in configurations(optim_info, device, ["fused"]):
            torch.manual_seed(0)
            models = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))]
            models.append(deepcopy(models[0]))
            unfused = {**kwargs, **IMPLEMENTATIONS["forloop"]}
            optimizers = [
                optim_info.optim_cls(model.parameters(), **options)
                for model, options in zip(models, (kwargs, unfused), strict=True)
            ]
            scalers = [torch.amp.GradScaler(device, init_scale=128.0) for _ in models]
            batches = [torch.randn(2, 4, 8) for _ in range(4)]
            for i, (x, target) in enumerate(batches):
                for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
                    optimizer.zero_grad()
                    with torch.autocast(device, dtype=torch.bfloat16):
                        loss = torch.nn.functional.mse_loss(model(x), target)
                    scaler.scale(loss).backward()
                    if i == 2:
                        model[1].weight.grad.fill_(float("inf"))
                    if separate_unscale:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                self.assertEqual(scalers[0].get_scale(), scalers[1].get_scale())
                for ours, theirs in zip(
                    models[0].parameters(), models[1].parameters(), strict=True
                ):
                    self.assertEqual(ours, theirs)
                    state = optimizers[0].state[ours]
                    other = optimizers[1].state[theirs]
                    self.assertEqual(state, other)
                    self.assertEqual(state["step"].item(), i + 1 if i < 2 else i)


for test_class in (
    TestConstruction,
    TestDirection,
    TestParamGroups,
    TestTensorLr,
    TestImplementations,
    TestComplex,
    TestNoOp,
    TestStateDict,
    TestCopies,
    TestClosure,
    TestHooks,
    TestGradScaling,
):
    instantiate_device_type_tests(test_class, globals(), only_for="cpu")
