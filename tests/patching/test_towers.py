"""Attention of vision towers: SDPA's numbers, by this package's kernel where that is faster, and by SDPA itself elsewhere; of
neighbours of one size in one call."""

import copy
import inspect
import weakref

import pytest
import torch
from calls import Calls
from families import FAMILIES
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel

import ras_fast
from ras_fast import backend
from ras_fast.ops.attention_plan import MATRIX_DTYPES
from ras_fast.patching import towers
from ras_fast.patching.report import Report
from ras_fast.patching.structure import find_decoder
from ras_fast.patching.towers import attention, lay_out_by_rows, packed_attention, speed_up_gelus, speed_up_towers
from ras_fast.patching.undo import Undo
from ras_fast.registration import PACKED, TOWER

KERNEL = "ras_fast::prefill_attention"
HALVES = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype not in MATRIX_DTYPES]
# Attention modules of the tower, and of a resampler, the audio tower or the like. Towers of others give masks always.
TOWERS = {
    "llava": 2, "llava_onevision": 2, "qwen2_vl": 2, "qwen2_5_vl": 2, "qwen2_5_omni_thinker": 3, "qwen3_vl": 2, "glm4v": 2,
    "molmo2": 3, "internvl": 2, "idefics2": 3, "gemma3": 2, "gemma4": 2, "paligemma": 2, "aya_vision": 2, "kimi_k25": 2,
}  # fmt: skip
PACKING = {"qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl", "glm4v", "kimi_k25"}
if "cu_seqlens" in inspect.getsource(PixtralVisionModel):  # in older versions it gives none
    TOWERS["mistral3"] = 2
    PACKING.add("mistral3")
SIGLIP = {"aya_vision", "gemma3", "idefics2", "idefics3", "llava_onevision", "ovis2", "paligemma", "smolvlm"}
needs_kernel = pytest.mark.skipif(
    not backend.has_kernel("prefill_attention", "cpu") or not HALVES, reason="SDPA is the fastest here"
)


def features(model: nn.Module, batch: dict) -> torch.Tensor:
    pixels = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask") and "token_type" not in k}
    owner = model.model if hasattr(model.model, "get_image_features") else model
    output = owner.get_image_features(**pixels, return_dict=True)
    found = output.pooler_output if getattr(output, "pooler_output", None) is not None else output.last_hidden_state
    return torch.cat([part.flatten() for part in found]).float()


def same(batch: dict) -> dict:
    return batch


@torch.no_grad()
def originals(name: str, dtype: torch.dtype, change=same) -> tuple[nn.Module, dict, torch.Tensor, torch.Tensor]:
    """(model, batch, its features in float32, its features)."""
    description = FAMILIES[name]
    exact, model = description.model(name), description.model(name, dtype)
    exact.load_state_dict(model.state_dict())
    batch = change(description.inputs(model, ["tIt", "tII"], dtype=dtype))
    batch.pop("regions")
    truth = features(exact, {k: v.float() if v.is_floating_point() else v for k, v in batch.items()})
    return model, batch, truth, features(model, batch)


@needs_kernel
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", sorted(TOWERS.keys() & FAMILIES.keys()))
def test_features_are_as_accurate_as_the_original_ones(name, dtype):
    model, batch, truth, before = originals(name, dtype)
    with torch.no_grad():
        with ras_fast.patch(model) as patched, Calls() as calls:
            after = features(model, batch)
            assert patched.report().tower_attentions == TOWERS[name]
            assert f"{TOWERS[name]} attentions and {patched.report().tower_gelus} GELUs there" in str(patched.report())
        assert torch.equal(features(model, batch), before)
    assert calls.count[KERNEL] + calls.count["ras_fast::decode_attention"] >= 2
    assert (after - truth).norm() <= 1.5 * (before - truth).norm()


def with_padding(batch: dict) -> dict:
    """Eight more patches an image, which are none."""
    fills = {"pixel_values": 9.0, "pixel_attention_mask": 0, "image_position_ids": -1}
    for name in fills.keys() & batch.keys():
        given = batch[name]
        batch[name] = torch.cat([given, torch.full_like(given[:, :8], fills[name])], 1)
    return batch


