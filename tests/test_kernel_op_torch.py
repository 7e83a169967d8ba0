"""The operator inside PyTorch: checked, compiled, exported, under autocast, its memory, its FLOPs, on a GPU."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mirrorla.kernels import op, operators, reference
from tests.op_cases import assert_close, case, results


def raw(dtype, full, grad=True):
    """Arguments of the operators themselves."""
    (q, k, v), options = case(dtype=dtype, mirror="images" if full else None, rope=full, mask=full)
    tables = [t for name in ("mirror", "q_rope", "k_rope") for t in options.get(name, (None, None))]
    tables = [t if t is None else t.to(torch.promote_types(dtype, torch.float32)) for t in tables]
    if grad:
        q, k, v, *tables[:2] = (t if t is None else t.detach().requires_grad_() for t in (q, k, v, *tables[:2]))
    return q, k, v, tables, options.get("mask")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_operators_are_what_torch_expects(dtype, full):
    q, k, v, tables, mask = raw(dtype, full)
    opcheck(operators.attention, (q, k, v, *tables, mask, 1.0, 1e-6))
    opcheck(operators.kv_state, (k, v, *tables[:2], *tables[4:], mask, 1.0))
    q, k, v, tables, mask = raw(dtype, full, grad=False)
    S, s = operators.kv_state(k, v, *tables[:2], *tables[4:], mask, 1.0)
    read = (*tables[:4], 1.0, 1e-6)
    opcheck(operators.apply_state, (q.clone().requires_grad_(), S, s, *read))
    grad = torch.randn(*q.shape[:3], v.shape[-1]).to(dtype)
    opcheck(operators.attention_backward, (grad, q, k, v, S, s, *tables, mask, 1.0, 1e-6))
    opcheck(operators.kv_state_backward, (S, s, k, v, *tables[:2], *tables[4:], mask, 1.0))
    opcheck(operators.apply_state_backward, (grad, q, S, s, *read))


def compiled_equals_eager(backend):
    torch._dynamo.reset()
    attend = torch.compile(op.mirror_linear_attention, fullgraph=True, dynamic=True, backend=backend)
    for N in (7, 12, 30):
        tensors, options = case(N=N)
        assert_close(results(attend, tensors, options), results(op.mirror_linear_attention, tensors, options), 1e-6)


def test_compiled_without_a_graph_break_for_every_length():
    compiled_equals_eager("aot_eager")


@pytest.mark.slow
def test_compiled_by_inductor():
    compiled_equals_eager("inductor")


def test_exported_with_any_length():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return op.mirror_linear_attention(x, x, x)

    x = torch.randn(1, 12, 2, 8)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({1: torch.export.Dim("N", min=2)},))
    longer = torch.randn(1, 40, 2, 8)
    torch.testing.assert_close(program.module()(longer), Layer()(longer))


def test_autocast_leaves_equal_dtypes_alone_and_casts_mixtures_to_its_own():
    (q, k, v), options = case(dtype=torch.bfloat16)
    plain = results(op.mirror_linear_attention, (q, k, v), options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(op.mirror_linear_attention, (q, k, v), options)
        S, s, _ = op.kv_state(k, v)
        mixed = op.mirror_linear_attention(q, k.float(), v, **options)
        exact = op.mirror_linear_attention(q.float(), k.float(), v.float(), **options)
    assert all(torch.equal(inside[name], plain[name]) for name in plain)
    assert S.dtype == s.dtype == torch.float32
    assert torch.equal(mixed, plain["out"])
    assert torch.equal(exact, op.mirror_linear_attention(q.float(), k.float(), v.float(), **options))


@pytest.mark.parametrize("N,M", [(40, 40), (30, 50)])
def test_only_the_inputs_and_the_state_are_kept_for_backward(N, M):
    (q, k, v), options = case(N=N, M=M, mask=False)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        op.mirror_linear_attention(q, k, v, **options)
    given = (q, k, v, *(t for pair in options.values() for t in pair))
    extra = [x for place, x in kept.items() if place not in {t.untyped_storage().data_ptr() for t in given}]
    B, _, H, dk = q.shape
    assert sum(x.numel() for x in extra) == B * H * (dk * v.shape[-1] + dk)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts_in_the_reference():
    tensors, options = case()
    q, k, v = tensors
    assert flops(lambda: op.mirror_linear_attention(*tensors, **options)) == flops(
        lambda: reference.mirror_linear_attention(*tensors, **options)
    )
    assert flops(lambda: op.kv_state(k, v)) == flops(lambda: reference.kv_state(k, v))
    S, s, _ = op.kv_state(k, v)
    assert flops(lambda: op.apply_state(q, S, s)) == flops(lambda: reference.apply_state(q, S, s))
    B, N, H, dk = q.shape
    M, dv = v.shape[1], v.shape[3]
    trained = flops(lambda: results(op.mirror_linear_attention, tensors, options))
    assert trained == 2 * B * H * dk * (3 * M * dv + N * (3 * dv + 2))
    halves = flops(lambda: results(lambda q, k, v: op.apply_state(q, *op.kv_state(k, v)[:2]), tensors, {}))
    assert halves == trained
    on_meta = [x.to("meta") for x in tensors]
    assert flops(lambda: op.mirror_linear_attention(*on_meta)) == flops(lambda: op.mirror_linear_attention(*tensors))


def test_a_gpu_without_kernels_is_told_why_once(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    operators._hindrance.cache_clear(), operators._warn_once.cache_clear()
    reason = operators._hindrance(device, torch.float16, 32, 32)
    assert reason == "no kernel serves float16 on compute capability 7.5"
    with pytest.warns(UserWarning, match=r"mirrorla: no kernel serves float16 .*; attention runs as plain PyTorch"):
        operators._warn_once(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operators._warn_once(reason)
    operators._hindrance.cache_clear(), operators._warn_once.cache_clear()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, of dual tensors
def test_vmap_is_slow_and_right_and_forward_mode_is_refused():
    x = torch.randn(2, 1, 5, 1, 8)
    with pytest.warns(UserWarning, match="performance drop"):
        mapped = torch.func.vmap(lambda x: op.mirror_linear_attention(x, x, x))(x)
    torch.testing.assert_close(mapped, torch.stack([op.mirror_linear_attention(y, y, y) for y in x]))
    (q, k, v), _ = case(mask=False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        S, s, _ = op.kv_state(k, v)
        for call in (
            lambda: op.mirror_linear_attention(dual, k, v),
            lambda: op.kv_state(dual, dual),
            lambda: op.apply_state(dual, S, s),
        ):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative: use reverse mode, or"):
                call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "fp16"])
@pytest.mark.parametrize("N", [49, 784, 20_000])
def test_on_a_gpu_the_kernels_are_used_captured_in_graphs_and_compiled(dtype, N):
    tensors, options = case(2, N, N, 2, 32, 32, dtype=dtype)
    exact = results(reference.mirror_linear_attention, [x.double() for x in tensors], options)
    on_gpu = [x.cuda() for x in tensors]
    moved = {name: tuple(t.cuda() for t in x) if isinstance(x, tuple) else x.cuda() for name, x in options.items()}
    assert operators.uses_triton(on_gpu[0], 32, 32)
    eager = results(op.mirror_linear_attention, on_gpu, moved)
    assert_close({n: x.cpu() for n, x in eager.items()}, exact, 5e-3)
    compiled = torch.compile(op.mirror_linear_attention, fullgraph=True, dynamic=True)
    assert all(torch.equal(x, eager[n]) for n, x in results(compiled, on_gpu, moved).items())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = op.mirror_linear_attention(*on_gpu, **moved)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, eager["out"])
