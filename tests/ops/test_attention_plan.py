"""Which kernel an attention call goes to: decided from shapes alone, so CUDA's rules are tested without a GPU."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from ras_fast import backend, ops
from ras_fast.ops import attention_cpu, attention_cuda, attention_plan, attention_reference, attention_triton
from ras_fast.ops.attention_plan import Case


@pytest.fixture(params=[True, False], ids=["built", "not built"])
def built(request, monkeypatch):
    monkeypatch.setattr(backend, "load_library", lambda kind: "" if request.param else "not built")
    return request.param


def states(length_q, length_k, dim=128, dtype=torch.bfloat16, heads=32, kv_heads=8):
    shapes = ((1, heads, length_q, dim), (1, kv_heads, length_k, dim), (1, kv_heads, length_k, dim))
    return tuple(torch.empty(shape, dtype=dtype) for shape in shapes)


def kernel(tensors, rows, **case):
    return attention_plan.plan_cuda(*tensors, Case(rows, **case)).kernel


def test_few_rows_go_to_the_decode_kernel(built):
    assert kernel(states(1, 4096), 1) == ("decode" if built else "triton")
    assert kernel(states(32, 4096), 32) == ("decode" if built else "triton")
    assert kernel(states(33, 4096), 33) == "triton"


@pytest.mark.parametrize(("rows", "expected"), [(64, "flash"), (128, "flash"), (129, "triton"), (1024, "triton")])
def test_selected_rows_go_to_flash_and_all_rows_to_triton(built, rows, expected):
    assert kernel(states(1024, 1024), rows) == expected


def test_without_regions_flash_is_enough(built):
    assert kernel(states(1024, 1024), 0) == "flash"


@pytest.mark.parametrize("case", [{"window": 7}, {"softcap": 5.0}, {"bounds": True}, {"sinks": True}, {"bias": True}])
def test_what_flash_attention_lacks_goes_to_triton(built, case):
    assert kernel(states(1024, 1024), 1, **case) == "triton"


def test_shapes_that_flash_attention_lacks_go_to_triton(built):
    assert kernel(states(1024, 2048), 1) == "triton"  # its causal mask is aligned top-left
    assert kernel(states(1024, 2048), 1, is_causal=False) == "flash"
    assert kernel(states(1024, 1024, dtype=torch.float32), 1) == "triton"
    assert kernel(states(1024, 1024, dim=264), 1) == "triton"
    query, key, value = states(1024, 1024)
    assert kernel((query, torch.empty(key.numel() + 4, dtype=torch.bfloat16)[4:].view(key.shape), value), 1) == "triton"
    assert kernel((query, torch.empty(1, 8, 1024, 132, dtype=torch.bfloat16)[..., :128], value), 1) == "triton"


def test_nothing_to_compute_goes_to_the_reference(built):
    assert kernel(states(4, 0), 0) == "torch"
    assert kernel(states(0, 64), 0) == "torch"


def test_the_reason_for_triton_is_the_one(built):
    def why(rows, **case):
        return attention_plan.plan_cuda(*states(1024, 1024), Case(rows, **case)).why

    assert why(1024).startswith("masses of many rows; the Hopper kernel is out: it needs")
    assert why(1, window=7).startswith("masks, a dtype, a head dimension or an alignment that flash attention lacks")


def test_the_reason_names_what_the_cuda_kernels_do_not_take(built):
    refuse = attention_plan.cuda_kernels_refuse
    if not built:
        assert refuse(*states(1, 64)) == "not built"
        return
    assert "float32" in refuse(*states(1, 64, dtype=torch.float32))
    assert "not 84" in refuse(*states(1, 64, dim=84))
    assert "not 264" in refuse(*states(1, 64, dim=264))
    query, key, value = states(1, 64)
    assert refuse(query, key, value) == ""
    assert "16 bytes" in refuse(query, torch.empty(1, 8, 64, 132, dtype=torch.bfloat16)[..., :128])


@pytest.mark.parametrize("triton", [True, False])
def test_statistics_from_an_lse(built, triton, monkeypatch):
    """Masses and the scores of few rows are the CUDA kernels', where they take the tensors; scores of many rows Triton's."""
    monkeypatch.setattr(backend, "triton_is_installed", lambda: triton)
    plan, other = attention_plan.plan_statistics, "triton" if triton else "torch"
    query, key, _ = states(512, 512)
    assert plan(query, key, False) == plan(query, key, False, 8) == ("cuda" if built else other)
    assert plan(query, key, False, 9) == ("triton" if triton else "cuda" if built else "torch")
    assert plan(query, key, True) == plan(query, key, True, 8) == other
    query, key, _ = states(512, 512, dtype=torch.float32)
    assert plan(query, key, False) == plan(query, key, False, 1) == other


class Calls(TorchDispatchMode):
    """Notes the names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("preferred", "expected"),
    [(SDPBackend.CUDNN_ATTENTION, "cudnn"), (SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "flash")],
)
def test_the_flash_attention_that_torch_prefers(preferred, expected, monkeypatch):
    """On fake CUDA tensors: their shapes are computed by torch's own rules, no kernel runs."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: preferred.value)
    with FakeTensorMode(), Calls() as calls:
        query, key, value = (torch.empty(2, heads, 40, 64, dtype=torch.bfloat16, device="cuda") for heads in (8, 2, 2))
        out, lse = attention_cuda.flash(query, key, value, True, 0.1)
    assert f"_scaled_dot_product_{expected}_attention" in calls.names
    assert (out.shape, out.device.type) == (query.shape, "cuda")
    assert (lse.shape, lse.dtype) == ((2, 8, 40), torch.float32)


def test_a_plan_is_carried_out_on_cuda(monkeypatch):
    """As far as torch's own kernel, on tensors without memory."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: SDPBackend.FLASH_ATTENTION.value)
    monkeypatch.setattr(attention_reference, "laid_out", lambda out: out)  # asks for a device
    monkeypatch.setattr(attention_plan, "is_hopper", lambda device: False)  # likewise
    masks = (0.1, True, None, None, 0, 0.0)
    with FakeTensorMode(), Calls() as calls:
        query, key, value = (torch.empty(2, heads, 640, 64, dtype=torch.bfloat16, device="cuda") for heads in (8, 2, 2))
        out, lse, mass = attention_cuda.region_attention(query, key, value, None, 0, *masks, None, None, 0)
    assert "_scaled_dot_product_flash_attention" in calls.names
    assert (out.shape, lse.shape, mass.shape) == (query.shape, (2, 8, 640), (2, 8, 0, 0))


