"""The Hopper prefill kernel (csrc/cuda/hopper_prefill.cuh), run by the host emulation, against the float64 reference.

Copies, barriers and products behave as late and as selfishly as PTX lets them (emulator_hopper.cpp): a missing wait, a tile
overwritten too early, or a wrong descriptor fails here. What the emulation cannot show is speed.
"""

import ctypes

import pytest
import torch
from test_attention_simt import ATOL, DOUBLE, INT, POINTER, Case, array, runs


class Call(ctypes.Structure):
    """Mirrors struct Call of hopper_simt.cpp."""

    _fields_ = [
        *[(name, POINTER) for name in ("query", "key", "value", "out", "lse", "mass", "region_ids")],
        *[(name, INT * 3) for name in ("query_stride", "key_stride", "value_stride")], ("ids_stride", INT),
        *[(name, INT) for name in ("half", "batch", "heads", "kv_heads", "dim", "query_rows", "keys", "regions", "mass_rows",
                                   "causal", "blocks", "consumers")],
        ("scale", DOUBLE),
    ]  # fmt: skip


class PrefillCase(Case):
    def run(self, emulator, blocks=2, consumers=2):
        """(out, lse, mass). Outputs start as NaN. The blocks share the tiles, of 64 rows for each consumer."""
        (batch, heads, length_q, dim), kv_heads, length_k = self.query.shape, self.key.shape[1], self.key.shape[2]
        blocks = min(blocks, -(-length_q // (64 * consumers)) * heads * batch)
        tensors = {"query": self.query, "key": self.key, "value": self.value, "region_ids": self.ids}
        results = {
            "out": torch.full((batch, length_q, heads, dim), torch.nan, dtype=self.dtype),
            "lse": torch.full((batch, heads, length_q), torch.nan),
            "mass": None if self.ids is None else torch.full((batch, heads, self.rows, self.regions), torch.nan),
        }
        call = Call(half=self.dtype == torch.float16, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim,
                    query_rows=length_q, keys=length_k, regions=self.regions, mass_rows=self.rows, causal=self.masks[1],
                    scale=self.masks[0], blocks=blocks, consumers=consumers,
                    ids_stride=0 if self.ids is None else self.ids.stride(0))  # fmt: skip
        for name in ("query", "key", "value"):
            getattr(call, f"{name}_stride")[:] = tensors[name].stride()[:3]
        inputs = {name: array(tensor) for name, tensor in tensors.items() if tensor is not None}
        outputs = {name: array(tensor) for name, tensor in results.items() if tensor is not None}
        for name, values in (inputs | outputs).items():
            setattr(call, name, values.ctypes.data)
        emulator.run("prefill_run", ctypes.byref(call), inputs=inputs, outputs=outputs)
        return results["out"].transpose(1, 2), results["lse"], results["mass"]

    def check(self, emulator, **options):
        exact_out, exact_lse, exact_mass = self.reference()
        out, lse, mass = self.run(emulator, **options)
        torch.testing.assert_close(out.double(), exact_out, atol=ATOL[self.dtype], rtol=0)
        torch.testing.assert_close(lse, exact_lse, atol=1e-5, rtol=1e-6)
        if self.ids is not None:
            torch.testing.assert_close(mass, exact_mass, atol=1e-5, rtol=0)


@pytest.fixture
def emulator(load_emulator):
    return load_emulator("hopper_simt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "consumers"), [(8, 2), (40, 3), (64, 2), (64, 3), (80, 2), (128, 2), (136, 2), (256, 2)])
def test_instances(emulator, dim, consumers, dtype):
    PrefillCase(130, 300, 2, 1, dim=dim, dtype=dtype, ids=runs(300, 5, 140, 290)).check(emulator, consumers=consumers)


# Width and consumers of the blocks: steps of 128 keys and of 80.
SHAPES = [(64, 2), (64, 3), (256, 2)]


@pytest.mark.parametrize(("dim", "consumers"), SHAPES)
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (128, 128), (129, 127), (65, 513), (200, 129), (300, 100)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_tails(emulator, length_q, length_k, causal, dim, consumers):
    """Lq < Lk, Lq > Lk (rows without a key), one key, whole tiles and one more."""
    ids = torch.randint(-1, 3, (1, length_k // 40 + 1), dtype=torch.int32).repeat_interleave(40, 1)[:, :length_k].contiguous()
    PrefillCase(length_q, length_k, 1, 1, dim=dim, ids=ids, regions=3, causal=causal).check(emulator, consumers=consumers)


@pytest.mark.parametrize("blocks", [1, 3, 12, *[pytest.param(n, marks=pytest.mark.slow) for n in (2, 5)]])
@pytest.mark.parametrize(("mass_rows", "dim", "consumers"), [(150, 64, 2), (300, 64, 2), (150, 64, 3), (150, 256, 2)])
def test_blocks_that_share_the_tiles(emulator, blocks, mass_rows, dim, consumers):
    """One block for all twelve (or eight) tiles, rounds that are not full, one tile each; tiles with masses beside others."""
    case = PrefillCase(300, 300, 4, 2, dim=dim, ids=runs(300, 5, 140, 290), regions=3, mass_rows=mass_rows)
    case.check(emulator, blocks=blocks, consumers=consumers)


def test_without_regions(emulator):
    PrefillCase(140, 140, 2, 2, dim=128).check(emulator)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_heads_and_batch(emulator, heads, kv_heads):
    PrefillCase(70, 140, heads, kv_heads, batch=2, ids=runs(140, 5, 37, 64, batch=2)).check(emulator)


@pytest.mark.parametrize(("dim", "consumers"), SHAPES)
@pytest.mark.parametrize("regions", [1, 7, 64, 300])
def test_scattered_regions(emulator, regions, dim, consumers):
    """Every 32 keys mix regions; ids outside the range count as none; the highest region has no token. The sums of 300
    regions do not fit into shared memory, at D 256 not those of 7."""
    ids = torch.randint(-1, max(regions - 1, 1), (1, 260), dtype=torch.int32)
    case = PrefillCase(40, 260, 1, 1, dim=dim, ids=ids, regions=regions)
    expected = case.reference()[2]
    case.ids = torch.where(ids == -1, regions, ids)
    torch.testing.assert_close(case.run(emulator, consumers=consumers)[2], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [64, 256])
def test_regions_that_repeat_every_32_keys(emulator, dim):
    """Each lane sees one region, but not that of the other lanes."""
    ids = (torch.arange(260, dtype=torch.int32) % 32 // 16)[None]
    PrefillCase(40, 260, 1, 1, dim=dim, ids=ids).check(emulator)


@pytest.mark.parametrize(("dim", "consumers"), SHAPES)
def test_regions_that_change_between_steps(emulator, dim, consumers):
    """No step is mixed, until three in a row are; a region that was left comes back, one follows the other."""
    keys = 128 if dim <= 128 else 80
    ids = torch.tensor([0, 1, 1, -1, 0, 1, 9, 9, 9, 0], dtype=torch.int32).repeat_interleave(keys)
    ids[ids == 9] = torch.randint(-1, 2, (3 * keys,), dtype=torch.int32)
    case = PrefillCase(40, len(ids), 1, 1, dim=dim, ids=ids[None])
    case.check(emulator, consumers=consumers)
    case.key[:, :, keys : 2 * keys] *= 5  # a run that outweighs all that come after it
    case.check(emulator, consumers=consumers)


@pytest.mark.parametrize("mass_rows", [1, 70, 73, 150])
def test_masses_of_the_last_rows(emulator, mass_rows):
    """73: of the first tile its last row alone."""
    PrefillCase(200, 200, 2, 1, ids=runs(200, 5, 37, 64), mass_rows=mass_rows).check(emulator)


def test_strides_of_dimensions_of_one(emulator):
    """They may be anything, also what the driver would refuse."""
    case = PrefillCase(70, 140, 1, 1)
    case.query, case.key = (t.as_strided(t.shape, (3, 5, *t.stride()[2:])) for t in (case.query, case.key))
    case.check(emulator)


def test_large_scores(emulator):
    """The maximum jumps late: what was summed before has to shrink to nothing."""
    case = PrefillCase(64, 400, 1, 1, ids=runs(400, 5, 137, 264))
    case.key[:, :, 300:] *= 40
    case.check(emulator)


def test_nan_stays_in_its_batch_element(emulator):
    case = PrefillCase(80, 150, 2, 1, ids=runs(150, 5, 37, 64, batch=2), batch=2)
    case.key[0, 0, 40] = torch.nan
    case.value[0, 0, 41] = torch.nan
    results = case.run(emulator)
    assert results[0][0].isnan().all()
    for tensor, exact in zip(results, case.reference(), strict=True):
        torch.testing.assert_close(tensor[1].double(), exact[1].double(), atol=ATOL[case.dtype], rtol=1e-5)
