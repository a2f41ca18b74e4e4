"""refusal_similarity against its definition, and what it does with steps, NaN and bad arguments."""

import pytest
import torch
from torch.nn import functional

from ras_fast import ops

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)


def exact(logits, prototypes, gamma, steps):
    rows = []
    for row, count in zip(logits.double(), steps, strict=True):
        power = gamma ** torch.arange(int(count), dtype=torch.float64)
        predicted = power @ torch.softmax(row[:count], -1)
        refusal = power @ prototypes.double()[:count]
        rows.append(functional.cosine_similarity(predicted, refusal, dim=0))
    return torch.stack(rows)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 5, 177, 32003])
def test_against_definition(backend, vocabulary, dtype):
    logits = (torch.randn(5, 3, vocabulary) * 4).to(dtype)
    prototypes = torch.softmax(torch.randn(4, vocabulary) * 4, -1)
    steps = torch.tensor([3, 2, 1, 3, 3], dtype=torch.int32)
    similarity = ops.refusal_similarity(logits, prototypes, gamma=0.3, steps=steps)
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity.double(), exact(logits, prototypes, 0.3, steps), atol=2e-6, rtol=2e-5)
    everything = ops.refusal_similarity(logits, prototypes)
    full = torch.full((5,), 3, dtype=torch.int32)
    torch.testing.assert_close(everything.double(), exact(logits, prototypes, 0.3, full), atol=2e-6, rtol=2e-5)


@BACKENDS
def test_prototypes_themselves_score_one(backend):
    logits = torch.randn(1, 3, 100)
    prototypes = torch.softmax(logits[0], -1)
    torch.testing.assert_close(ops.refusal_similarity(logits, prototypes), torch.ones(1))


@BACKENDS
def test_gamma_zero_sees_only_the_first_step(backend):
    logits, prototypes = torch.randn(2, 3, 50), torch.softmax(torch.randn(3, 50), -1)
    one = torch.ones(2, dtype=torch.int32)
    torch.testing.assert_close(ops.refusal_similarity(logits, prototypes, gamma=0.0),
                               ops.refusal_similarity(logits, prototypes, steps=one))  # fmt: skip


@BACKENDS
def test_what_cannot_be_computed_is_nan_in_its_row_only(backend):
    logits, prototypes = torch.randn(4, 3, 50), torch.softmax(torch.randn(3, 50), -1)
    logits[1, 2, 7] = torch.nan
    steps = torch.tensor([3, 3, 0, 2], dtype=torch.int32)
    similarity = ops.refusal_similarity(logits, prototypes, steps=steps)
    assert similarity.isnan().tolist() == [False, True, True, False]
    # A step that a row never produced may hold anything.
    logits[3, 2] = torch.nan
    assert ops.refusal_similarity(logits, prototypes, steps=steps)[3] == similarity[3]


@BACKENDS
def test_strides_without_copies(backend):
    """Nothing beyond a row is read: it is NaN."""
    logits, prototypes = torch.randn(4, 3, 50), torch.softmax(torch.randn(3, 50), -1)
    wide_logits = torch.full((5, 6, 60), torch.nan)[:4, :3, :50].copy_(logits)
    wide_prototypes = torch.full((3, 70), torch.nan)[:, :50].copy_(prototypes)
    found = ops.refusal_similarity(wide_logits, wide_prototypes)
    torch.testing.assert_close(found, ops.refusal_similarity(logits, prototypes))


@BACKENDS
def test_masked_logits(backend):
    """Logits processors leave −inf."""
    logits, prototypes = torch.randn(1, 2, 60), torch.softmax(torch.randn(2, 60), -1)
    logits[0, 1, 10:] = -torch.inf
    steps = torch.tensor([2])
    torch.testing.assert_close(ops.refusal_similarity(logits, prototypes).double(), exact(logits, prototypes, 0.3, steps),
                               atol=2e-6, rtol=1e-5)  # fmt: skip


@BACKENDS
def test_never_above_one(backend):
    logits = torch.randn(200, 1, 300) * 3
    found = torch.cat([ops.refusal_similarity(row[None], torch.softmax(row, -1)) for row in logits])
    assert (found <= 1).all()
    assert (found > 0.999).all()


def test_prototypes_that_are_not_there():
    with pytest.raises(ValueError, match="prototype_probs is on device meta"):
        ops.refusal_similarity(torch.randn(2, 3, 50), torch.rand(3, 50).to("meta"))


def test_opcheck():
    args = (torch.randn(2, 3, 20), torch.softmax(torch.randn(3, 20), -1), 0.3, torch.tensor([3, 1], dtype=torch.int32))
    torch.library.opcheck(torch.ops.ras_fast.refusal_similarity.default, args)
    torch.library.opcheck(torch.ops.ras_fast.refusal_similarity.default, (*args[:3], None))


logits, prototypes = torch.zeros(2, 3, 8), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((logits[0], prototypes), {}, "logits is of shape"),
        ((logits.int(), prototypes), {}, "logits is of dtype"),
        ((logits, prototypes[:2]), {}, "prototype_probs is of shape"),
        ((logits, prototypes[:, :7].clone()), {}, "prototype_probs is of shape"),
        ((logits, prototypes.half()), {}, "prototype_probs is of dtype"),
        ((logits, prototypes), {"gamma": 1.5}, "gamma is 1.5"),
        ((logits, prototypes), {"steps": torch.zeros(3, dtype=torch.int32)}, "steps is of shape"),
        ((logits, prototypes), {"steps": torch.zeros(2)}, "steps is of dtype"),
    ],
)
def test_bad_arguments_are_named(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.refusal_similarity(*args, **kwargs)
