"""What is no tensor is named, whatever lacks first an attribute of one."""

import inspect
import re

import pytest
import torch

import ras_fast
from ras_fast import ops

X, TABLE, ONES = torch.randn(4, 8), torch.randn(8, 8), torch.ones(4)
QUERY, KEY = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
LSE, IDS, ANGLES = torch.zeros(1, 4, 6), torch.zeros(1, 6, dtype=torch.int32), torch.ones(1, 6, 8)
GIVEN = {
    "add_rms_norm": (X, X, TABLE[0], 1e-6),
    "add_rms_norm_": (X.clone(), X.clone(), TABLE[0], 1e-6),
    "add_layer_norm": (X, X, TABLE[0], TABLE[1], 1e-6),
    "add_layer_norm_": (X.clone(), X.clone(), TABLE[0], TABLE[1], 1e-6),
    "linear": (X, TABLE, TABLE[0]),
    "linears": (X, [TABLE, TABLE]),
    "linear_glu": (X, TABLE, TABLE),
    "gated_linear": (X, TABLE, ONES),
    "gelu_tanh": (X,),
    "quick_gelu": (X,),
    "rotary_embedding": (QUERY, KEY, ANGLES, ANGLES),
    "write_cache_": (KEY.clone(), KEY.clone(), torch.arange(2)[None], KEY[:, :, :2], KEY[:, :, :2]),
    "refusal_similarity": (torch.randn(2, 3, 11), torch.rand(3, 11)),
    "region_attention": (QUERY, KEY, KEY, IDS, 1),
    "region_mass": (QUERY, KEY, LSE, IDS, 1),
    "key_attention": (QUERY, KEY, LSE),
    "region_statistics": (QUERY, KEY, LSE, IDS, 1),
}
CASES = [(name, place) for name, given in GIVEN.items() for place, value in enumerate(given) if isinstance(value, torch.Tensor)]


def test_every_op_is_called_here():
    assert set(GIVEN) == set(ops.__all__) - {"explain"}


@pytest.mark.parametrize(("name", "place"), CASES, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_a_list_in_place_of_a_tensor_is_named(name, place, grad):
    wrong = [*GIVEN[name]]
    wrong[place] = [1.0]
    argument = list(inspect.signature(getattr(ops, name)).parameters)[place]
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"^{argument} is \[1\.0\]; it must be a tensor"):
        getattr(ops, name)(*wrong)


@pytest.mark.parametrize("name", GIVEN)
def test_none_in_place_of_the_first_tensor_is_named(name):
    argument = next(iter(inspect.signature(getattr(ops, name)).parameters))
    with pytest.raises(ValueError, match=f"^{argument} is None; it must be a tensor"):
        getattr(ops, name)(None, *GIVEN[name][1:])


OPTIONS = {
    "add_rms_norm": ("steer_vectors", "steer_slot", "steer_alpha", "probes", "x_weight", "scale"),
    "gated_linear": ("right",),
    "refusal_similarity": ("steps",),
    "region_attention": ("sinks", "region_bias"),
    "key_attention": ("region_ids", "region_bias"),
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in OPTIONS.items() for option in options])
def test_an_option_that_is_no_tensor_is_named(name, option):
    others = {"region_bias": torch.zeros(4, 1)} if (name, option) == ("key_attention", "region_ids") else {}
    with pytest.raises(ValueError, match=f"^{option} is 1; it must be a tensor or None"):
        getattr(ops, name)(*GIVEN[name], **{option: 1}, **others)


LOGITS = (torch.randn(2, 3, 11), torch.rand(3, 11))
NUMBERS = [
    ("region_attention", (QUERY, KEY, KEY), "scale"),
    ("region_attention", (QUERY, KEY, KEY), "softcap"),
    ("region_mass", GIVEN["region_mass"], "scale"),
    ("add_rms_norm", (X, X, TABLE[0]), "eps"),
    ("add_rms_norm", GIVEN["add_rms_norm"], "weight_offset"),
    ("add_rms_norm", GIVEN["add_rms_norm"], "x_scale"),
    ("add_layer_norm", (X, X, TABLE[0], TABLE[1]), "eps"),
    ("refusal_similarity", LOGITS, "gamma"),
]


@pytest.mark.parametrize(("name", "given", "option"), NUMBERS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_is_no_number_is_named(name, given, option, backend):
    ras_fast.set_backend(backend)
    try:
        for wrong in ("0.5", [0.5]):
            with pytest.raises(ValueError, match=f"^{option} is {re.escape(repr(wrong))}; it must be"):
                getattr(ops, name)(*given, **{option: wrong})
    finally:
        ras_fast.set_backend("auto")


def test_an_activation_that_is_no_name_is_named():
    with pytest.raises(ValueError, match=r"^activation is \['silu'\]; it must be one of"):
        ops.linear_glu(X, TABLE, TABLE, activation=["silu"])


def test_a_bias_of_no_region_is_named():
    with pytest.raises(ValueError, match=r"^region_bias is of shape \(4, 0\)"):
        ops.key_attention(QUERY, KEY, LSE, region_ids=IDS, region_bias=torch.zeros(4, 0))
