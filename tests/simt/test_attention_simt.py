"""The CUDA attention kernels (csrc/cuda/attention_*.cuh), run by the host emulation, against the float64 reference.

The tensor-core product is replaced by a twin that gathers the fragments by shuffles, from the layout that PTX documents: what
is tested is that the kernels put every element where that layout wants it.
"""

import ctypes

import numpy as np
import pytest
import torch

from ras_fast.ops import attention_reference
from ras_fast.ops.attention import REDUCTIONS

POINTER, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
WARPS = 4
ATOL = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Call(ctypes.Structure):
    """Mirrors struct Call of attention_simt.cpp."""

    _fields_ = [
        *[(name, POINTER) for name in ("query", "key", "value", "out", "lse", "mass", "scores", "part_out", "part_lse",
                                       "part_mass", "slab", "region_ids", "kv_start", "kv_end", "region_bias", "sinks")],
        *[(name, INT * 3) for name in ("query_stride", "key_stride", "value_stride", "lse_stride")],
        ("bias_stride", INT * 2), ("ids_stride", INT),
        *[(name, INT) for name in ("half", "batch", "heads", "kv_heads", "dim", "query_rows", "keys", "regions", "mass_rows",
                                   "window", "causal", "splits", "own_bounds", "reduce")],
        ("scale", DOUBLE), ("softcap", DOUBLE),
    ]  # fmt: skip


def array(tensor):
    """A view of the tensor's memory; 16-bit floats as int16, which is all the emulator needs to find it."""
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


def apart(tensor):
    """The same values with room between the rows of every dimension but the last, filled with what must not be read."""
    wide = torch.zeros([size + 8 for size in tensor.shape], dtype=torch.int32)
    if tensor.is_floating_point():
        wide = torch.full(wide.shape, torch.nan, dtype=tensor.dtype)
    return wide[tuple(map(slice, tensor.shape))].copy_(tensor)


