"""BWRF: the invariants of mixed-precision networks, the loss by hand, and what it leaves alone."""

import copy
import math
from collections import Counter

import pytest
import torch
from qtrain.blocks import split
from qtrain.bwrf import BlockReplacement, distillation
from qtrain.bwrf_config import MODES, scheduled
from qtrain.models import build_model
from torch import nn
from torch.nn import functional as F

from qkernels.nn import QConfig, calibrate, prepare, set_quantization

NETS = {
    "resnet8": {"width": 4},
    "mobile": {},
    "vit_tiny": {"width": 12, "depth": 3},
}
CLASSES = 5


def batch(seed=0, examples=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (examples,), generator=generator)


def partners(net, qconfig=None, dtype=torch.float64):
    """(student, teacher) in fp64, so that rounding tells nothing from a mistake."""
    torch.manual_seed(3)
    teacher = build_model(net, channels=3, classes=CLASSES, size=8, options=NETS[net]).to(dtype)
    for seed in range(3):  # BatchNorm's running statistics
        teacher(batch(seed, dtype=dtype)[0])
    student = prepare(teacher, qconfig or QConfig.lsq(2, 2))
    calibrate(student, [batch(9, dtype=dtype)])
    return student, teacher


def blocks_of(bwrf, module):
    return [module.get_submodule(name) for name in bwrf.blocks]