@pytest.mark.parametrize("kernel", ["torch", "decode", "hopper", "triton"])
def test_every_plan_is_carried_out_by_its_own_kernel(kernel, monkeypatch):
    """On the CPU, where the ops have the reference if nothing else."""
    query, key, value = (tensor.float().normal_() for tensor in states(1, 64, dim=16, heads=4, kv_heads=2))
    arguments = (query, key, value, None, 0, 0.25, True, None, None, 0, 0.0, None, None, 0)
    monkeypatch.setattr(attention_cuda, "plan_cuda", lambda *_: attention_plan.Plan(kernel, ""))
    spies = {"torch": attention_reference, "triton": attention_triton}
    for name, module in spies.items():
        spies[name] = mock.Mock(return_value="result")
        monkeypatch.setattr(module, "region_attention", spies[name])
    with Calls() as calls:
        attention_cuda.region_attention(*arguments)
    assert [name for name, spy in spies.items() if spy.called] == ([kernel] if kernel in spies else [])
    ops_called = [name for name in calls.names if name in ("decode_attention", "hopper_prefill")]
    assert ops_called == {"decode": ["decode_attention"], "hopper": ["hopper_prefill"]}.get(kernel, [])


def test_statistics_are_planned_by_their_bounds_and_the_rows_that_are_scored(monkeypatch):
    plan = mock.Mock(return_value="torch")
    monkeypatch.setattr(attention_cuda, "plan_statistics", plan)
    query, key, _ = (tensor.float() for tensor in states(9, 64, dim=16, heads=4, kv_heads=2))
    lse, ids, own = torch.zeros(1, 4, 9), torch.zeros(1, 64, dtype=torch.int32), torch.zeros(1, 9, dtype=torch.int32)
    for masks in ((0.25, True, None, None, 0, 0.0, None), (0.25, False, None, own, 0, 0.0, None)):
        attention_cuda.region_mass(query, key, lse, ids, 1, *masks, 7)
        attention_cuda.key_attention(query, key, lse, 7, "mean", None, *masks)
        attention_cuda.region_statistics(query, key, lse, ids, 1, 7, "mean", *masks)
    planned = [call.args[2:] for call in plan.call_args_list]
    assert planned == [(False,), (False, 7), (False, 7), (True,), (True, 7), (True, 7)]


