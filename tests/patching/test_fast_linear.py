"""Linear layers that take few rows by `ops.linear`: which ones, when, and that everything else keeps its own."""

import copy
import pickle
import sys
from functools import wraps

import pytest
import torch
from calls import Calls
from families import FAMILIES
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import ras_fast
from ras_fast.ops.linear import few_rows
from ras_fast.patching.linear import FastLinear


@pytest.fixture
def llava():
    return FAMILIES["llava"].model("llava")


def ids(length):
    """Of two prompts; two rows are few for a small weight, and four many."""
    return {"input_ids": torch.randint(3, 60, (2, length)), "use_cache": False}


def decoder_linears(model):
    layers = [module for module in model.model.language_model.layers.modules() if isinstance(module, nn.Linear)]
    return [*layers, model.lm_head]


def count(call):
    """Products by the ops; that of an MLP's two projections counts as two, that of queries, keys and values as three."""
    with torch.no_grad(), Calls() as calls:
        call()
    return calls.count["ras_fast::linear"] + 2 * calls.count["ras_fast::linear_glu"] + 3 * calls.count["ras_fast::linears"]


def test_few_rows_take_the_op_and_many_do_not(llava):
    linears = decoder_linears(llava)
    assert len(linears) == 3 * 7 + 1
    few, many = ids(1), ids(2)
    with torch.no_grad():
        expected = [llava(**given).logits for given in (few, many)]
        with ras_fast.patch(llava, regions=False, norms=False) as patched:
            assert patched.report().linears == len(linears)
            assert "22 linear layers" in str(patched.report())
            assert count(lambda: llava(**few)) == len(linears)
            assert count(lambda: llava(**many)) == 0
            torch.testing.assert_close(llava(**few).logits, expected[0], atol=1e-5, rtol=1e-5)
            assert torch.equal(llava(**many).logits, expected[1])
            assert count(lambda: llava(**many, logits_to_keep=1)) == 1
    assert not any("forward" in module.__dict__ for module in llava.modules())


def test_others_keep_theirs(llava):
    with ras_fast.patch(llava, linears=False) as patched:
        assert patched.report().linears == 0
        assert count(lambda: llava(**ids(1))) == 0
    with ras_fast.patch(llava):
        mine = {id(module) for module in decoder_linears(llava)}
        assert {id(m) for m in llava.modules() if isinstance(m.__dict__.get("forward"), FastLinear)} == mine


@pytest.fixture
def slow_bfloat16(monkeypatch):
    """As on a processor without instructions for it."""
    few_rows.cache_clear()
    monkeypatch.setattr(sys.modules["ras_fast.ops.linear"], "SLOW_DTYPES", frozenset({torch.bfloat16}))
    yield
    few_rows.cache_clear()


def test_the_vision_towers_take_it_where_torch_is_slow(llava, slow_bfloat16):
    llava.bfloat16()
    given = FAMILIES["llava"].inputs(llava, ["tIt"], dtype=torch.bfloat16)
    del given["regions"]
    with torch.no_grad():
        expected = llava(**given).logits
        with ras_fast.patch(llava) as patched:
            linears = [module for module in llava.modules() if type(module) is nn.Linear]
            assert patched.report().linears == len(linears) > len(decoder_linears(llava))
            assert count(lambda: llava(**given)) == len(linears)
            torch.testing.assert_close(llava(**given).logits, expected, atol=0.05, rtol=0.05)
    assert not any("forward" in module.__dict__ for module in llava.modules())


