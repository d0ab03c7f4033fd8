"""Which unit of a processor an instruction takes, its flops and its bytes."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.static.disassembly import Instruction

TENSOR = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "OMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
_NAMES = {
    "tensor": TENSOR,
    "float": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2", "FSWZADD", "FMUL32I"),
    "select": ("FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FCHK", "HMNMX2", "HSETP2", "HSET2", "VHMNMX"),
    "convert": ("F2F", "F2FP", "F2I", "F2IP", "I2F", "I2FP", "FRND", "I2I", "I2IP"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS", "MOVM", "LDTM", "STTM"),
    "global": ("LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG"),
    "async": ("LDGSTS", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UTMAPF", "CCTL", "UBLKRED"),
    "local": ("LDL", "STL"),
    "shuffle": ("SHFL", "REDUX", "VOTE", "VOTEU", "MATCH", "CREDUX"),
    "barrier": (
        "BAR", "SYNCS", "WARPGROUP", "WARPSYNC", "MEMBAR", "FENCE", "DEPBAR", "LDGDEPBAR", "ARRIVES", "UTMACMDFLUSH",
        "ERRBAR", "UTCBAR", "UCGABAR_ARV", "UCGABAR_WAIT", "NANOSLEEP", "UTMACCTL", "WARPGROUPSET", "ELECT",
    ),
    "control": (
        "BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "NOP", "BREAK", "YIELD", "BMOV", "BRX", "JMP", "USETMAXREG",
    ),
}  # fmt: skip
_UNIT = {name: unit for unit, names in _NAMES.items() for name in names}
UNITS = (
    "tensor", "exp2", "mufu", "float", "multiply", "integer", "select", "convert", "uniform", "shared", "global",
    "async", "local", "shuffle", "barrier", "control",
)  # fmt: skip


def unit(instruction: Instruction) -> str:
    """The unit of an instruction, one of :data:`UNITS`.

    Example:
        >>> [unit(Instruction(0, "", opcode, "")) for opcode in ("MUFU.EX2", "MUFU.RCP", "IMAD.MOV.U32", "LOP3.LUT")]
        ['exp2', 'mufu', 'multiply', 'integer']
    """
    name = instruction.name
    if name == "MUFU":
        return "exp2" if ".EX2" in instruction.opcode else "mufu"
    if name in _UNIT:
        return _UNIT[name]
    if name.startswith("IMAD"):
        return "multiply"
    if name in ("R2UR", "LDC", "CS2R", "S2R") or (name.startswith("U") and name != "UNPACK"):
        return "uniform"
    return "integer"


def flops(instruction: Instruction, warps: int = 1) -> int:
    """Operations of a tensor instruction that every warp of a program issues (2 m n k for each group that multiplies).

    Example:
        >>> flops(Instruction(0, "", "HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], RZ"), warps=8) // (2 * 64 * 128 * 16)
        2
    """
    if not (shape := re.search(r"\.(\d+)x?(\d*)x?(\d*)", instruction.opcode)):
        return 0
    sizes = [int(n) for n in shape.groups() if n]
    if len(sizes) == 1:  # HMMA.16816 is 16 x 8 x 16
        sizes = {
            "1688": [16, 8, 8],
            "16816": [16, 8, 16],
            "16832": [16, 8, 32],
            "16864": [16, 8, 64],
            "1684": [16, 8, 4],
        }[shape[1]]
    per = warps // 4 if "GMMA" in instruction.name else warps
    return 2 * sizes[0] * sizes[1] * sizes[2] * max(1, per)


def width(instruction: Instruction) -> int:
    """Bytes that a thread moves with a memory instruction.

    Example:
        >>> [width(Instruction(0, "", o, "")) for o in ("LDG.E.64", "LDG.E.U16", "STS.128", "LDS", "LDSM.16.M88.4")]
        [8, 2, 16, 4, 16]
    """
    if instruction.name in ("LDSM", "STSM"):  # matrices of 8 x 8 numbers of two bytes
        return 4 * int((re.search(r"\.(?:M88|MT88|M816)\.(\d)$", instruction.opcode) or "11")[1])
    for size, found in ((16, r"\.128|\.LTC128B\.128"), (8, r"\.64"), (2, r"\.[US]?16\b"), (1, r"\.[US]8")):
        if re.search(found, instruction.opcode.replace("LTC128B", "").replace("LTC64B", "")):
            return size
    return 4


def count(code: Iterable[Instruction]) -> Counter[str]:
    """Instructions by unit."""
    return Counter(unit(instruction) for instruction in code)


EVENTS = ("tensor", "exp2", "async")


def _event(instruction: Instruction) -> str:
    """The step of the skeleton that an instruction belongs to, "" for none."""
    kind, opcode, name = unit(instruction), instruction.opcode, instruction.name
    if kind == "tensor":
        return f"issue {opcode.split('.F32')[0]}"
    if name == "WARPGROUP":
        return "wait tensor " + instruction.operands.split(",")[-1].strip() if "DEPBAR" in opcode else ""
    if name == "DEPBAR":
        return "wait async " + instruction.operands.split(",")[-1].strip() if "SB0" in instruction.operands else ""
    if name == "LDGDEPBAR":
        return "commit async"
    if name == "SYNCS":
        return "wait mbarrier" if "TRYWAIT" in opcode else "arrive mbarrier"
    if name == "BAR":
        return "barrier"
    if kind in ("exp2", "mufu", "async", "shared", "local", "shuffle") or name in (
        "LDG",
        "STG",
        "RED",
        "REDG",
        "ATOM",
        "ATOMG",
    ):
        return (
            opcode.replace("MUFU.", "")
            if kind in ("exp2", "mufu")
            else f"{name} {8 * width(instruction)}"
            if kind in ("global", "shared")
            else name
        )
    return ""


def skeleton(code: Sequence[Instruction]) -> list[tuple[str, int]]:
    """The steps of a piece of code in order, each with its number of instructions; others are "." between them.

    The last product before a wait has "gsb0" among its operands: what follows until "wait tensor" runs beside it.
    """
    steps: list[tuple[str, int]] = []
    pending = 0
    for instruction in code:
        event = _event(instruction)
        if not event:
            pending += 1
        elif steps and steps[-1][0] == event and pending < 25:
            steps[-1] = (event, steps[-1][1] + 1)
        else:
            if pending:
                steps.append((".", pending))
            steps.append((event, 1))
            pending = 0
    return [*steps, (".", pending)] if pending else steps