@pytest.mark.parametrize("scale", [0.1, 0.3])
@pytest.mark.parametrize("preferred", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
def test_a_sum_that_is_nan_is_nan_in_flash_attentions_lse(preferred, scale, monkeypatch):
    """Flash attention says +inf, of which masses of 0 would come. And its scale is the call's."""
    given = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]).view(1, 4, 1)
    run = mock.Mock(return_value=("out", given))
    name = "cudnn" if preferred == SDPBackend.CUDNN_ATTENTION else "flash"
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: preferred.value)
    monkeypatch.setattr(attention_cuda, "_activated_flash_attention", lambda: None)
    monkeypatch.setattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention", run)
    query, key, value = states(1, 8, heads=4)
    lse = attention_cuda.flash(query, key, value, True, scale)[1]
    torch.testing.assert_close(lse.flatten(), torch.tensor([torch.nan, -torch.inf, torch.nan, 1.0]), equal_nan=True)
    assert run.call_args.kwargs["scale"] == scale


def test_an_activated_flash_attention_goes_before_cudnn(monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    test_the_flash_attention_that_torch_prefers(SDPBackend.CUDNN_ATTENTION, "flash", monkeypatch)


HOPPER_REFUSALS = {
    "": {},
    "compute capability": {"hopper": False},
    "not built for sm_90a": {"kernel": False},
    "no window": {"case": {"window": 7}},
    "not 264": {"dim": 264},
    "float32": {"dtype": torch.float32},
    "expanded": {"expanded": 8},
    "no expanded tensors": {"expanded": 2},
}


@pytest.mark.parametrize("why", HOPPER_REFUSALS)
def test_the_hopper_kernel_is_chosen_for_masses_where_it_can_run(monkeypatch, why):
    setting = HOPPER_REFUSALS[why]
    monkeypatch.setattr(backend, "load_library", lambda kind: "")
    monkeypatch.setattr(attention_plan, "is_hopper", lambda device: setting.get("hopper", True))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: setting.get("kernel", True))
    heads = setting.get("expanded", 8)
    query, key, value = states(1024, 1024, setting.get("dim", 128), setting.get("dtype", torch.bfloat16), kv_heads=heads)
    if "expanded" in setting:
        key = key[:, :1].expand_as(key)
    arguments = (query, key, value, Case(1024, **setting.get("case", {})))
    plan = attention_plan.plan_cuda(*arguments)
    assert plan.kernel == ("triton" if why else "hopper")
    assert why in plan.why