def test_a_row_does_not_depend_on_the_batch(llava):
    """In half precision torch's own products round otherwise from batch to batch."""
    rows = torch.randint(3, 60, (2, 1))
    llava.bfloat16()
    with torch.no_grad(), ras_fast.patch(llava):
        together = llava(input_ids=rows, use_cache=False).logits
        for row, logits in zip(rows, together, strict=True):
            assert torch.equal(llava(input_ids=row[None], use_cache=False).logits[0], logits)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_not_a_plain_linear_is_left_alone(llava):
    layers = llava.model.language_model.layers
    layers[0].mlp.gate_proj.__class__ = Doubled
    parametrizations.weight_norm(layers[1].mlp.up_proj)
    own = layers[2].mlp.down_proj.forward
    layers[2].mlp.down_proj.forward = wraps(own)(lambda x: own(x))
    given = ids(1)
    with torch.no_grad():
        expected = llava(**given).logits
        with ras_fast.patch(llava) as patched:
            assert patched.report().linears == 19
            assert "forward of its own" in patched.report().unfused["model.language_model.layers.2.mlp.down_proj"]
            torch.testing.assert_close(llava(**given).logits, expected, atol=1e-5, rtol=1e-5)


def test_weights_that_change_after_the_patch(llava):
    given = ids(1)
    with torch.no_grad(), ras_fast.patch(llava, regions=False):
        parametrizations.weight_norm(llava.model.language_model.layers[1].mlp.up_proj)
        assert count(lambda: llava(**given)) == 21
        llava.lm_head.weight.data.mul_(2)
        doubled = llava(**given).logits
        llava.lm_head.weight = nn.Parameter(llava.lm_head.weight / 2)
        torch.testing.assert_close(2 * llava(**given).logits, doubled)
        llava.bfloat16()
        assert count(lambda: llava(**given)) == 21
        assert llava(**given).logits.dtype == torch.bfloat16


def test_a_bias_that_is_elsewhere_is_not_lost(llava):
    """Pruned or parametrised, it is no parameter of the layer any more."""
    linear, x = nn.Linear(8, 6), torch.randn(2, 8)
    linear.__dict__["forward"] = FastLinear(linear)
    with torch.no_grad():
        assert count(lambda: linear(x)) == 1
        expected = linear(x)
        prune.identity(linear, "bias")
        torch.testing.assert_close(linear(x), expected)
        assert count(lambda: linear(x)) == 0
        prune.remove(linear, "bias")
        parametrize.register_parametrization(linear, "bias", Negated())
        torch.testing.assert_close(linear(x), expected - 2 * linear.parametrizations.bias.original)


class Negated(nn.Module):
    def forward(self, bias):
        return -bias


def test_what_the_kernel_refuses_takes_the_original():
    """And what the original refuses gets its words."""
    linear = nn.Linear(8, 6)
    fast = FastLinear(linear)
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = linear(x)
        assert torch.equal(fast(input=x), expected)
        linear.weight = nn.Parameter(linear.weight.T.contiguous().T)
        assert torch.equal(fast(x), linear(x))
        assert torch.equal(fast(x.T.contiguous().T), linear(x))
        for bias in (torch.randn(12)[::2], torch.randn(1).expand(6), torch.randn(1)):
            linear.bias = nn.Parameter(bias)
            assert torch.equal(fast(x), linear(x))
        for wrong in (torch.randn(2, 7), x.half(), torch.tensor(1.0)):
            for call in (linear, fast):
                with pytest.raises(RuntimeError):
                    call(wrong)
        linear.bias = None
        assert torch.equal(fast(x.to_sparse_csr()), linear(x.to_sparse_csr()))
        linear.half().to("meta")
        assert fast(x[:0].half().to("meta")).shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_keys_and_values_are_one_launch(llava, dtype):
    """To the same bits."""
    attention = llava.to(dtype).model.language_model.layers[0].self_attn
    x = torch.randn(1, 2, 64, dtype=dtype)
    with torch.no_grad(), ras_fast.patch(llava):
        leader = attention.q_proj.forward
        assert [follower.linear for follower in leader.followers] == [attention.k_proj, attention.v_proj]
        with Calls() as calls:
            together = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        assert calls.count == {"ras_fast::linears": 1}
        leader.followers = ()
        with Calls() as calls:
            alone = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        assert calls.count == {"ras_fast::linear": 3}
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


@pytest.fixture
def joined():
    """Two linear layers of which the first computes the second's rows as well."""
    linears = [nn.Linear(8, 6).requires_grad_(False) for _ in range(2)]
    fast = [FastLinear(linear) for linear in linears]
    for linear, forward in zip(linears, fast, strict=True):
        linear.__dict__["forward"] = forward
    fast[0].followers = (fast[1],)
    return linears