class Case:
    """Random inputs and the arguments that the kernels and the reference share.

    Queries and keys lie as transformers hands them over, values in a longer cache: no two tensors have the same strides.
    """

    def __init__(self, length_q=1, length_k=90, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, batch=1, regions=2, ids=None,
                 kv_start=None, kv_end=None, window=0, softcap=0.0, sinks=False, bias=False, causal=True, mass_rows=None,
                 splits=1):  # fmt: skip
        def states(length, count):
            return torch.randn(batch, length, count, dim).to(dtype).transpose(1, 2)

        self.query, self.key = states(length_q, heads), states(length_k, kv_heads)
        self.value = apart(states(length_k, kv_heads))
        self.ids = None if ids is None else apart(ids)
        self.regions, self.splits, self.dtype = regions, splits, dtype
        self.kv_start, self.kv_end = (None if v is None else torch.tensor(v, dtype=torch.int32) for v in (kv_start, kv_end))
        self.own_bounds = any(bound is not None and bound.dim() == 2 for bound in (self.kv_start, self.kv_end))
        self.sinks = torch.randn(heads) if sinks else None
        self.bias = apart(torch.randn(batch, heads, regions)) if bias else None
        self.rows = length_q if mass_rows is None else mass_rows
        self.masks = (0.2, causal, self.kv_start, self.kv_end, window, softcap)

    def reference(self):
        wide = (tensor.double() for tensor in (self.query, self.key, self.value))
        regions = self.regions if self.ids is not None else 0
        return attention_reference.region_attention(
            *wide, self.ids, regions, *self.masks, self.sinks, self.bias, self.rows
        )  # fmt: skip

    def run(self, emulator, function, lse=None, reduce="mean", masses=True):
        """(out, lse, mass, scores). Outputs and scratch memory start as NaN."""
        (batch, heads, length_q, dim), kv_heads, length_k = self.query.shape, self.key.shape[1], self.key.shape[2]

        def poisoned(*shape, dtype=torch.float32):
            return torch.full(shape, torch.nan, dtype=dtype)

        out = poisoned(batch, length_q, heads, dim, dtype=self.dtype)
        mass = poisoned(batch, heads, self.rows, self.regions) if self.ids is not None and masses else None
        scores = poisoned(batch, heads, length_k)
        parts = self.splits * WARPS
        tensors = {
            "query": self.query, "key": self.key, "value": self.value, "region_ids": self.ids, "kv_start": self.kv_start,
            "kv_end": self.kv_end, "region_bias": self.bias, "sinks": self.sinks,
        }  # fmt: skip
        scratch = {
            "out": out, "mass": mass, "scores": scores, "lse": poisoned(batch, heads, length_q) if lse is None else apart(lse),
            "part_out": poisoned(self.splits, batch, heads, length_q, dim),
            "part_lse": poisoned(self.splits, batch, heads, length_q),
            "part_mass": poisoned(parts, batch, heads, length_q, self.regions),
            "slab": poisoned(parts * batch * kv_heads * (length_q * heads // kv_heads + 16), self.regions),
        }  # fmt: skip
        _, causal, _, _, window, softcap = self.masks
        call = Call(half=self.dtype == torch.float16, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim,
                    query_rows=length_q, keys=length_k, regions=self.regions, mass_rows=self.rows, window=window,
                    causal=causal, splits=self.splits, own_bounds=self.own_bounds, scale=self.masks[0],
                    softcap=softcap, reduce=REDUCTIONS.index(reduce))  # fmt: skip
        for name in ("query", "key", "value"):
            getattr(call, f"{name}_stride")[:] = tensors[name].stride()[:3]
        call.lse_stride[:] = scratch["lse"].stride()
        call.bias_stride[:] = (0, 0) if self.bias is None else self.bias.stride()[:2]
        call.ids_stride = 0 if self.ids is None else self.ids.stride(0)
        inputs = {name: array(tensor) for name, tensor in tensors.items() if tensor is not None}
        outputs = {name: array(tensor) for name, tensor in scratch.items() if tensor is not None}
        for name, values in (inputs | outputs).items():
            setattr(call, name, values.ctypes.data)
        emulator.run(function, ctypes.byref(call), inputs=inputs, outputs=outputs)
        return out.transpose(1, 2), scratch["lse"], mass, scores

    def exact_scores(self, lse, reduce="mean"):
        """Of key_attention."""
        ids = self.ids if self.bias is not None else None
        wide = (self.query.double(), self.key.double())
        return attention_reference.key_attention(*wide, lse, self.rows, reduce, ids, *self.masks, self.bias)

    def check(self, emulator):
        """decode_attention, selected_region_mass, selected_statistics and selected_key_attention against the reference."""
        exact_out, exact_lse, exact_mass = self.reference()
        out, lse, mass, _ = self.run(emulator, "decode_run")
        torch.testing.assert_close(out.double(), exact_out, atol=ATOL[self.dtype], rtol=0)
        torch.testing.assert_close(lse, exact_lse, atol=1e-5, rtol=1e-6)
        if self.ids is None:
            return
        torch.testing.assert_close(mass, exact_mass, atol=1e-5, rtol=0)
        if self.rows and not self.own_bounds:
            self.check_masses(emulator)
            self.check_keys(emulator, exact_lse, exact_mass)

    def check_masses(self, emulator):
        """selected_region_mass."""
        _, lse, mass = self.reference()
        torch.testing.assert_close(self.run(emulator, "mass_run", lse=lse)[2], mass, atol=1e-5, rtol=0)

    def check_keys(self, emulator, lse, exact_mass, reduce="mean"):
        exact = self.exact_scores(lse, reduce)
        _, _, mass, scores = self.run(emulator, "keys_run", lse=lse, reduce=reduce)
        torch.testing.assert_close(mass, exact_mass, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores, exact, atol=1e-5 * self.rows, rtol=0)
        alone = self.run(emulator, "keys_run", lse=lse, reduce=reduce, masses=False)[3]
        assert torch.equal(alone, scores)


def runs(length, *borders, batch=1):
    """Keys before the first border: none; then regions 0, 1, …; after the last border: none."""
    region = np.searchsorted(borders, np.arange(length), side="right") - 1
    region[region == len(borders) - 1] = -1
    return torch.tensor(region, dtype=torch.int32).repeat(batch, 1)


@pytest.fixture
def emulator(load_emulator):
    return load_emulator("attention_simt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 112, 128, 256])
def test_head_dimensions(emulator, dim, dtype):
    """The four instances, and such as fill theirs only in part."""
    Case(dim=dim, dtype=dtype, ids=runs(90, 5, 37, 64)).check(emulator)


@pytest.mark.parametrize("dim", [72, 96])
def test_values_of_one_and_a_half_groups(emulator, dim):
    """Two row tiles whose splits merge: 96 dimensions are 64 and the half of 64."""
    Case(3, 200, 8, 2, dim=dim, ids=runs(200, 5, 100, 170), splits=3).check(emulator)


@pytest.mark.parametrize("splits", [1, 3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("length_q", "heads", "kv_heads"), [(1, 2, 2), (1, 14, 2), (3, 8, 2), (5, 8, 2)])
def test_rows_and_splits(emulator, length_q, heads, kv_heads, splits):
    """1, 7, 12 and 20 packed rows: one row tile, two, and more than one block; the splits' output, LSE and mass merge."""
    Case(length_q, 200, heads, kv_heads, ids=runs(200, 5, 100, 170), splits=splits).check(emulator)


def test_most_splits(emulator):
    """As many as merge_splits has weights for, most of them without a key; more regions than fit into shared memory."""
    Case(2, 300, 2, 1, ids=runs(300, 5, 100, 170), regions=40, splits=128).check(emulator)


def test_splits_whose_lse_is_large(emulator):
    """Where its rounding shows, weights of 2^(part − lse) would not add up to 1."""
    case = Case(1, 200, 2, 1, ids=runs(200, 0, 200), regions=1, bias=True, splits=3)
    case.value.fill_(1)
    case.bias.fill_(-1e9)
    assert (case.run(emulator, "decode_run")[0] == 1).all()


def plan(emulator, *sizes):
    return emulator.library.decode_plan(*map(ctypes.c_int64, sizes))


@pytest.mark.parametrize("slots", [1, 264, 396])
@pytest.mark.parametrize("keys", [1, 63, 64, 1024, 4096, 32768, 1 << 20])
@pytest.mark.parametrize("blocks", [1, 8, 64, 397, 512, 100000])
def test_planned_splits(emulator, blocks, keys, slots):
    """Every warp of a block has a step of 16 keys, there are weights for all, and no warp takes more steps for it."""
    splits, steps = plan(emulator, blocks, slots, keys), -(-keys // 16)
    assert splits == 1 or 1 < splits <= min(128, steps // 4)

    def turns(splits):
        waves, share = -(-blocks * splits // slots), -(-steps // splits)
        return waves * -(-share // 4)

    assert turns(splits) <= turns(1)
    if keys == 32768 and blocks <= slots // 8:  # a small grid fills the device, as far as splits go
        assert blocks * splits > slots // 2 or splits == 128


def test_planned_splits_leave_no_small_last_wave(emulator):
    """512 blocks where 396 fit: a second wave of 116 would take as long as the first."""
    assert plan(emulator, 512, 396, 32768) == 3
    assert plan(emulator, 512, 528, 32768) == 1


@pytest.mark.parametrize("options", [
    {"causal": False},
    {"kv_start": [7], "kv_end": [61]},
    {"kv_start": [-40], "kv_end": [95]},
    {"kv_end": [0], "sinks": True},
    {"window": 20, "splits": 2},
    {"softcap": 3.0, "bias": True},
    {"sinks": True, "splits": 2},
    {"kv_start": [3], "kv_end": [80], "window": 60, "softcap": 5.0, "sinks": True, "bias": True, "mass_rows": 1,
     "splits": 2},
])  # fmt: skip
def test_options(emulator, options):
    Case(length_q=3, ids=runs(90, 10, 50, 77), **options).check(emulator)


@pytest.mark.parametrize("length_k", range(33, 49))
def test_masks_that_end_anywhere_in_a_step(emulator, length_k):
    """The causal limits and the windows of both rows fall on every key of a step, its first and its last included."""
    Case(2, length_k, 1, 1, ids=runs(length_k, 3, 20, 30), window=20).check(emulator)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("options", [
    {"kv_start": [[40, 7], [0, 50]], "kv_end": [[200, 61], [130, 131]]},
    {"kv_start": [[90, 0], [30, 90]], "kv_end": [[180, 70], [30, 20]]},  # apart; and rows that see nothing
    {"kv_end": [[200, 1], [17, 260]], "sinks": True, "bias": True, "heads": 20},
])  # fmt: skip
def test_rows_with_bounds_of_their_own(emulator, options, splits):
    """Two sequences of a batch element over one cache; rows of one tile, and (heads 20) of two."""
    Case(2, 200, batch=2, causal=False, ids=runs(200, 5, 100, 170, batch=2), splits=splits, **options).check(emulator)


@pytest.mark.parametrize("regions", [1, 5, 40])
def test_scattered_regions(emulator, regions):
    """Every step of 16 keys mixes regions; ids outside the range count as none."""
    ids = torch.randint(-1, regions, (2, 120), dtype=torch.int32)
    case = Case(length_k=120, ids=ids, regions=regions, batch=2, splits=2)
    _, lse, expected = case.reference()
    case.ids = torch.where(ids == -1, regions, ids)
    for function in ("decode_run", "mass_run", "keys_run"):
        mass = case.run(emulator, function, lse=None if function == "decode_run" else lse)[2]
        torch.testing.assert_close(mass, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("regions", [2, 40])
@pytest.mark.parametrize("heavy", [1, 5])
def test_regions_that_change_between_steps(emulator, regions, heavy):
    """Each warp's next step lies in another region, or in one that was left before, or mixes them; the first steps may outweigh
    all others."""
    ids = torch.randint(-1, 2, (1, 60), dtype=torch.int32).repeat_interleave(16, 1)
    ids[0, 400:500] = torch.randint(-1, 2, (100,), dtype=torch.int32)
    case = Case(length_q=2, length_k=960, ids=ids, regions=regions)
    case.key[:, :, :128] *= heavy
    case.check(emulator)


@pytest.mark.parametrize("regions", [2, 40])
@pytest.mark.parametrize("splits", [1, 2])
def test_masses_of_many_steps(emulator, regions, splits):
    """A warp looks for regions in 32 of its steps at a time: here in two and a half such chunks, and (splits 2) one and a half.
    The first regions lie in neighbouring steps, the last in the last step; most warps' chunks hold none."""
    ids = runs(5000, 1003, 1090, 1200)
    ids[0, 4999], ids[0, 3000] = regions - 1, 0
    Case(length_q=5, length_k=5000, ids=ids, regions=regions, splits=splits).check_masses(emulator)


def test_without_regions(emulator):
    Case(length_q=2, length_k=40).check(emulator)


def test_rows_without_a_key(emulator):
    """Lq > Lk: the first rows see nothing."""
    case = Case(length_q=4, length_k=2, ids=runs(2, 0, 1))
    case.check(emulator)
    out, lse, mass, _ = case.run(emulator, "decode_run")
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -torch.inf).all()
    assert (mass[:, :, :2] == 0).all()


def test_garbage_outside_the_valid_keys_is_never_used(emulator):
    case = Case(length_q=2, ids=runs(90, 5, 37, 64, batch=2), batch=2, kv_start=[9, 0], kv_end=[50, 33])
    expected = case.reference()
    for b, (start, end) in enumerate([(9, 50), (0, 33)]):
        for tensor in (case.key, case.value):
            tensor[b, :, :start] = torch.nan
            tensor[b, :, end:] = torch.inf
    out, lse, mass, _ = case.run(emulator, "decode_run")
    torch.testing.assert_close(out.double(), expected[0], atol=ATOL[case.dtype], rtol=0)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(mass, expected[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize(("start", "end"), [(7, 7), (10, 7), (16, 16), (20, 7), (90, 90)])
def test_a_sequence_without_a_key_is_0_whatever_the_cache_holds(emulator, start, end, splits):
    case = Case(ids=runs(90, 5, 37, 64), kv_start=[start], kv_end=[end], splits=splits)
    case.key.fill_(torch.nan)
    case.value.fill_(torch.nan)
    out, lse, mass, _ = case.run(emulator, "decode_run")
    assert not out.any()
    assert not mass.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("heads", [4, 20])
@pytest.mark.parametrize(
    ("first", "second"), [((0, 5), (40, 50)), ((0, 16), (32, 48)), ((64, 80), (0, 16)), ((0, 30), (33, 60))]
)
def test_garbage_between_the_stretches_of_two_rows_is_never_used(emulator, first, second, heads):
    case = Case(2, 90, heads, 2, causal=False, ids=runs(90, 5, 37, 64), kv_start=[[first[0], second[0]]],
                kv_end=[[first[1], second[1]]])  # fmt: skip
    expected = case.reference()
    gap = slice(min(first[1], second[1]), max(first[0], second[0]))
    case.key[:, :, gap] = case.value[:, :, gap] = torch.nan
    out, lse, mass, _ = case.run(emulator, "decode_run")
    torch.testing.assert_close(out.double(), expected[0], atol=ATOL[case.dtype], rtol=0)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(mass, expected[2], atol=1e-5, rtol=0)


def test_nan_stays_in_its_batch_element(emulator):
    case = Case(ids=runs(90, 5, 37, 64, batch=2), batch=2)
    case.key[0, 0, 40] = torch.nan
    out, lse, mass, _ = case.run(emulator, "decode_run")
    for tensor in (out, lse, mass):
        assert tensor[0, :2].isnan().all()
        assert tensor[1].isfinite().all()


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("function", ["decode_run", "mass_run", "keys_run"])
def test_offsets_beyond_32_bits(emulator, function, name):
    """Two batch elements 2³¹ elements apart: the second is found only by 64-bit arithmetic. Most of the memory is untouched."""
    ids = torch.zeros(2, 90, dtype=torch.int32)
    case = Case(batch=2, heads=2, kv_heads=1, ids=ids, regions=1)
    near = getattr(case, name)
    far = torch.empty(2**31 + near[0].numel(), dtype=case.dtype)
    setattr(case, name, far.as_strided(near.shape, (2**31, *near.contiguous().stride()[1:])).copy_(near))
    exact_out, exact_lse, exact_mass = case.reference()
    out, _, mass, _ = case.run(emulator, function, lse=None if function == "decode_run" else exact_lse.float())
    torch.testing.assert_close(mass, exact_mass, atol=2e-3, rtol=0)
    if function == "decode_run":
        torch.testing.assert_close(out.double(), exact_out, atol=ATOL[case.dtype], rtol=0)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("length_q", "heads", "kv_heads"), [(1, 16, 1), (3, 7, 1), (3, 12, 2), (15, 8, 2), (37, 4, 2)])
def test_key_scores(emulator, length_q, heads, kv_heads, reduce):
    """8 heads side by side in two sets; 1 (of 7), 2 (of 6) and 4; and one head a set, whose rows are three tiles, the
    last row of each seeing but the first key of a step."""
    case = Case(length_q, 70, heads, kv_heads, ids=runs(70, 5, 37, 64), splits=2)
    _, lse, mass = case.reference()
    case.check_keys(emulator, lse, mass, reduce)


@pytest.mark.parametrize("options", [
    {"causal": False},
    {"kv_start": [15, 0], "kv_end": [61, 33]},
    {"kv_end": [20, 0]},
    {"window": 9},
    {"kv_start": [3, 50], "kv_end": [80, 90], "window": 30, "softcap": 5.0, "bias": True, "mass_rows": 19},
])  # fmt: skip
@pytest.mark.parametrize("length_q", [5, 40])
def test_key_scores_under_masks(emulator, length_q, options):
    """Tiles of rows of which none sees a step are skipped, from either end."""
    options = options | {"mass_rows": min(options.get("mass_rows", length_q), length_q)}
    case = Case(length_q, 90, batch=2, ids=runs(90, 10, 50, 77, batch=2), splits=2, **options)
    _, lse, mass = case.reference()
    case.check_keys(emulator, lse, mass)


def test_key_scores_of_no_row(emulator):
    case = Case(3, ids=runs(90, 10, 50), regions=1, mass_rows=0)
    assert (case.run(emulator, "keys_run", lse=torch.zeros(1, 4, 3), masses=False)[3] == 0).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_nan_is_not_hidden_from_key_scores(emulator, reduce):
    """Not even by a maximum: rows before and after it in its tile have none."""
    case = Case(40, 90, batch=2, ids=runs(90, 5, 37, 64, batch=2))
    lse = case.reference()[1]
    case.query[0, 1, 20] = torch.nan
    scores = case.run(emulator, "keys_run", lse=lse, reduce=reduce)[3]
    assert scores[0, 1, :71].isnan().all()  # what row 20 sees
    others = torch.ones(2, 4, dtype=torch.bool)
    others[0, 1] = False
    assert scores[others].isfinite().all()