@pytest.mark.parametrize(
    ("length_q", "dim", "rows", "expected"),
    [(128, 128, 1, "hopper"), (127, 128, 127, "triton"), (127, 128, 1, "flash"), (4096, 64, 1, "hopper"),
     (4096, 64, 4096, "hopper"), (2048, 128, 0, "hopper"), (2048, 136, 1, "flash"), (2048, 256, 2048, "hopper")],
)  # fmt: skip
def test_where_the_hopper_kernel_is_the_fastest(monkeypatch, length_q, dim, rows, expected):
    monkeypatch.setattr(backend, "load_library", lambda kind: "")
    monkeypatch.setattr(attention_plan, "is_hopper", lambda device: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    assert kernel(states(length_q, length_q, dim), rows) == expected


def test_the_hopper_kernel_takes_a_dimension_of_one_with_any_stride(monkeypatch):
    monkeypatch.setattr(backend, "load_library", lambda kind: "")
    monkeypatch.setattr(attention_plan, "is_hopper", lambda device: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    tensors = [tensor[0].as_strided(tensor.shape, (0, *tensor.stride()[1:])) for tensor in states(1024, 1024)]
    assert kernel(tensors, 1024) == "hopper"


# (query rows, whether the library is built, whether the processor has matrix instructions, keywords)
FEW = 2 if attention_plan.HAS_AVX512 else attention_plan.CPU_DECODE_ROWS  # of two packed rows each
CPU_CASES = {
    "decode": [(1, True, False, {}), (1, True, True, {}), (FEW, True, False, {"window": 16}), (8, True, True, {})],
    "prefill": [(FEW + 1, True, False, {}), (64, True, False, {}), (64, True, True, {"window": 16}), (40, True, True, {})],
    "flash": [(64, True, True, {}), (64, False, False, {}), (40, False, False, {"is_causal": False})],
    "softmax": [(64, False, False, {"softcap": 5.0}), (64, False, True, {"scale": -1.0}), (40, False, False, {})],
}


@pytest.mark.parametrize(("plan", "case"), [(plan, case) for plan, cases in CPU_CASES.items() for case in cases])
def test_explain_tells_what_runs_on_the_cpu(plan, case, monkeypatch):
    """The functions that carry out the plans are watched while the call runs."""
    rows, built, quick, keywords = case
    has_kernel = backend.has_kernel
    monkeypatch.setattr(backend, "has_kernel", lambda op, kind: has_kernel(op, kind) and (built or op != "prefill_attention"))
    monkeypatch.setattr(backend, "_automatic", backend._automatic.__wrapped__)  # which remembers what is built
    monkeypatch.setattr(attention_plan, "MATRIX_DTYPES", {torch.bfloat16} if quick else ())
    arguments = *states(rows, 64, dim=16, dtype=torch.bfloat16, heads=4, kv_heads=2), torch.zeros(1, 64, dtype=torch.int32), 1
    spies = {"flash": "flash", "softmax": "by_chunks_of_rows"}
    for kernel, name in spies.items():
        spies[kernel] = mock.Mock(side_effect=getattr(attention_cpu, name))
        monkeypatch.setattr(attention_cpu, name, spies[kernel])
    with Calls() as calls:
        ops.region_attention(*arguments, **keywords)
    assert ops.explain(*arguments, **keywords).kernel == plan
    assert [kernel for kernel, spy in spies.items() if spy.called] == ([plan] if plan in spies else [])
    direct = plan == "decode" or (plan == "prefill" and not quick)  # else from within region_attention
    assert calls.names[-1] == (f"{plan}_attention" if direct else "region_attention")


@pytest.mark.parametrize(
    ("avx512", "rows", "heads", "expected"),
    [(True, 1, 8, "decode"), (True, 2, 4, "decode"), (True, 2, 6, "prefill"), (True, 4, 2, "decode"), (True, 5, 2, "prefill"),
     (False, 8, 8, "decode"), (False, 9, 2, "prefill")],
)  # fmt: skip
def test_where_prefill_takes_over_from_decode_on_the_cpu(monkeypatch, avx512, rows, heads, expected):
    """With AVX-512 it goes by the rows times the heads of a group, but for a single row."""
    monkeypatch.setattr(attention_plan, "HAS_AVX512", avx512)
    monkeypatch.setattr(attention_plan, "MATRIX_DTYPES", {torch.float16})
    query, key, value = states(rows, 64, dtype=torch.bfloat16, heads=heads, kv_heads=2)
    assert ops.explain(query, key, value).kernel == expected
    half = (tensor.half() for tensor in states(8, 64, heads=8, kv_heads=2))  # whose other kernel is torch's
    assert ops.explain(*half).kernel == "decode"
    bounds = torch.full((1, rows), 64, dtype=torch.int32)  # of their own: rows alone decide
    assert ops.explain(query, key, value, is_causal=False, kv_end=bounds).kernel == ("prefill" if rows > 8 else "decode")


@pytest.mark.parametrize(("keys", "expected"), [(31, "softmax"), (32, "flash")])
def test_few_keys_do_not_go_to_torchs_flash_attention(keys, expected, monkeypatch):
    """Which turns a NaN query into zeros there."""
    monkeypatch.setattr(backend, "has_kernel", lambda *_: False)
    assert attention_plan.plan_cpu_prefill(*states(keys, keys), Case()).kernel == expected


def test_explain_follows_the_forced_backend(monkeypatch):
    tensors = states(8, 64, dtype=torch.float32)
    monkeypatch.setattr(backend, "_forced", "torch")
    assert ops.explain(*tensors).kernel == "torch"
    monkeypatch.setattr(backend, "_forced", "auto")
    assert ops.explain(*(t.double() for t in tensors)).why == "float64"


@pytest.mark.parametrize(("rows", "keywords"), [(1, {}), (64, {}), (1, {"kv_end": torch.full((1, 1), 9, dtype=torch.int32)})])
def test_explain_tells_how_triton_is_launched(rows, keywords, monkeypatch):
    from ras_fast.triton_kernels import attention as triton_attention

    tensors, launched = states(rows, 640), {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.update(options, grid=grid)

    monkeypatch.setattr(triton_attention, "_attention_kernel", Kernel())
    monkeypatch.setattr(triton_attention, "_merge_kernel", Kernel())
    if keywords:
        keywords |= {"is_causal": False}
    monkeypatch.setattr(backend, "_forced", "triton")
    config = ops.explain(*tensors, **keywords).config
    monkeypatch.setattr(triton_attention, "_merge_kernel", mock.MagicMock())
    triton_attention.region_attention(*tensors, None, 0, 0.1, True, None, None, 0, 0.0, None, None, 0)
    programs, splits = launched["grid"]
    assert f"{launched['BLOCK_M']} rows × {launched['BLOCK_N']} keys, {launched['num_warps']} warps" in config
    assert f"{launched['num_stages']} stages; {launched['PACK']} heads a tile, {programs} programs × {splits} splits" in config


def test_explain_refuses_what_the_call_refuses():
    query, key, value = states(8, 64)
    with pytest.raises(ValueError, match="softcap is -1"):
        ops.explain(query, key, value, softcap=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        ops.explain(query, key, value, causal=True)
    with pytest.raises(ValueError, match="value is"):
        ops.explain(query, key, value[:, :, 1:])
