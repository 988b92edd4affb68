"""Time of a compiled sm_90 kernel by a model of its machine code, without a GPU.

The warps of one scheduler are played in order, by the stalls and barriers that the assembler wrote into the
instructions' control bits, with the pipes they share and the latencies of ``Machine``. Loops are played until they are
steady and multiplied by their turns. What it predicts is no measurement: how far off it is, a GPU must tell.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

LANES = 32
SCHEDULERS = 4  # of a processor
STEADY_TURNS = 12
MIO_QUEUE = 64.0  # cycles of work that the memory pipe's queue takes before a warp waits

# Class of an instruction by the beginning of its opcode; the first that fits.
CLASSES = {
    "HGMMA": r"[HQI]GMMA",
    "HMMA": r"[HQI]MMA",
    "LDGSTS": r"LDGSTS",
    "LDG": r"LDG\b",
    "STG": r"STG\b",
    "LDS": r"LDS",
    "STS": r"STS",
    "LOCAL": r"LDL|STL",
    "BAR": r"BAR\b",
    "MEMBAR": r"MEMBAR|FENCE|CCTL|ERRBAR",
    "WGWAIT": r"WARPGROUP\.DEPBAR",
    "CPWAIT": r"DEPBAR\.LE|LDGDEPBAR",
    "ATOM": r"ATOM|RED\b|REDG",
    "SHFL": r"SHFL|REDUX",
    "MUFU": r"MUFU",
    "FP": r"FFMA|FADD|FMUL|FSETP|FSEL|FMNMX|HFMA2|HADD2|F2FP|FSET|FCHK|HMNMX2|DADD|DMUL|DFMA",
    "INT": r"IMAD|IADD|ISETP|LEA|LOP3|SHF|MOV|SEL|PRMT|PLOP3|VIADD|IABS|IMNMX|VIMNMX|CS2R|S2R|R2P|P2R|SGXT|BREV|FLO"
    r"|POPC|I2F|F2I|I2FP",
    "UNIFORM": r"U[A-Z0-9]+|R2UR|S2UR",
    "BRANCH": r"BRA|EXIT|BSSY|BSYNC|WARPSYNC|CALL|RET|NOP|BREAK|YIELD|NANOSLEEP",
}
BYTES = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


class Machine(NamedTuple):
    """What the model takes for granted of a GPU: latencies in cycles, and rates; an H200's as published."""

    processors: int = 132
    registers: int = 65536  # of a processor
    shared_bytes: int = 232448
    l1_bytes: int = 32768  # of a tensor that stays in L1 beside the others
    warps: int = 64
    programs: int = 32
    clock_ghz: float = 1.98
    l2_latency: float = 280.0  # of a load that hits L2
    l1_latency: float = 38.0
    shared_latency: float = 30.0
    shuffle_latency: float = 24.0
    function_latency: float = 22.0  # of the special function unit
    reduction_latency: float = 16.0
    product_latency: float = 20.0  # of a matrix instruction beyond its time in the pipe
    barrier: float = 22.0  # from the last arrival on
    fence: float = 40.0  # of a program's memory
    fence_device: float = 600.0
    atomic: float = 600.0
    l1_port_bytes: float = 128.0
    port_bytes: float = 64.0  # a cycle, from L2 to a processor
    l2_bytes_per_s: float = 5.5e12  # to all processors together
    launch_us: float = 1.2  # from the end of one kernel of a graph to the next one's first instruction
    dependent_launch_us: float = 0.7  # the same where the next kernel was launched ahead of that end
    join_us: float = 1.4  # the same where the next kernel waits for another branch


H200 = Machine()


