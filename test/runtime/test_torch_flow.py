"""The expert's flow in few launches: the same function as the plain expert, and how many it takes.

Launches are counted on the CPU: each operator that is no view is a kernel on a GPU. Nothing is
timed; with `-s` the counts are printed.
"""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from spanvla_ros.model.backbone.attention import MASKED  # noqa: E402
from spanvla_ros.model.expert import ActionExpert  # noqa: E402
from spanvla_ros.runtime.torch_cuda import PRECISIONS  # noqa: E402
from spanvla_ros.runtime.torch_flow import ExpertFlow, Slots, flow_times  # noqa: E402
from spanvla_ros.runtime.torch_measure import launches  # noqa: E402

CPU = torch.device('cpu')
PREFIX, HEADS, KV_HEADS, HEAD_SIZE, BLOCKS = 13, 6, 2, 8, 3


class Sizes:
    """What an expert asks of its backbone."""

    def __init__(self, heads=HEADS, kv_heads=KV_HEADS, head_size=HEAD_SIZE, blocks=BLOCKS):
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.bridged = tuple(range(blocks))
        angles = torch.arange(4096)[:, None] * torch.logspace(0, -3, head_size // 2).repeat(2)
        self.cos, self.sin = angles.cos(), angles.sin()


def expert_of(sizes, width=48, waypoints=5, prefix=PREFIX):
    generator = torch.Generator().manual_seed(0)
    expert = ActionExpert(sizes, width, waypoints, prefix).eval()
    with torch.no_grad():
        for weight in expert.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return expert


def slots_of(sizes, room, prefix=PREFIX):
    """Random keys and values, and every third row masked."""
    generator = torch.Generator().manual_seed(1)
    rows = -(-(prefix + room) // 8) * 8
    shape = (len(sizes.bridged), 2, sizes.kv_heads, rows, sizes.head_size)
    bias = torch.full((rows,), MASKED)
    bias[:prefix] = torch.where(torch.arange(prefix) % 3 > 0, 0.0, MASKED)
    return Slots(torch.randn(shape, generator=generator), bias, prefix)


def lowered(expert, slots, kind):
    return expert.to(kind), Slots(slots.kv.to(kind), slots.bias.to(kind), slots.prefix)


@torch.no_grad()
def euler(expert, slots, start, ego, steps):
    """The plain expert step by step, its state in fp32."""
    kind, x = slots.kv.dtype, start
    keys, values = (part[:, None, :, : slots.prefix] for part in slots.kv.unbind(1))
    seen = (slots.bias[None, : slots.prefix] == 0).to(kind)
    for time in flow_times(steps, CPU, kind):
        now = time.expand(1, x.shape[1], -1)
        x = x + expert(x.to(kind), now, ego.to(kind), keys, values, seen).float() / steps
    return x


@pytest.mark.parametrize('draws', [1, 3])
@pytest.mark.parametrize('steps', [1, 4])
@torch.no_grad()
def test_it_is_the_flow_of_the_plain_expert(draws, steps):
    sizes = Sizes()
    expert, slots = expert_of(sizes), slots_of(sizes, room=15)
    flow = ExpertFlow(expert).of(slots, steps, draws)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        start = torch.randn(1, draws, 5, 3, generator=generator)
        ego = torch.randn(1, 20, generator=generator)
        wanted = euler(expert, slots, start, ego, steps)
        torch.testing.assert_close(flow(start, ego), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - start).abs().max() > 0.1
    # Draws do not see one another: each alone comes out the same.
    if draws > 1:
        alone = ExpertFlow(expert).of(slots, steps)(start[:, 1:2], ego)
        torch.testing.assert_close(alone, wanted[:, 1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('precision', ['fp16', 'bf16'])
@torch.no_grad()
def test_in_lower_precision_it_is_as_near_as_the_plain_one(precision):
    sizes, kind = Sizes(), PRECISIONS[precision]
    start, ego = torch.zeros(1, 1, 5, 3), torch.full((1, 20), 0.3)
    wanted = euler(expert_of(sizes), slots_of(sizes, 5), start, ego, 4)
    expert, slots = lowered(expert_of(sizes), slots_of(sizes, 5), kind)
    plain = (euler(expert, slots, start, ego, 4) - wanted).norm()
    ours = (ExpertFlow(expert).of(slots, 4)(start, ego) - wanted).norm()
    assert 0 < ours < 1.5 * plain
    assert ours < 0.05 * wanted.norm()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_it_is_the_same_and_all_blocks_and_steps_run_one_code():
    sizes = Sizes()
    expert, slots = expert_of(sizes), slots_of(sizes, room=5)
    start, ego = torch.zeros(1, 1, 5, 3), torch.ones(1, 20)
    flow = ExpertFlow(expert)
    wanted = flow.of(slots, 2)(start, ego)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flow.compile()
    found = flow.of(slots, 2)(start, ego)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@torch.no_grad()
def test_a_step_takes_half_the_launches_of_the_plain_expert():
    """Twelve blocks, as the 3B size has; widths do not change the count."""
    sizes = Sizes(blocks=12)
    expert, slots = lowered(expert_of(sizes), slots_of(sizes, 5), torch.bfloat16)
    start, ego = torch.zeros(1, 1, 5, 3), torch.zeros(1, 20)
    one, two = (ExpertFlow(expert).of(slots, steps) for steps in (1, 2))
    plain = launches(lambda: euler(expert, slots, start, ego, 2))
    plain -= launches(lambda: euler(expert, slots, start, ego, 1))
    first = launches(lambda: one(start, ego))
    step = launches(lambda: two(start, ego)) - first
    sys.stdout.write(
        f'\nlaunches a step: {plain} plain, {step} here, {first - step} once a plan\n'
    )
    assert step == 16 * 12 + 6
    assert step < 0.55 * plain
    # What comes before the loop is paid back by the second step.
    assert first + step < 2 * plain