def by_hand(student, teacher, blocks, k, x, mode):
    """M_k, block after block."""
    ours, theirs = split(student, blocks), split(teacher, blocks)
    for place in range(len(blocks)):
        replaced = place + 1 == k if mode == "single" else place < k
        x = (ours if replaced else theirs)[place](x)
    return x


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", ["prefix", "single"])
def test_without_quantization_every_mixed_network_is_the_teacher(net, mode):
    student, teacher = partners(net)
    bwrf = BlockReplacement(student.eval(), teacher, mode=mode)
    x, _ = batch()
    off, on = {}, {}
    for enabled, into in ((False, off), (True, on)):
        set_quantization(student, enabled)
        into.update(bwrf.logits(x).mixed)
    expected = teacher(x)
    assert list(off) == list(range(1, len(bwrf.blocks) + (mode == "single")))
    for k, z in off.items():
        torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)
        assert (on[k] - expected).abs().max() > 1e-5


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", ["prefix", "single"])
def test_mixed_networks_by_hand(net, mode):
    """Branches that share a batch are the networks one by one, and so are their gradients."""
    student, teacher = partners(net)
    bwrf = BlockReplacement(student.eval(), teacher, mode=mode)
    x, _ = batch()
    weights = [p for p in student.parameters() if p.dim() > 1]
    for k, z in bwrf.logits(x).mixed.items():
        expected = by_hand(student, teacher, bwrf.blocks, k, x, mode)
        torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)
        aim = torch.randn_like(z)
        got, want = (
            torch.autograd.grad(
                logits, weights, aim, allow_unused=True, retain_graph=True, materialize_grads=True
            )
            for logits in (z, expected)
        )
        assert any(g.any() for g in want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", ["prefix", "single"])
def test_gradient_stays_in_the_replaced_blocks(net, mode):
    """The gradient of KD(M_k) is zero for Q_j, j > k; and it is there for the blocks replaced."""
    student, teacher = partners(net)
    bwrf = BlockReplacement(student, teacher, mode=mode)
    x, _ = batch()
    last = len(bwrf.blocks)
    for k in range(1, last + (mode == "single")):
        logits = bwrf.logits(x)
        student.zero_grad()
        distillation(logits.mixed[k], logits.teacher, 4.0).backward()
        for j, block in enumerate(blocks_of(bwrf, student), start=1):
            grads = [p.grad for p in block.parameters() if p.dim() > 1]
            replaced = j == k if mode == "single" else j <= k
            if replaced:
                assert any(g.any() for g in grads)
            else:
                # zeros where a branch shared a batch with that of M_k, else nothing
                assert all(g is None or not g.any() for g in grads)
        head = student.head.weight.grad
        assert (head is not None and bool(head.any())) == (k == last)
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["lsq", "minmax"])
def test_student_is_left_as_plain_training_leaves_it(net, mode, method):
    """Key for key and bit for bit, its running statistics and ranges too; no hook stays."""
    qconfig = QConfig.lsq(2, 2) if method == "lsq" else QConfig.minmax(3, 3)
    student, teacher = partners(net, qconfig)
    before = copy.deepcopy(teacher.state_dict())
    plain = copy.deepcopy(student)
    start = copy.deepcopy(student.state_dict())
    bwrf = BlockReplacement(student, teacher, mode=mode)
    assert_same(student.state_dict(), start)
    for seed in range(2):
        x, y = batch(seed)
        loss, _ = bwrf.loss(x, y, step=seed)
        loss.backward()
        plain(x)
    assert_same(student.state_dict(), plain.state_dict())
    moved = method == "minmax" or net != "vit_tiny"
    same = all(torch.equal(v, start[k]) for k, v in student.state_dict().items())
    assert same != moved
    assert_same(teacher.state_dict(), before)
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks
        if isinstance(module, nn.BatchNorm2d):
            assert module.track_running_stats


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("mode", MODES)
def test_passes_are_as_many_as_stated(mode):
    """In blocks times examples: n of F for z_F, and n (n - 1) / 2 in its suffixes; the student's
    backbone once."""
    student, teacher = partners("vit_tiny")
    bwrf = BlockReplacement(student, teacher, mode=mode)
    x, y = batch()
    counts = Counter()

    def count(who):
        return lambda module, args, out: counts.update({who: len(args[0]) // len(x)})

    for who, model in (("student", student), ("teacher", teacher)):
        for block in blocks_of(bwrf, model):
            block.register_forward_hook(count(who))
    n = len(bwrf.blocks)
    (k,) = bwrf.chosen(4, None) if mode == "sampled" else (0,)
    bwrf.loss(x, y, step=4)
    suffixes = n - k if mode == "sampled" else n * (n - 1) // 2
    assert counts == {"teacher": n + suffixes, "student": n + n * (mode == "single")}
    counts.clear()
    BlockReplacement(student, teacher, beta=0).loss(x, y)
    assert counts == {"teacher": n, "student": n}


def test_loss_by_hand():
    student, teacher = partners("resnet8")
    student.eval()
    x, y = batch()
    z_q, z_f = student(x), teacher.eval()(x)

    def divergence(z):
        p, q = (logits.div(3.0).softmax(1) for logits in (z_f, z))
        return 9.0 * (p * (p / q).log()).sum(1).mean()

    bwrf = BlockReplacement(student, teacher, temperature=3.0, alpha=0.5, beta=0.25)
    loss, parts = bwrf.loss(x, y)
    task = -z_q.log_softmax(1)[range(len(y)), y].mean()
    mixed = [by_hand(student, teacher, bwrf.blocks, k, x, "prefix") for k in (1, 2)]
    replaced = (divergence(mixed[0]) + divergence(mixed[1])) / 2
    want = {"task": task, "distill": divergence(z_q), "replaced": replaced}
    assert list(parts) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-10, atol=0.0)
        assert not parts[name].requires_grad and parts[name] > 0
    torch.testing.assert_close(loss, task + 0.5 * want["distill"] + 0.25 * replaced)
    alone, parts = BlockReplacement(student, teacher, alpha=0, beta=0).loss(x, y)
    assert torch.equal(alone, F.cross_entropy(z_q, y)) and parts["replaced"] == 0
    smooth = BlockReplacement(student, teacher, beta=0, task_loss=lambda z, y: z.mean())
    assert torch.equal(smooth.loss(x, y)[1]["task"], z_q.mean().detach())


def test_sampled_is_prefix_in_the_mean():
    student, teacher = partners("mobile")
    student.eval()
    x, y = batch()
    weights = [p for p in student.parameters() if p.dim() > 1]

    def found(bwrf, step=None):
        loss, parts = bwrf.loss(x, y, step=step)
        return [parts["replaced"], *torch.autograd.grad(loss, weights)]

    sampled = BlockReplacement(student, teacher, mode="sampled", seed=1)
    every = Counter(sampled.chosen(step, None) for step in range(4000))
    assert sorted(every) == [(1,), (2,), (3,), (4,)]
    # four standard deviations of a count
    assert all(abs(count - 1000) < 4 * math.sqrt(4000 * 3 / 16) for count in every.values())
    again = BlockReplacement(student, teacher, mode="sampled", seed=1)
    other = BlockReplacement(student, teacher, mode="sampled", seed=2)
    draws = [[b.chosen(s, None) for s in range(50)] for b in (sampled, again, other)]
    assert draws[0] == draws[1] != draws[2]
    steps = {sampled.chosen(step, None): step for step in range(100)}
    parts = zip(*(found(sampled, step) for step in steps.values()), strict=True)
    for values, whole in zip(parts, found(BlockReplacement(student, teacher)), strict=True):
        torch.testing.assert_close(sum(values) / 4, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["prefix", "single"])
def test_effects_apart(mode):
    student, teacher = partners("resnet8")
    student.eval()
    x, _ = batch()

    def replaced(effect):
        bwrf = BlockReplacement(student, teacher, mode=mode, effect=effect)
        return bwrf.logits(x)

    both, forward, backward = (replaced(effect) for effect in ("both", "forward", "backward"))
    weights = [p for p in student.parameters() if p.dim() > 1]
    for k, z in both.mixed.items():
        assert (z - both.student).abs().max() > 1e-3
        torch.testing.assert_close(forward.mixed[k], z, rtol=1e-12, atol=0.0)
        assert torch.equal(backward.mixed[k], backward.student)
        aim = torch.randn_like(z)
        for got, path in ((forward, forward.student), (backward, z)):
            grads, want = (
                torch.autograd.grad(
                    out, weights, aim, allow_unused=True, retain_graph=True, materialize_grads=True
                )
                for out in (got.mixed[k], path)
            )
            assert max(float(g.abs().max()) for g in want) > 0
            for a, b in zip(grads, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_forward_effect_sends_no_gradient_through_the_teacher():
    student, teacher = partners("resnet8")
    teacher_head = teacher.head
    seen = []
    hook = teacher_head.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    for effect in ("both", "forward"):
        BlockReplacement(student, teacher, effect=effect).logits(batch()[0])
    hook.remove()
    assert seen == [False, True, False, False]  # z_F, then the suffixes


def test_schedules():
    counts = {
        name: [scheduled(name, p / 8, 4) for p in range(9)] for name in ("linear", "exponential")
    }
    assert counts["linear"] == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    # 5^p reaches 2, 3 and 4 at .43, .68 and .86
    assert counts["exponential"] == [1, 1, 1, 1, 2, 2, 3, 4, 4]
    assert all(scheduled(name, p / 8, 1) == 1 for name in counts for p in range(9))
    student, teacher = partners("mobile")
    x, y = batch()
    bwrf = BlockReplacement(student.eval(), teacher, schedule="linear")
    every = BlockReplacement(student, teacher).logits(x).mixed
    now = bwrf.logits(x, progress=0.3).mixed
    assert list(now) == [1, 2]
    for k, z in now.items():
        torch.testing.assert_close(z, every[k], rtol=1e-11, atol=1e-11)
    whole = bwrf.loss(x, y, progress=1.0)[1]["replaced"]
    torch.testing.assert_close(whole, BlockReplacement(student, teacher).loss(x, y)[1]["replaced"])
    early = BlockReplacement(student, teacher, mode="sampled", schedule="exponential")
    assert {early.chosen(step, 0.5) for step in range(50)} == {(1,), (2,)}


def test_one_block_alone():
    student, teacher = partners("mobile")
    student.eval()
    x, _ = batch()
    every = BlockReplacement(student, teacher, mode="single").logits(x).mixed
    for k, z in every.items():
        bwrf = BlockReplacement(student, teacher, mode="single", block=k)
        (alone,) = bwrf.logits(x).mixed.items()
        assert alone[0] == k
        torch.testing.assert_close(alone[1], z, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast(mode):
    """Blocks that run outside of the student's forward take its dtype there."""
    student, teacher = partners("resnet8", dtype=torch.float32)
    x, y = batch(dtype=torch.float32)
    bwrf = BlockReplacement(student.eval(), teacher, mode=mode)
    exact, _ = bwrf.loss(x, y, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = bwrf.loss(x, y, step=0)
    loss.backward()
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.0)
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_named_blocks_and_a_loop_of_ones_own():
    student, teacher = partners("resnet8")
    bwrf = BlockReplacement(student, teacher, blocks=["stages.1", "head"])
    assert bwrf.blocks == ("stages.1", "head")
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    x, y = batch(examples=16)
    losses = []
    for _ in range(30):
        loss, _ = bwrf.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    teacher.train()
    bwrf.loss(x, y)
    assert not any(module.training for module in teacher.modules())


def test_compiled_in_place():
    student, teacher = partners("resnet8")
    eager = copy.deepcopy(student)
    student.compile(backend="eager")
    losses = []
    for model in (student, eager):
        bwrf = BlockReplacement(model, teacher)
        losses.append(torch.stack([bwrf.loss(*batch(seed))[0] for seed in range(3)]))
        losses[-1].mean().backward()
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0.0)
    for p, q in zip(student.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
