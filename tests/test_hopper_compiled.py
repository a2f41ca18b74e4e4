"""What nvcc makes of the Hopper prefill kernel (csrc/cuda/hopper_prefill.cu): what its speed rests on, read off SASS."""

import re
import subprocess

import pytest

from ras_fast import build, inspect

NVCC = build.find_cuda_tool("nvcc")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="needs nvcc")]
SHAPES = ((64, 2), (64, 3), (128, 2), (256, 2))  # head dimension, consumers
INSTANCES = {(dtype, *shape, mass) for dtype in ("half", "bfloat16") for shape in SHAPES for mass in (False, True)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(cubin, what the compiler said)"""
    cubin, csrc = tmp_path_factory.mktemp("hopper") / "hopper.cubin", build.sources()
    command = f"{NVCC} {build.common_flags(build.Torch.find(), csrc)} -DUSE_CUDA --expt-relaxed-constexpr"
    command += f" {build.HOPPER_FLAGS} -Xptxas -v -cubin {csrc}/cuda/hopper_prefill.cu -o {cubin}"
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sass(compiled):
    """{(dtype, head dimension, consumers, mass): instructions in order}"""
    kernels = {}
    for (_, name), lines in inspect.disassembly(compiled[0]).items():
        pattern = r"prefill_kernelI\d+(?:__nv_)?_*(half|bfloat16)Li(\d+)ELi(\d)ELb(\d)"
        dtype, dim, consumers, mass = re.search(pattern, name).groups()
        kernels[dtype, int(dim), int(consumers), mass == "1"] = lines
    assert set(kernels) == INSTANCES
    return kernels


def test_no_spill_and_no_serialised_product(compiled):
    rows = inspect.read_binary(compiled[0])
    assert len(rows) == len(INSTANCES)
    assert not any(row.spills for row in rows)
    assert "wgmma.mma_async instructions are serialized" not in compiled[1]
    assert "setmaxnreg ignored" not in compiled[1]
    assert "warning" not in compiled[1]


@pytest.mark.parametrize("instance", sorted(INSTANCES), ids=str)
def test_instructions(sass, instance):
    _, dim, consumers, mass = instance
    keys = 128 if dim <= 128 else 80  # of a step
    walks = 1 + (mass and dim <= 128)  # with masses one for tiles of which none are wanted
    names = [line.split()[0] for line in sass[instance]]
    # Q K^T first and in the loop, P V in the loop and last; a copy of each panel of Q, K and V.
    assert sum(name.startswith("HGMMA") for name in names) == walks * (2 * dim // 16 + 2 * keys // 16)
    assert sum(name.startswith("UTMALDG") for name in names) == 3 * (dim // 64)
    assert not any(name.startswith(("HMMA", "LDL", "STL")) for name in names)
    waits = [i for i, name in enumerate(names) if name.startswith("WARPGROUP.DEPBAR")]
    waits_of_walk = 6 - consumers
    assert len(waits) == waits_of_walk * walks
    # In the loop, the exponentials lie between the wait for S and the wait for O: the tensor cores are busy meanwhile. With
    # three consumers these are one wait, and the exponentials come after it.
    spans = [names[waits[first + 1] : waits[first + 2]] for first in range(0, len(waits), waits_of_walk)]
    for span in spans:
        assert sum(name.startswith("MUFU.EX2") for name in span) >= keys // 2
    # What masses add to a step lies elsewhere: beside the products of S, or behind the wait for O.
    if walks == 2 and consumers == 2:
        assert len(spans[1]) <= len(spans[0]) + 16


@pytest.mark.parametrize("instance", sorted(INSTANCES), ids=str)
def test_each_role_keeps_to_its_registers(sass, instance):
    """The numbers of setmaxnreg: ptxas numbers registers from 0."""
    lines, few, many = sass[instance], *((40, 232) if instance[2] == 2 else (32, 160))
    [grow] = [i for i, line in enumerate(lines) if "USETMAXREG.TRY_ALLOC" in line]
    [shrink] = [i for i, line in enumerate(lines) if "USETMAXREG.DEALLOC" in line]
    assert lines[grow].endswith(hex(many))
    assert lines[shrink].endswith(hex(few))

    def highest(part):
        return max(int(number) for line in part for number in re.findall(r"\bR(\d+)\b", line))

    assert highest(lines) < many
    producer = lines[shrink:] if shrink > grow else lines[shrink:grow]
    copies = [i for i, line in enumerate(producer) if "UTMALDG" in line]
    assert highest(producer[: copies[-1] + 1]) < few


def registers_of(line):
    """The registers that an instruction other than HGMMA names: pairs as addresses, two or four for wide data. The factors of a
    wide product are single."""
    found = set()
    name, _, operands = line.partition(" ")
    width = 4 if ".128" in name else 2 if re.search(r"\.(64|WIDE)\b", name) else 1
    for position, operand in enumerate(operands.split(",")):
        for bracket, number, address in re.findall(r"(\[?)\bR(\d+)(\.64)?", operand):
            single = bracket or (".WIDE" in name and position in (1, 2))
            found.update(range(int(number), int(number) + (2 if address else 1 if single else width)))
    return found


@pytest.mark.parametrize(
    ("line", "numbers"),
    [
        ("IMAD.WIDE.U32 R20, R23, UR58, R14", {20, 21, 23, 14, 15}),
        ("STG.E.128 desc[UR14][R2.64+0x10], R8", {2, 3, 8, 9, 10, 11}),
        ("LDS.64 R4, [R7]", {4, 5, 7}),
        ("FADD R11, R89, R11.reuse", {11, 89}),
    ],
)
def test_registers_of_a_line(line, numbers):
    assert registers_of(line) == numbers


def in_flight_of(line):
    """The registers that a product still reads or writes when it has been issued: the accumulators, and A where it has any."""
    columns, accumulator, fragment = re.match(r"HGMMA\.64x(\d+)x16\.F32\S* R(\d+), (?:R(\d+), )?gdesc", line).groups()
    found = set(range(int(accumulator), int(accumulator) + int(columns) // 2))
    return found | (set(range(int(fragment), int(fragment) + 4)) if fragment else set())


def touched_in_flight(lines):
    """Instructions that name a register of a product that has not been waited for. Straight through the code, which is in the
    order in which it runs; a wait for all products stands before the end of the loop."""
    groups, group, touched = [], set(), []
    for line in lines:
        if line.startswith("HGMMA"):
            group |= in_flight_of(line)
            if "gsb0" in line:
                groups, group = [*groups, group], set()
        elif match := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line):
            groups = groups[len(groups) - int(match[1]) :] if match[1] != "0" else []
        elif registers_of(line) & set().union(group, *groups):
            touched.append(line)
    assert not groups
    return touched


@pytest.mark.parametrize("instance", sorted(INSTANCES), ids=str)
def test_registers_of_a_product_in_flight_are_left_alone(sass, instance):
    """The emulation cannot see this: to the compiler's middle end a product is over when it is issued."""
    assert touched_in_flight(sass[instance]) == []


def test_a_register_touched_in_flight_is_found(sass):
    lines = list(sass["half", 128, 2, True])
    wait = next(i for i, line in enumerate(lines) if line.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x1"))
    out = next(int(re.search(r" R(\d+),", line)[1]) for line in reversed(lines[:wait]) if "tnspB" in line)
    planted = f"FMUL R{out + 3}, R{out + 3}, R1"
    assert touched_in_flight([*lines[: wait + 1], planted, *lines[wait + 1 :]]) == [planted]