def check_follower(linear, x):
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias), atol=1e-6, rtol=0)


def test_what_was_computed_ahead_is_for_those_very_rows(joined):
    first, second = joined
    x = torch.randn(2, 8)
    first(x)
    x.mul_(2)
    check_follower(second, x)
    first(x)
    check_follower(second, x.clone())
    check_follower(second, x)
    with torch.inference_mode():  # whose tensors do not count what is written to them
        x = torch.randn(2, 8)
        first(x)
        x.mul_(2)
        check_follower(second, x)


def test_rows_that_nobody_asks_for_are_computed_ahead_once(joined):
    first, _ = joined
    x = torch.randn(2, 8)
    with Calls() as calls:
        for _ in range(3):
            first(x)
    assert calls.count == {"ras_fast::linears": 1, "ras_fast::linear": 2}


def test_a_hook_that_prepares_a_weight_is_waited_for(joined):
    first, second = joined
    x = torch.randn(2, 8)

    def prepare(module, args):
        module.weight.data.neg_()

    handle = second.register_forward_pre_hook(prepare)
    with Calls() as calls:
        first(x)
        got = second(x)
    torch.testing.assert_close(got, nn.functional.linear(x, second.weight, second.bias), atol=1e-6, rtol=0)
    assert calls.count["ras_fast::linears"] == 0
    handle.remove()
    heard = []
    second.register_forward_hook(lambda module, args, output: heard.append(output))
    with Calls() as calls:
        first(x)
        assert second(x) is heard[0]
    assert calls.count["ras_fast::linears"] == 1


@pytest.mark.parametrize("change", [
    lambda linear: linear.to("meta"), lambda linear: linear.bfloat16(), lambda linear: linear.requires_grad_(),
    lambda linear: parametrizations.weight_norm(linear),
    lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.T.contiguous().T, requires_grad=False)),
])  # fmt: skip
def test_a_follower_that_has_changed_does_not_stop_the_first(joined, change):
    first, second = joined
    change(second)
    x = torch.randn(2, 8)
    with torch.set_grad_enabled(any(parameter.requires_grad for parameter in second.parameters())):
        for _ in range(2):
            check_follower(first, x)
    if second.weight.device == x.device and second.weight.dtype == x.dtype:
        torch.testing.assert_close(second(x), nn.functional.linear(x, second.weight, second.bias))


def test_a_follower_of_which_a_share_is_there_does_not_stop_the_first(joined):
    """As DeepSpeed's ZeRO-3 holds weights until their own forward; the first has learned nothing of the new dtype yet."""
    first, second = (linear.bfloat16() for linear in joined)
    second.weight.data = torch.empty(0, dtype=torch.bfloat16)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    gathers = second.register_forward_pre_hook(lambda module, args: None)
    check_follower(first, x)
    gathers.remove()
    check_follower(first, x)


def test_a_weight_that_is_cast_there_and_back():
    linear, x = nn.Linear(8, 6), torch.randn(2, 8)
    fast = FastLinear(linear)
    with torch.no_grad():
        assert count(lambda: fast(x)) == 1
        linear.double()
        assert count(lambda: fast(x.double())) == 0
        linear.float()
        assert count(lambda: fast(x)) == 1


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_rows_elsewhere_take_the_original(monkeypatch, backend):
    monkeypatch.setattr("ras_fast.backend._forced", backend)
    linear, x = nn.Linear(8, 6, bias=False), torch.randn(2, 8, device="meta")
    fast = FastLinear(linear)
    with torch.no_grad():
        for rows in (x, x[:0]):
            assert fast(rows).shape == (len(rows), 6)
        linear.to("meta")
        for rows in (x, x[:0], x[:0]):
            assert fast(rows).shape == (len(rows), 6)


