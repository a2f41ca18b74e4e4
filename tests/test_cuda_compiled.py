"""What nvcc makes of the CUDA kernels: what launches that overlap rest on (common.cuh), read off the built library's SASS."""

import re

import pytest

from ras_fast import inspect

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not inspect.CUDA_LIBRARY.is_file(), reason="needs a library built by nvcc")]
# Loads, stores and atomics of memory that other kernels see, and the end of a block. Prefetches into L2 are something else.
TOUCHES = re.compile(r"(LDG|LD|LDGSTS|UBLKCP|UTMALDG|STG|ST|UTMASTG|RED|REDG|ATOM|ATOMG|EXIT)\b")


@pytest.fixture(scope="module")
def overlapping():
    """{(architecture, kernel): instructions in order}, for the chips on which a kernel starts before the one before it ends"""
    try:
        kernels = inspect.disassembly(inspect.CUDA_LIBRARY)
    except inspect.InspectError as error:
        pytest.skip(str(error))
    return {(arch, kernel): lines for (arch, kernel), lines in kernels.items() if int(re.search(r"\d+", arch)[0]) >= 90}


def test_linear_asks_for_the_next_columns_before_it_waits_for_these(overlapping):
    """Two runs in flight, then product and loads by turns: the compiler's own order is to wait for both and to load nothing."""
    aligned = re.compile(r"linear_kernel\w+?Li(\d)ELi(\d)ELb1ELb\dE")  # tiles of outputs and rows
    kernels = {name: lines for name, lines in overlapping.items() if aligned.search(name[1])}
    if not kernels:
        pytest.skip("the library is not built for sm_90 or newer")
    for name, lines in kernels.items():
        work = "".join("M" if line[0] == "H" else "L" for line in lines if re.match(r"LDG\.E\.128|HMMA", line))
        outputs, rows = map(int, aligned.search(name[1]).groups())
        loads = (2 * outputs + rows) * 2 // outputs
        assert re.fullmatch(f"L{{{2 * loads}}}(M{{8}}L{{{loads}}}){{2}}", work), (name, work)


def test_kernels_wait_before_they_touch_memory(overlapping):
    """A compiler may move a load that nothing orders. A block that ended without waiting would be no less wrong: the kernel
    after it would wait for this one alone, while the one before it may still run."""
    if not overlapping:
        pytest.skip("the library is not built for sm_90 or newer")
    for name, lines in overlapping.items():
        waits = [i for i, line in enumerate(lines) if line.startswith("ACQBULK")]
        assert len(waits) == 1, name
        assert any(map(TOUCHES.match, lines)), name
        early = [line for line in lines[: waits[0]] if TOUCHES.match(line)]
        assert not early, (name, early)