@needs_kernel
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", sorted({"lfm2_vl", "gemma4"} & FAMILIES.keys()))
def test_towers_whose_patches_are_padded(name, dtype):
    """The mask of that is read once for both layers."""
    model, batch, truth, before = originals(name, dtype, with_padding)
    with torch.no_grad(), ras_fast.patch(model), Calls() as calls:
        after = features(model, batch)
    assert calls.count[KERNEL] == 2
    assert calls.count["aten::argmax"] == 2
    assert (after - truth).norm() <= 1.5 * (before - truth).norm()


@pytest.mark.parametrize("name", sorted(TOWERS.keys() & FAMILIES.keys()))
def test_on_other_devices_only_those_change_that_take_all_images_at_once(name):
    with torch.device("meta"):
        model = FAMILIES[name].model(name)
    undo, report = Undo(), Report("", 0)
    speed_up_towers(model, find_decoder(model)[1], undo, report)
    names = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert names & {PACKED, TOWER} == ({PACKED} if name in PACKING else set())
    assert report.tower_attentions == (TOWERS[name] if name in PACKING else 0)
    undo.restore()
    assert all(m.config._attn_implementation == "sdpa" for m in model.modules() if hasattr(m, "config"))


SIZES = {
    "one": [40], "alike": [10] * 4, "runs": [6, 6, 6, 4, 6, 6, 2, 4], "all different": [1, 2, 3, 4, 5, 6, 7, 12],
    "an empty one": [0, 20, 0, 0, 20],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SIZES)
def test_neighbours_of_one_size_are_one_call(monkeypatch, case, dtype):
    sizes, tensors = SIZES[case], [torch.randn(40, 3, 24, dtype=dtype).transpose(0, 1)[None] for _ in range(3)]
    parts = zip(*(tensor.split(sizes, dim=2) for tensor in tensors), strict=True)
    full = [part for part in parts if part[0].shape[2]]
    expected = torch.cat([sdpa_attention_forward(Tower(), *part, None, scaling=0.3)[0] for part in full], dim=1)
    calls = []
    monkeypatch.setattr(towers, "attention", lambda *args, **kwargs: calls.append(args[1].shape) or attention(*args, **kwargs))
    boundaries = torch.tensor([0, *sizes]).cumsum(0).int()
    options = {"scaling": 0.3, "cu_seq_lens_k": boundaries, "max_length_q": 20, "is_causal": False}
    out, weights = packed_attention(Tower(), *tensors, None, cu_seq_lens_q=boundaries, **options)
    assert weights is None
    assert (out - expected).abs().max() < (1e-6 if dtype == torch.float32 else 0.02)
    assert len(calls) == {"one": 1, "alike": 1, "runs": 5, "all different": 8, "an empty one": 1}[case]
    assert sum(shape[0] * shape[2] for shape in calls) == 40


def test_without_boundaries_all_see_each_other_and_a_mask_beside_them_is_refused():
    tensors = [torch.randn(1, 3, 40, 24) for _ in range(3)]
    for mask in (None, torch.rand(1, 1, 40, 40) > 0.3):
        got = packed_attention(Tower(), *tensors, mask, scaling=0.3)[0]
        assert torch.equal(got, sdpa_attention_forward(Tower(), *tensors, mask, scaling=0.3)[0])
    with pytest.raises(ValueError, match="attention_mask is given beside cu_seq_lens_q"):
        packed_attention(Tower(), *tensors, mask, cu_seq_lens_q=torch.tensor([0, 40]))
    with pytest.raises(ValueError, match="cu_seq_lens_q ends at 30; there are 40 patches"):
        packed_attention(Tower(), *tensors, None, cu_seq_lens_q=torch.tensor([0, 10, 30]))


@pytest.mark.parametrize("name", sorted(PACKING & FAMILIES.keys() - {"qwen2_5_omni_thinker", "mistral3"}))
def test_sizes_are_asked_for_once(name, monkeypatch):
    """Not in every layer, where the device would be waited for each time; the numbers are those of the unpatched model."""
    model = FAMILIES[name].model(name)
    batch = FAMILIES[name].inputs(model, ["tIt", "tII"])
    batch.pop("regions")
    asked, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(self.shape) or tolist(self))
    with torch.no_grad():
        before = features(model, batch)
        unpatched = len(asked)
        with ras_fast.patch(model):
            asked.clear()
            after = features(model, batch)
    assert (after - before).abs().max() < 1e-5
    kinds = 2 if name == "qwen2_5_vl" else 1  # of boundaries: windows, and images
    assert len(asked) <= unpatched - 3 * TOWERS[name] + kinds