def test_autocast_of_the_device_that_a_weight_was_moved_to():
    linear, x = nn.Linear(8, 6), torch.randn(2, 8)
    fast = FastLinear(linear)
    fast.few.device, fast.few._on_cpu = "cuda", False  # as if it had been there until now
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_gradients_of_either_parameter_alone(name):
    linear, x = nn.Linear(8, 6).requires_grad_(False), torch.randn(2, 8)
    getattr(linear, name).requires_grad_()
    FastLinear(linear)(x).sum().backward()
    got, getattr(linear, name).grad = getattr(linear, name).grad, None
    linear(x).sum().backward()
    torch.testing.assert_close(got, getattr(linear, name).grad)


def test_derivatives_by_transforms():
    linear, x = nn.Linear(8, 6), torch.randn(2, 8)
    fast = FastLinear(linear)
    (value, tangent), (wanted, direction) = (torch.func.jvp(f, (x,), (torch.ones_like(x),)) for f in (fast, linear))
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(tangent, direction)
    linear.__dict__["forward"] = fast
    gradient = torch.func.grad(lambda bias: torch.func.functional_call(linear, {"bias": bias}, x).sum())(linear.bias.detach())
    torch.testing.assert_close(gradient, torch.full((6,), 2.0))


def test_a_backend_forced_for_another_device(llava):
    with ras_fast.patch(llava, regions=False, norms=False), pytest.MonkeyPatch.context() as patches:
        patches.setattr("ras_fast.backend._forced", "cuda")
        assert count(lambda: llava(**ids(1))) == 0


def test_a_layer_without_a_weight_is_left_alone(llava):
    layer = llava.model.language_model.layers[0]
    layer.extra = nn.Linear(4, 4)
    layer.extra.weight = None
    layer.other = nn.Linear(4, 4).to(torch.float8_e4m3fn)
    with ras_fast.patch(llava) as patched:
        assert patched.report().linears == 22


def test_gradients_and_autocast_take_the_original(llava):
    linear, x = llava.lm_head, torch.randn(2, 64, requires_grad=True)
    fast = FastLinear(linear)
    fast(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.detach().sum(0).expand(2, -1))
    with torch.autocast("cpu", torch.bfloat16):
        assert count(lambda: fast(x)) == 0
        assert fast(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert count(lambda: fast(x)) == 1
        assert count(lambda: fast(x[None, None])) == 1
        with pytest.raises(RuntimeError, match="dtype"):
            fast(x.half())
        for dtype in (torch.float64, torch.complex64):
            other = nn.Linear(8, 3, dtype=dtype)
            given = torch.randn(2, 8, dtype=dtype)
            assert torch.equal(FastLinear(other)(given), other(given))


def test_compiled_it_is_torchs(llava):
    given, called = ids(1), []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad(), ras_fast.patch(llava, regions=False, norms=False):
        compiled = torch.compile(llava, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(**given).logits, llava(**given).logits, atol=1e-5, rtol=1e-5)
    assert any("linear" in name for name in called)
    assert not any("ras_fast" in name for name in called)


def test_copies_and_pickles(llava):
    given = ids(1)
    with torch.no_grad(), ras_fast.patch(llava):
        expected = llava(**given).logits
        for again in (copy.deepcopy(llava), pickle.loads(pickle.dumps(llava))):
            assert all(linear.forward.linear is linear for linear in decoder_linears(again))
            assert count(lambda again=again: again(**given)) == 22
            assert torch.equal(again(**given).logits, expected)


def test_lora_and_its_base_layers(llava):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llava, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    given = ids(1)
    with torch.no_grad():
        expected = adapted(**given).logits
        with ras_fast.patch(adapted) as patched:
            assert patched.report().linears == 22 + 2 * 3
            torch.testing.assert_close(adapted(**given).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_product_that_differs_is_refused(llava, monkeypatch):
    def wrong(x, weight, bias):
        return 1.01 * nn.functional.linear(x, weight)

    monkeypatch.setattr("ras_fast.patching.linear.linear_by_kernel", wrong)
    with ras_fast.patch(llava) as patched:
        assert patched.report().linears == patched.report().mlps == 0
        assert "differs from the original" in patched.report().unfused["lm_head"]