@dataclasses.dataclass
class Instruction:
    """An instruction, its address, and its control bits: stall 4, yield 1, write barrier 3, read barrier 3, waits 6."""

    address: int
    text: str
    control: int = 0
    near: bool = False  # it loads what other programs have brought to L1

    @functools.cached_property
    def opcode(self) -> str:
        """The mnemonic with its modifiers, without a predicate."""
        text = re.sub(r"^@!?U?P[T0-9]+ +", "", self.text)
        return text.split()[0].rstrip(";") if text else ""

    @functools.cached_property
    def kind(self) -> str:
        """The class it belongs to."""
        return next((name for name, pattern in CLASSES.items() if re.match(pattern, self.opcode)), "OTHER")

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes that a lane moves, of a memory instruction."""
        width = re.search(r"\.(128|64|U8|U16|S8|S16)\b", self.opcode)
        return BYTES[width.group(1)] if width else 4

    @functools.cached_property
    def target(self) -> int | None:
        """Where a branch goes."""
        address = re.search(r"BRA.*?(0x[0-9a-f]+)", self.text)
        return int(address.group(1), 16) if address else None

    @functools.cached_property
    def written(self) -> tuple[str, ...]:
        """Registers it writes."""
        register = re.match(r"(?:@!?U?P\w+ +)?\S+ +(?:P\w+, +)*R(\d+)\b", self.text)
        if not register or self.kind in ("STS", "STG", "LDGSTS", "BRANCH"):
            return ()
        count = 2 if "WIDE" in self.opcode else max(self.bytes // 4, 1)
        return tuple(f"R{int(register.group(1)) + n}" for n in range(count))

    @functools.cached_property
    def pipe(self) -> tuple[str, float]:
        """The pipe of a scheduler that it takes, and for how many cycles."""
        wide = self.bytes / 4
        if self.kind in ("LDS", "STS") and "M88" in self.opcode:
            matrices = re.search(r"M88\.(\d)", self.opcode)
            return "memory", 4.0 * int(matrices.group(1) if matrices else 1)
        if self.kind == "HGMMA":
            columns = re.search(r"\.64x(\d+)x", self.opcode)
            return "tensor", int(columns.group(1) if columns else 256) / 2
        return {
            "FP": ("float", 1.0),
            "INT": ("integer", 2.0),
            "MUFU": ("function", 8.0),
            "SHFL": ("memory", 4.0),
            "LDS": ("memory", 4.0 * wide),
            "STS": ("memory", 4.0 * wide),
            "LDG": ("memory", 4.0),
            "STG": ("memory", 4.0 * wide),
            "LDGSTS": ("memory", 4.0 * wide),
            "HMMA": ("tensor", 8.0 if "16816" in self.opcode else 4.0),
        }.get(self.kind, ("issue", 1.0))


@dataclasses.dataclass
class Loop:
    """A loop of machine code by its first and last address, with the loops within."""

    first: int
    last: int
    body: list[Instruction]
    inner: list[Loop] = dataclasses.field(default_factory=list)

    def own(self) -> list[Instruction]:
        """Instructions outside the loops within."""
        return [i for i in self.body if not any(one.first <= i.address <= one.last for one in self.inner)]


class Kernel(NamedTuple):
    """A compiled kernel as the model reads it."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    code: list[Instruction]
    loops: list[Loop]  # the outermost

    def programs_per_processor(self, machine: Machine = H200) -> int:
        """How many programs a processor holds at once."""
        registers = -(-self.registers // 8) * 8 * LANES * self.warps
        return max(
            1,
            min(
                machine.registers // registers,
                machine.shared_bytes // (self.shared_bytes + 1024),
                machine.warps // self.warps,
                machine.programs,
            ),
        )

    def mix(self) -> dict[str, int]:
        """Instructions by class of the loop with the most matrix instructions, else of the longest one, else of all."""

        def weight(loop: Loop) -> tuple[int, int]:
            own = loop.own()
            return sum(i.kind in ("HGMMA", "HMMA") for i in own), len(own)

        loops = [one for outer in self.loops for one in _nest(outer)]
        code = max(loops, key=weight).own() if loops else self.code
        return dict(Counter(i.kind for i in code).most_common())


def _nest(loop: Loop) -> list[Loop]:
    return [loop, *(one for inner in loop.inner for one in _nest(inner))]


# --- reading ---------------------------------------------------------------------------------------------------------


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def read(cubin: bytes, shared_bytes: int, warps: int, near_loops: bool = False, near: bool = False) -> Kernel:
    """The kernel in a cubin, by Triton's own disassemblers.

    ``near_loops`` says that its loops load what all programs of a processor read, and L1 holds; ``near``, that all
    of it does.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-hex", "-c", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = _instructions(listing)
    end = max((n for n, i in enumerate(code) if i.opcode.startswith("EXIT")), default=len(code) - 1)
    code = code[: end + 1]
    loops = _loops(code)
    for i in code if near else [i for loop in loops for i in loop.body] if near_loops else []:
        i.near = i.kind == "LDG"
    return Kernel(used["REG"], used["STACK"] + used["LOCAL"], shared_bytes, warps, code, loops)


def _instructions(listing: str) -> list[Instruction]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            pending.append(label.group(1))
        elif (upper := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)) and code:
            code[-1].control = int(upper.group(1), 16) >> 41 & 0x1FFFF
        elif parts := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            address = int(parts.group(1), 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            code.append(Instruction(address, parts.group(2)))
    for instruction in code:
        named = re.search(r"\((\.L_x_\d+)\)", instruction.text)
        if named and named.group(1) in labels:
            instruction.text = re.sub(r"`\(\.L_x_\d+\)", hex(labels[named.group(1)]), instruction.text)
    return code


def _loops(code: list[Instruction]) -> list[Loop]:
    """The outermost loops, by backward branches."""
    ends: dict[int, int] = {}
    for i in code:
        if i.target is not None and i.target < i.address:
            ends[i.target] = max(ends.get(i.target, 0), i.address)
    loops = [Loop(first, last, [i for i in code if first <= i.address <= last]) for first, last in sorted(ends.items())]
    outermost: list[Loop] = []
    for loop in loops:
        around = [one for one in loops if one is not loop and one.first <= loop.first and loop.last <= one.last]
        (max(around, key=lambda one: one.first).inner if around else outermost).append(loop)
    return outermost


def _straight(code: Sequence[Instruction]) -> list[Instruction]:
    """What runs of code without loops if no slow path is taken: calls are skipped, predicated branches fall through."""
    at = {i.address: n for n, i in enumerate(code)}
    result: list[Instruction] = []
    n = 0
    while n < len(code):
        i = code[n]
        result.append(i)
        n += 1
        if i.target is not None and i.target > i.address and i.target in at:
            end = at[i.target]
            if not i.text.startswith("@") or any("CALL" in j.text for j in code[n:end]):
                n = end
    return result


# --- playing ---------------------------------------------------------------------------------------------------------

Trips = list["int | tuple[int, Trips]"]  # turns of the loops in the order of their addresses, each with those within


class _Warp:
    """Where a warp of the scheduler is."""

    def __init__(self, number: int, program: int) -> None:
        self.time = float(number)
        self.program = program
        self.position = self.turn = 0
        self.barriers = [0.0] * 6
        self.copies: list[float] = []  # groups of asynchronous copies, when each is done
        self.open_copy = 0.0
        self.products: list[float] = []
        self.parked = False


def _turn_cycles(
    stretches: Sequence[list[Instruction] | float], warps: int, programs: int, turns: int, machine: Machine
) -> float:
    """Cycles of a turn through ``stretches`` by ``warps`` warps on each scheduler, of ``programs`` programs."""
    code: list[Instruction | float] = []
    for stretch in stretches:
        code.extend([stretch] if isinstance(stretch, float) else _straight(stretch))
    written = {r for i in code if isinstance(i, Instruction) for r in i.written}
    pipes: dict[str, float] = {}
    state = [_Warp(n, n * programs // warps) for n in range(warps)]
    members = Counter(warp.program for warp in state)
    arrived: dict[tuple[int, int, int], list[_Warp]] = {}
    starts: list[float] = []
    issue = 0.0
    while live := [warp for warp in state if warp.turn < turns and not warp.parked]:
        warp = min(live, key=lambda one: one.time)
        if warp is state[0] and warp.position == 0:
            starts.append(warp.time)
        i = code[warp.position]
        if isinstance(i, float):
            warp.time += i
        else:
            issue = _issue(i, warp, pipes, max(issue, warp.time), written, machine)
            if i.opcode.startswith("BAR.SYNC"):
                key = (warp.program, warp.turn, warp.position)
                here = arrived.setdefault(key, [])
                here.append(warp)
                warp.parked = True
                if len(here) == members[warp.program]:
                    latest = max(one.time for one in here) + machine.barrier
                    for one in here:
                        one.time, one.parked = latest, False
        warp.position += 1
        if warp.position == len(code):
            warp.position, warp.turn = 0, warp.turn + 1
    if turns == 1:
        return max(warp.time for warp in state)
    half = len(starts) // 2
    return (starts[-1] - starts[half]) / (len(starts) - 1 - half)


def _issue(
    i: Instruction, warp: _Warp, pipes: dict[str, float], ready: float, written: set[str], machine: Machine
) -> float:
    """Issue an instruction of a warp; returns when the scheduler is free again."""
    stall, write, read, wait = i.control & 15, i.control >> 5 & 7, i.control >> 8 & 7, i.control >> 11 & 63
    for b in range(6):
        if wait >> b & 1:
            ready = max(ready, warp.barriers[b])
    if waits := re.search(r"DEPBAR\.LE (?:SB0|gsb0), (0x[0-9a-f]+)", i.text):
        groups = warp.products if i.kind == "WGWAIT" else warp.copies
        ready = max([ready, *groups[: max(len(groups) - int(waits.group(1), 16), 0)]])
    pipe, busy = i.pipe
    if pipe not in ("issue", "tensor"):
        ready = max(ready, pipes.get(pipe, 0.0) - (MIO_QUEUE if pipe == "memory" else 0.0))
    begin = max(ready, pipes.get(pipe, 0.0))
    if pipe != "issue":
        pipes[pipe] = begin + busy
    done = begin + busy
    if i.kind in ("LDG", "LDGSTS"):
        # What a loop loads again from the same address is in L1.
        again = re.search(r"\[(R\d+)\.64", i.text)
        is_same = i.kind == "LDG" and again and again.group(1) not in written and "STRONG" not in i.opcode
        near = is_same or i.near
        port, rate, latency = (
            ("l1", machine.l1_port_bytes, machine.l1_latency)
            if near
            else ("port", machine.port_bytes, machine.l2_latency)
        )
        pipes[port] = max(pipes.get(port, 0.0), begin) + i.bytes * LANES * SCHEDULERS / rate
        done = max(pipes[port], begin) + latency
    elif i.kind != "MEMBAR":
        done += {
            "LDS": machine.shared_latency,
            "SHFL": machine.reduction_latency if "REDUX" in i.opcode else machine.shuffle_latency,
            "MUFU": machine.function_latency,
            "HMMA": machine.product_latency + 5.0,
            "ATOM": machine.atomic,
        }.get(i.kind, 0.0)
    if i.kind == "LDGSTS":
        warp.open_copy = max(warp.open_copy, done)
    elif i.opcode.startswith("LDGDEPBAR"):
        warp.copies.append(warp.open_copy)
    elif i.kind == "HGMMA" and "gsb0" in i.text:
        warp.products.append(done + machine.product_latency)
    if write != 7:
        warp.barriers[write] = max(done, begin + 10)
    if read != 7:
        warp.barriers[read] = max(warp.barriers[read], begin + busy + 8.0)
    fence = 0.0
    if i.kind == "MEMBAR":
        fence = machine.fence_device if "GPU" in i.text else machine.fence
    warp.time = ready + fence + max(stall, 1)
    return ready + 1


def _jumped(code: list[Instruction], loops: list[Loop], trips: Trips) -> list[Instruction]:
    """Code without what a branch jumps over around a loop that takes no turns."""
    for n, loop in enumerate(loops):
        if n < len(trips) and trips[n] == 0:
            around = [i for i in code if i.target and i.address < loop.first and i.target > loop.last]
            first = max((i.address for i in around), default=loop.first - 16)
            end = max((i.target or 0 for i in around if i.address == first), default=loop.last + 16)
            code = [i for i in code if not first < i.address < end]
    return code


def _cycles(
    code: list[Instruction], loops: list[Loop], trips: Trips, warps: int, programs: int, turns: int, machine: Machine
) -> float:
    stretches: list[list[Instruction] | float] = []
    at = code[0].address
    taken = _jumped(code, loops, trips)
    for n, loop in enumerate(loops):
        given = trips[n] if n < len(trips) else 1
        if given == 0 or loop.first < at:
            continue
        count, within = given if isinstance(given, tuple) else (given, [])
        stretches.append([i for i in taken if at <= i.address < loop.first])
        turn = _cycles(loop.body, loop.inner, within, warps, programs, STEADY_TURNS, machine)
        stretches.append(turn * count)
        at = loop.last + 16
    stretches.append([i for i in taken if at <= i.address])
    return _turn_cycles(stretches, warps, programs, turns, machine)


class Time(NamedTuple):
    """What the model says of a launch that has the GPU for itself."""

    microseconds: float  # without the gap before it
    ahead_us: float  # of them, before it waits for the launch ahead of it
    processor_us: float  # that all processors together must spend on it, whatever runs beside it
    l2_bytes: float  # read through all ports


Demand = Counter[str]  # cycles of each pipe of a processor's schedulers, and bytes from L2, that a program asks for


def _demand(code: list[Instruction], loops: list[Loop], trips: Trips, warps: int) -> Demand:
    inside = {id(i) for loop in loops for i in loop.body}
    code = _jumped(code, loops, trips)
    # Copies ahead of a pipelined loop are those of its first turns.
    is_pipelined = any(i.kind == "LDGSTS" for loop in loops for i in loop.body)
    total: Demand = Counter()
    for i in code:
        if id(i) in inside:
            continue
        pipe, busy = i.pipe
        total[pipe] += busy * warps / SCHEDULERS  # type: ignore[assignment]
        total["issue"] += warps / SCHEDULERS if pipe != "issue" else 0.0  # type: ignore[assignment]
        if (i.kind == "LDG" and not i.near) or (i.kind == "LDGSTS" and not is_pipelined):
            total[i.kind] += i.bytes * LANES * warps
    for n, loop in enumerate(loops):
        given = trips[n] if n < len(trips) else 1
        count, within = given if isinstance(given, tuple) else (given, [])
        for pipe, amount in _demand(loop.body, loop.inner, within, warps).items():
            total[pipe] += count * amount
    return total


def launch_time(
    kernel: Kernel, programs: int, trips: Trips, tensor_bytes: Sequence[int] = (), machine: Machine = H200
) -> Time:
    """Time of a launch of so many programs; ``trips`` are the turns of its loops in the order of their addresses.

    ``tensor_bytes`` are the sizes of the tensors it reads: programs of a processor share what L1 can hold of them.
    """
    resident_limit = kernel.programs_per_processor(machine)
    left = -(-programs // machine.processors)  # of the processor with the most
    wait = next((n for n, i in enumerate(kernel.code) if i.opcode.startswith("ACQBULK")), 0)
    cycles = ahead = 0.0
    while left > 0:
        resident = min(left, resident_limit)
        warps = -(-resident * kernel.warps // SCHEDULERS)
        held = (warps, min(resident, warps), 1, machine)
        cycles += _cycles(kernel.code, kernel.loops, trips, *held)
        if wait and not ahead:
            before = [loop for loop in kernel.loops if loop.last < kernel.code[wait].address]
            ahead = _cycles(kernel.code[:wait], before, trips, *held) / machine.clock_ghz / 1e3
        left -= resident
    us = cycles / machine.clock_ghz / 1e3
    demand = _demand(kernel.code, kernel.loops, trips, kernel.warps)
    copied, loaded = programs * demand.pop("LDGSTS", 0), programs * demand.pop("LDG", 0)
    if tensor_bytes:
        active = min(programs, machine.processors)
        loaded = min(loaded, sum(size * active if size <= machine.l1_bytes else size for size in tensor_bytes))
    l2 = float(copied + loaded)
    busiest = programs * max(demand.values()) / machine.clock_ghz / 1e3
    us = max(us, l2 / machine.l2_bytes_per_s * 1e6, busiest / machine.processors)
    return Time(us, min(ahead, us), busiest, l2)