@pytest.mark.parametrize("inference", [True, False])
def test_boundaries_that_are_filled_anew_are_read_again(inference):
    """Users may give them to a tower themselves, and keep the tensor."""
    with torch.inference_mode(inference), torch.no_grad():
        tensors, boundaries = [torch.randn(1, 3, 40, 24) for _ in range(3)], torch.tensor([0, 16, 40])
        for end in (16, 24):
            boundaries[1] = end
            parts = zip(*(tensor.split([end, 40 - end], dim=2) for tensor in tensors), strict=True)
            expected = torch.cat([sdpa_attention_forward(Tower(), *part, None)[0] for part in parts], dim=1)
            got = packed_attention(Tower(), *tensors, None, cu_seq_lens_q=boundaries)[0]
            assert (got - expected).abs().max() < 1e-6


def heads(dtype=torch.bfloat16, rows=40, **options) -> list[torch.Tensor]:
    """As transformers hands them over: [B, H, L, D], in memory [B, L, H, D]."""
    return [torch.randn(2, rows, 3, 24, dtype=dtype, **options).transpose(1, 2) for _ in range(3)]


class Tower(nn.Module):
    def __init__(self, is_causal=False):
        super().__init__()
        self.is_causal = is_causal


@needs_kernel
def test_patches_that_see_each_other_take_the_kernel():
    query, key, value = heads(HALVES[0])
    with Calls() as calls:
        out, weights = attention(Tower(), query, key, value, None, scaling=0.3)
    assert calls.count[KERNEL] == 1
    assert weights is None
    assert out.shape == (2, 40, 3, 24)
    assert out.is_contiguous()
    exact = sdpa_attention_forward(Tower(), *(x.double() for x in (query, key, value)), None, scaling=0.3)[0]
    assert (out - exact).abs().max() < 0.02


PLACE, ENDS = torch.arange(40), torch.tensor([29, 40])
MASKS = {
    "padding": (ENDS[:, None, None, None] > PLACE),
    "padding, row by row": (ENDS[:, None, None, None] > PLACE).expand(2, 1, 40, 40),
    "padding before": (ENDS[:, None, None, None] - 25 <= PLACE),
    "images in a row": (PLACE[:, None] // 10 == PLACE // 10).expand(2, 1, 40, 40),
    "one mask for all": (PLACE[:, None] // 10 == PLACE // 10)[None, None],
    "an image that is nothing but padding": (ENDS[:, None, None, None] - 29 > PLACE),
}


@needs_kernel
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_say_which_run_of_patches_is_seen_take_the_kernel(name):
    tensors, mask = heads(HALVES[0]), MASKS[name]
    with Calls() as calls:
        out, _ = attention(Tower(), *tensors, mask, scaling=0.3)
        again, _ = packed_attention(Tower(), *tensors, mask, scaling=0.3)
    assert calls.count[KERNEL] == 2
    assert calls.count["aten::argmax"] == 2  # of the first that is seen and of the last, for all layers
    assert torch.equal(out, again)
    exact = sdpa_attention_forward(Tower(), *(x.double() for x in tensors), mask, scaling=0.3)[0]
    assert (out - exact).abs().max() < 0.02


@needs_kernel
@pytest.mark.parametrize("inference", [True, False])
def test_a_mask_that_is_filled_anew_is_read_again(inference):
    with torch.inference_mode(inference), torch.no_grad():
        tensors, mask = heads(HALVES[0]), torch.ones(2, 1, 1, 40, dtype=torch.bool)
        for end in (40, 20):
            mask[..., end:] = False
            expected = sdpa_attention_forward(Tower(), *(x.float() for x in tensors), mask)[0]
            assert (attention(Tower(), *tensors, mask)[0] - expected).abs().max() < 0.02


@needs_kernel
def test_a_mask_with_holes_is_freed():
    tensors, mask = heads(HALVES[0]), torch.rand(2, 1, 40, 40) > 0.5
    seen = weakref.ref(mask)
    attention(Tower(), *tensors, mask)
    del mask
    assert seen() is None


@needs_kernel
@pytest.mark.parametrize("trace", [torch.jit.trace, lambda function, args: make_fx(function)(*args)], ids=["jit", "fx"])
def test_a_traced_mask_is_not_looked_into(trace):
    """Nor is what was made of it before: the trace is for other masks, too."""
    query, key, value = heads(HALVES[0])
    masks = MASKS["padding, row by row"].clone(), MASKS["images in a row"].clone()

    def tower(query, key, value, mask):
        return attention(Tower(), query, key, value, mask)[0]

    tower(query, key, value, masks[0])
    traced = trace(tower, (query, key, value, masks[0]))
    for mask in masks:
        assert (traced(query, key, value, mask) - tower(query, key, value, mask)).abs().max() < 0.05


OTHERS = {
    "float32": ({}, heads(torch.float32)),
    "mask": ({"attention_mask": torch.rand(2, 1, 40, 40) > 0.5}, heads()),
    "mask of each head": ({"attention_mask": MASKS["padding, row by row"].expand(2, 3, 40, 40)}, heads()),
    "mask that says the same of all keys": ({"attention_mask": torch.rand(2, 1, 40, 1) > -1}, heads()),
    "mask without a batch": ({"attention_mask": MASKS["padding"][0]}, heads()),
    "additive mask": ({"attention_mask": torch.zeros(2, 1, 40, 40, dtype=torch.bfloat16)}, heads()),
    "float32 under a mask": ({"attention_mask": MASKS["padding"].expand(2, 1, 40, 40)}, heads(torch.float32)),
    "gradients under a mask": ({"attention_mask": MASKS["images in a row"]}, heads(requires_grad=True)),
    "dropout": ({"dropout": 0.5}, heads()),
    "causal": ({"is_causal": True}, heads()),
    "position bias": ({"position_bias": torch.randn(1, 3, 40, 40, dtype=torch.bfloat16)}, heads()),
    "gradients": ({}, heads(requires_grad=True)),
    "other values": ({}, [*heads()[:2], heads()[2][..., :16]]),
    "strided": ({}, [x.transpose(2, 3).contiguous().transpose(2, 3) for x in heads()]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_all_else_is_sdpas_own_bit_for_bit(case):
    options, tensors = OTHERS[case]
    options = {"attention_mask": None} | options
    with Calls() as calls:
        torch.manual_seed(0)
        got = attention(Tower(), *tensors, **options)[0]
    torch.manual_seed(0)
    assert torch.equal(got, sdpa_attention_forward(Tower(), *tensors, **options)[0])
    assert not calls.count[KERNEL]
    if "gradients" in case:
        got.sum().backward()


def test_a_module_that_calls_itself_causal_is():
    tensors = heads()
    with Calls() as calls:
        got = attention(Tower(is_causal=True), *tensors, None)[0]
    assert torch.equal(got, sdpa_attention_forward(Tower(is_causal=True), *tensors, None)[0])
    assert not calls.count[KERNEL]


def test_what_is_not_sdpa_or_no_tower_is_left_alone():
    description = FAMILIES["llava"]
    for change in ("eager", "sdpa"):
        model = description.model("llava")
        model.set_attn_implementation(change)
        for regions in (True, False):
            with ras_fast.patch(model, regions=regions) as patched:
                expected = 2 if regions and change == "sdpa" else 0
                assert patched.report().tower_attentions == expected
                assert model.model.vision_tower.config._attn_implementation == (TOWER if expected else change)
                assert model.config.vision_config._attn_implementation == change
            assert model.model.vision_tower.config is model.config.vision_config
    with ras_fast.patch(FAMILIES["qwen3"].model("qwen3")) as patched:
        assert patched.report().tower_attentions == 0


@needs_kernel
def test_copies_and_saved_models(tmp_path):
    model = FAMILIES["llava"].model("llava", HALVES[0])
    batch = FAMILIES["llava"].inputs(model, ["tIt"], dtype=HALVES[0])
    batch.pop("regions")
    with torch.no_grad():
        before = features(model, batch)
        patched = ras_fast.patch(model)
        after = features(model, batch)
        model.save_pretrained(tmp_path)
        twin = copy.deepcopy(model)
        patched.unpatch()
        assert TOWER not in (tmp_path / "config.json").read_text()
        assert torch.equal(features(twin, batch), after)
        ras_fast.patching.Patch.of(twin).unpatch()
        assert twin.model.vision_tower.config is twin.config.vision_config
        assert twin.config.vision_config._attn_implementation == "sdpa"
        assert torch.equal(features(twin, batch), before)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_models_made_from_the_config_of_a_patched_one(name):
    """Of a name that holds "flash" transformers would look for the package."""
    model = FAMILIES[name].model(name)
    with ras_fast.patch(model):
        for make in (type(model), type(model)._from_config):
            assert make(model.config).config.vision_config._attn_implementation == "sdpa"


def test_what_users_set_meanwhile_stays():
    model = FAMILIES["qwen3_vl"].model("qwen3_vl")
    with ras_fast.patch(model):
        model.set_attn_implementation("eager")
        assert model.model.visual.blocks[0].attn.config._attn_implementation == "eager"
    assert model.model.visual.blocks[0].attn.config._attn_implementation == "eager"


@needs_kernel
def test_in_a_compiled_graph():
    model = FAMILIES["llava"].model("llava", HALVES[0])
    batch = FAMILIES["llava"].inputs(model, ["tIt"], dtype=HALVES[0])
    with torch.no_grad(), ras_fast.patch(model):
        tower = model.model.vision_tower
        eager = tower(batch["pixel_values"]).last_hidden_state
        compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")(batch["pixel_values"]).last_hidden_state
    assert (eager - compiled).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted({"qwen3_vl", "mistral3"} & PACKING & FAMILIES.keys()))
def test_sizes_may_be_symbols_of_a_compiled_graph(name, dtype):
    model = FAMILIES[name].model(name, dtype)
    batch = FAMILIES[name].inputs(model, ["tIttI", "tItt"], dtype=dtype)
    given = {key: batch[key] for key in ("image_sizes",) if key in batch}
    given |= {"grid_thw": batch["image_grid_thw"]} if "image_grid_thw" in batch else {}
    tower = model.model.visual if name == "qwen3_vl" else model.model.vision_tower
    torch._dynamo.reset()
    with torch.no_grad(), ras_fast.patch(model), torch._dynamo.config.patch(capture_scalar_outputs=True):
        eager = tower(batch["pixel_values"], **given).last_hidden_state
        compiled = torch.compile(tower, backend="eager")(batch["pixel_values"], **given).last_hidden_state
    assert (eager - compiled).abs().max() < (1e-5 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(SIGLIP))
def test_states_lie_row_by_row(name, dtype):
    """SigLIP's patches lie channel by channel where its first layer gets them. The bits are the same, but for what Ovis2's
    norms and LLaVA-OneVision's pooling sum up in another order."""
    description = FAMILIES[name]
    model = description.model(name, dtype)
    batch = description.inputs(model, ["tIt", "tII"], dtype=dtype)
    batch.pop("regions")
    encoder = next(module for path, module in model.named_modules() if path.endswith(".encoder"))
    rows, undo = [], Undo()
    encoder.layers[-1].register_forward_pre_hook(lambda module, args: rows.append(args[0].is_contiguous()))
    with torch.no_grad():
        before = features(model, batch)
        lay_out_by_rows(model, find_decoder(model)[1], undo)
        after = features(model, batch)
        undo.restore()
        assert torch.equal(features(model, batch), before)
        assert rows == [False, True, False]
        with ras_fast.patch(model):
            features(model, batch)
        features(model, batch)
    assert rows[3:] == [True, False]
    if name in ("llava_onevision", "ovis2"):
        assert (after - before).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * before.norm()
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("given", ["args", "kwargs", "another name", "no tensor"])
def test_however_a_layer_gets_its_states(given):
    states, mask = torch.randn(2, 4, 8).transpose(1, 2), torch.ones(2, 8, 8).transpose(1, 2)
    args, kwargs = {
        "args": ((states, mask), {}),
        "kwargs": ((), {"hidden_states": states, "mask": mask}),
        "another name": ((), {"x": states, "mask": mask}),
        "no tensor": ((None,), {"mask": mask}),
    }[given]
    new_args, new_kwargs = towers._by_rows(nn.Identity(), args, kwargs)
    assert [*new_kwargs] == [*kwargs]
    first, second = (*new_args, *new_kwargs.values())
    assert second is mask
    if given in ("args", "kwargs"):
        assert torch.equal(first, states)
        assert first.is_contiguous()
    else:
        assert first is (None if given == "no tensor" else states)


GELUS = {"gemma3": "gelu_tanh", "paligemma": "gelu_tanh", "smolvlm": "gelu_tanh", "qwen3_vl": "gelu_tanh",
         "llava": "quick_gelu", "qwen2_vl": "quick_gelu", "internvl": None}  # of each there are two; InternVL's is exact


@pytest.mark.skipif(not backend.has_kernel("gelu_tanh", "cpu"), reason="there is no native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(GELUS.keys() & FAMILIES.keys()))
def test_gelus_of_a_tower(name, dtype):
    """Those of the text model (Gemma's) stay: in a decode step they are part of its gated MLPs' kernel."""
    model, batch, truth, before = originals(name, dtype)
    undo, report = Undo(), Report("", 0)
    with torch.no_grad():
        speed_up_gelus(model, find_decoder(model)[1], undo, report)
        with Calls() as calls:
            after = features(model, batch)
        undo.restore()
        assert torch.equal(features(model, batch), before)
    assert report.tower_gelus == (2 if GELUS[name] else 0)
    assert calls.count[f"ras_fast::{GELUS[name]}"] == (0 if dtype == torch.float32 else report.tower_gelus)
    if dtype == torch.float32:
        assert torch.equal(after, before)
    assert (after - truth).norm() <= 1.5 * (before - truth).norm()


@pytest.mark.parametrize(("kind", "op"), [(towers._GELU_TANH, "gelu_tanh"), (towers._QUICK_GELU, "quick_gelu")])
def test_a_gelu_that_is_asked_for_more_is_torchs(kind, op, monkeypatch):
    module = kind().to(torch.bfloat16)
    fast = towers.FastGelu(module)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(towers.ops, op, lambda x: pytest.fail("the kernel was called"))
    with pytest.raises(pytest.fail.Exception):
        fast(x)
    asked = x.clone().requires_grad_()
    fast(asked).sum().backward()
    assert asked.grad is not None
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(fast(forward_ad.make_dual(x, x))).tangent is not None
    for other in (x.T, x.float(), x.to("meta")):
        assert fast(other).shape == other.shape
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), module(x))


def test_gelus_whose_function_was_replaced_stay():
    description = FAMILIES["gemma3"]
    model = description.model("gemma3", torch.bfloat16)
    first, second = (module for module in model.model.vision_tower.modules() if type(module) is towers._GELU_TANH)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    first.act = torch.relu
    with torch.no_grad(), ras_fast.patch(model) as patch:
        assert patch.report().tower_gelus == 1
        assert torch.equal(first(x), torch.relu(x))
        second.act = torch.relu
        assert torch.equal(second(x), torch.relu(x))


@pytest.mark.skipif(not backend.has_kernel("gelu_tanh", "cpu"), reason="there is no native library")
def test_a_gelu_under_vmap_is_torchs(monkeypatch):
    module, x = towers._GELU_TANH(), torch.randn(3, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(towers.ops, "gelu_tanh", lambda x: pytest.fail("the kernel was called"))
    assert torch.equal(torch.vmap(towers.FastGelu(module))(x), module(x))


def test_a_list_of_layers_may_begin_with_nothing_or_with_a_script():
    model = FAMILIES["smolvlm"].model("smolvlm", torch.float32)
    text_model, undo = find_decoder(model)[1], Undo()
    model.model.more = nn.ModuleList([None, nn.Identity()])
    model.model.scripts = nn.ModuleList([torch.jit.script(nn.Identity())])
    lay_out_by_rows(model, text_model, undo)
    undo.restore()


def test_a_tower_that_two_models_share_is_laid_out_until_both_are_unpatched():
    first, second = (FAMILIES["gemma3"].model("gemma3", torch.float32) for _ in range(2))
    second.model.vision_tower = first.model.vision_tower
    layer = first.model.vision_tower.encoder.layers[0]
    states = torch.randn(1, 16, 16).transpose(1, 2)
    seen = []
    layer.layer_norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    with torch.no_grad(), ras_fast.patch(second):
        ras_fast.patch(first).unpatch()
        layer(states, None)
    layer(states, None)
    assert seen == [True, False]


def test_images_that_lie_pixel_by_pixel_stay():
    images = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    assert towers._by_rows(nn.Identity(), (images,), {})[0][0] is images


@needs_kernel
def test_forward_mode_is_sdpas():
    """Under torch.func.jvp, too, whose tensors require no grad."""
    query, key, value = (torch.randn(1, 2, 32, 64, dtype=HALVES[0]) for _ in range(3))
    with torch.no_grad(), forward_ad.dual_level():
        assert not towers._kernel_takes(forward_ad.make_dual(query, query), key, value)
    assert towers._kernel_takes(query, key, value)
