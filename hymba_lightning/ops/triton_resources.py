"""Registers, spills and shared memory of the Triton kernels, compiled for a GPU that need not be there.

The launches are those of the operators themselves, run on tensors without memory (torch's meta device), with each
kernel replaced by a recorder: what is compiled is what production would launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from hymba_lightning.ops import triton_sums
from hymba_lightning.ops.causal_conv1d import triton_launches as conv_triton
from hymba_lightning.ops.leaky_square_mlp import triton_launches as mlp_triton
from hymba_lightning.ops.muon_passes import Update, plan_banks
from hymba_lightning.ops.muon_passes import triton_launches as muon_triton
from hymba_lightning.ops.newton_schulz import triton_launches as schulz_triton
from hymba_lightning.ops.rotary_norm import triton_launches as rotary_triton
from hymba_lightning.ops.selective_scan import triton_launches as scan_triton
from hymba_lightning.ops.selective_scan.operator import ScanOperands
from hymba_lightning.ops.sliding_window import triton_launches as attention_triton
from hymba_lightning.ops.softcapped_cross_entropy import triton_launches as loss_triton

TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
COMPILE_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
# A multiprocessor's schedulers, the registers of each, and the programs it can hold, on every architecture this
# compiles for.
SCHEDULERS, REGISTERS_PER_SCHEDULER, PROGRAMS_PER_SM = 4, 16384, 32


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: the JIT function, its grid, and its arguments by name, compile options included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """One compiled kernel."""

    name: str
    registers: int
    """Of one thread."""
    spills: int
    """Instructions that move a register to or from local memory."""
    stack: int
    """Bytes of local memory of one thread."""
    shared: int
    """Bytes of shared memory of one program."""
    warps: int
    """Of one program."""

    @property
    def resident_warps(self) -> int:
        """Warps that a multiprocessor holds at once, as far as registers decide it."""
        per_warp = -(-self.registers // 8) * 8 * 32
        return min(REGISTERS_PER_SCHEDULER // per_warp * SCHEDULERS // self.warps, PROGRAMS_PER_SM) * self.warps


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            positional = dict(zip(self.kernel.arg_names, args, strict=False))
            self.launches.append(Launch(self.kernel, grid, positional | kwargs))

        return launch


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Inside, the kernels that `modules` launch are recorded instead of run."""
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction)
    ]
    launches: list[Launch] = []
    for module, name, kernel in kernels:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def scan_launches(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype, documents: bool = False
) -> list[Launch]:
    """Every launch of the selective scan, forward and backward, gated, u and B, C being slices of wider tensors."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    u, dt, g_out = (empty(batch, length, channels, dtype=dtype) for _ in range(3))
    z = empty(batch, length, 2 * channels, dtype=dtype)[..., channels:]
    B, C = empty(batch, length, 32 + 2 * states, dtype=dtype)[..., 32:].split(states, dim=-1)
    A, D, state = empty(channels, states), empty(channels), empty(batch, channels, states)
    scan = ScanOperands(u, dt, A, B, C, D, z, D)
    position = empty(batch, length, dtype=torch.int32) if documents else None
    with recorded(scan_triton, triton_sums) as launches:
        _, _, starts = scan_triton._forward(scan, state, position)
        scan_triton._backward(g_out, state, scan, starts, position, into=z)
    return launches


def conv_launches(
    batch: int, length: int, channels: int, taps: int, dtype: torch.dtype, documents: bool = False
) -> list[Launch]:
    """Every launch of the convolution with SiLU, its input a slice of a wider tensor."""
    x = torch.empty(batch, length, 2 * channels, dtype=dtype, device="meta")[..., :channels]
    g_out = torch.empty(batch, length, channels, dtype=dtype, device="meta")
    weight, bias = torch.empty(channels, taps, device="meta"), torch.empty(channels, device="meta")
    state = torch.empty(batch, channels, taps - 1, dtype=dtype, device="meta")
    position = torch.empty(batch, length, dtype=torch.int32, device="meta") if documents else None
    with recorded(conv_triton, triton_sums) as launches:
        conv_triton._forward(x, weight, bias, True, state, position)
        conv_triton._backward(g_out, state, x, weight, bias, True, state, position, into=x, more=g_out)
    return launches


def loss_launches(tokens: int, vocab: int, dtype: torch.dtype) -> list[Launch]:
    """Every launch of the softcapped cross-entropy, the logits contiguous."""
    logits = torch.empty(tokens, vocab, dtype=dtype, device="meta")
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    with recorded(loss_triton) as launches:
        nats, log_sums = loss_triton._forward(logits, targets, 30.0)
        loss_triton._backward(nats, logits, targets, log_sums, 30.0)
    return launches


def attention_launches(
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    width: int,
    window: int,
    dtype: torch.dtype,
    documents: bool = False,
) -> list[Launch]:
    """Every launch of window attention, forward and backward, its values a slice of a wider tensor."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, g_out = (empty(batch, length, heads, width) for _ in range(2))
    k = empty(batch, length, kv_heads, width)
    v = empty(batch, length, 2 * kv_heads * width)[..., kv_heads * width :].unflatten(2, (kv_heads, width))
    position = empty(batch, length, dtype=torch.int32) if documents else None
    with recorded(attention_triton) as launches:
        out, log_sums = attention_triton._forward(q, k, v, window, width**-0.5, position)
        attention_triton._backward(g_out, q, k, v, out, log_sums, window, width**-0.5, position, into=v)
    return launches


def rotary_launches(batch: int, length: int, heads: int, width: int, dtype: torch.dtype, gain: bool) -> list[Launch]:
    """Every launch of the heads' norm and turn, its heads a slice of a wider tensor, with the gain's sums if there is
    one."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x = empty(batch, length, 2 * heads, width, dtype=dtype)[:, :, heads:]
    table = empty(length, 1, 1, width // 2), empty(length, 1, 2, width // 2)
    with recorded(rotary_triton, triton_sums) as launches:
        out = rotary_triton._forward(x, empty(heads) if gain else None, *table, 1e-6)
        rotary_triton._backward(out, x, empty(heads) if gain else None, *table, 1e-6)
    return launches


def mlp_launches(tokens: int, width: int, hidden: int, dtype: torch.dtype) -> list[Launch]:
    """The launches of the MLP's hidden layer, forward and backward."""
    x, w_in, w_out = (
        torch.empty(*shape, dtype=dtype, device="meta") for shape in ((tokens, width), (hidden, width), (width, hidden))
    )
    with recorded(mlp_triton) as launches:
        activation_and_signs = mlp_triton.hidden_layer._init_fn(x, w_in, 0.5)
        mlp_triton.hidden_layer_backward._init_fn(x, w_out, *activation_and_signs, 0.5)
    return launches


def newton_schulz_launches(matrices: int, rows: int, columns: int, dtype: torch.dtype) -> list[Launch]:
    """Every launch of a Newton-Schulz step of a bank."""
    with recorded(schulz_triton) as launches:
        schulz_triton.newton_schulz_step_triton(
            torch.empty(matrices, rows, columns, dtype=dtype, device="meta"), 3.4, -4.8, 2.0
        )
    return launches


def muon_launches(rows: int, columns: int, dtype: torch.dtype) -> list[Launch]:
    """Every launch of Muon's passes over a bank of a wide and a tall matrix, rows normalised."""
    params, grads, momenta = (
        [torch.empty(*shape, device="meta") for shape in ((rows, columns), (columns, rows))] for _ in range(3)
    )
    update = Update(params, grads, momenta, 0.02, 0.95, 0.02, row_normalize=True)
    (bank,), _ = plan_banks([p.shape for p in params], 1)
    with recorded(muon_triton) as launches:
        passes = muon_triton.TritonPasses(update, [bank])
        passes.momentum()
        passes.apply(bank, passes.bank(bank, 0, 2, dtype).view(1, -1))
    return launches


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compiles what `launch` would compile on a GPU of the compute capability (90 for a Hopper); reads its resources.

    Raises RuntimeError if the resources cannot be read from what Triton's cuobjdump prints.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        # Triton's own rules: an argument 1 becomes a constant, multiples of 16 are marked, pointers are aligned.
        is_pointer = isinstance(value, Tensor)
        is_one = isinstance(value, int) and value == 1
        if parameter.is_constexpr or (is_one and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype].removeprefix('*')}[{block}]>"
            continue
        is_float = isinstance(value, float)
        signature[name] = (
            TYPE_NAMES[value.dtype] if is_pointer else "fp32" if is_float else "i32" if value < 2**31 else "i64"
        )
        if is_pointer or (not is_float and value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: launch.arguments[name] for name in COMPILE_OPTIONS if name in launch.arguments}
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack, spills = _read_binary(compiled.asm["cubin"])
    return Resources(launch.kernel.__name__, registers, spills, stack, compiled.metadata.shared, options["num_warps"])


def _read_binary(binary: bytes) -> tuple[int, int, int]:
    """Registers of a thread, its bytes of local memory, and its spilling instructions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, assembly = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{tool} printed no resource usage:\n{usage}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, len(re.findall(r"\b(?:STL|LDL)[.\s]", assembly))


HEADER = ("op", "arch", "kernel", "registers", "spills", "stack B", "shared B", "warps/SM")


def _line(*cells: object) -> str:
    return "{:<28} {:<7} {:<16} {:>9} {:>7} {:>8} {:>9} {:>9}".format(*cells)


def report(launches: list[Launch], title: str, capability: int) -> bool:
    """Prints one line for each kernel under the title. Returns whether none spills."""
    clean = True
    for launch in launches:
        found = compile_launch(launch, capability)
        clean = clean and found.spills == 0 and found.stack == 0
        print(
            _line(
                title,
                f"sm_{capability}",
                found.name,
                found.registers,
                found.spills,
                found.stack,
                found.shared,
                found.resident_warps,
            ),
            flush=True,
        )
    return clean


def report_all() -> bool:
    """Prints what every kernel takes on three architectures at the training shapes. Returns whether none spills."""
    print(
        f"triton {triton.__version__}; B 2, T 32768, E 512, W 4, loss of B·T tokens; registers, spills and stack of "
        "a thread, shared memory of a program"
    )
    print(_line(*HEADER))
    clean = True
    for capability in (80, 90, 100):
        for dtype in (torch.bfloat16, torch.float32):
            label = str(dtype).removeprefix("torch.")
            for states in (8, 16):
                launches = scan_launches(2, 32768, 512, states, dtype)
                clean &= report(launches, f"selective_scan N={states} {label}", capability)
                launches = scan_launches(2, 32768, 512, states, dtype, documents=True)
                clean &= report(launches, f"documents N={states} {label}", capability)
            for documents in (False, True):
                launches = conv_launches(2, 32768, 512, 4, dtype, documents)
                title = f"{'documents' if documents else 'causal_conv1d'} {label}"
                clean &= report(launches, title, capability)
            clean &= report(rotary_launches(2, 32768, 8, 64, dtype, True), f"rotary_norm {label}", capability)
            for vocab in (1024, 50257):
                clean &= report(loss_launches(65536, vocab, dtype), f"loss V={vocab} {label}", capability)
        for rows, columns in ((512, 2048), (48, 512)):
            launches = newton_schulz_launches(8, rows, columns, torch.bfloat16)
            clean &= report(launches, f"newton_schulz {rows} x {columns} bfloat16", capability)
            launches = muon_launches(rows, columns, torch.bfloat16)
            clean &= report(launches, f"muon_passes {rows} x {columns} bfloat16", capability)
        for width, documents in ((64, False), (64, True), (128, False), (128, True)) if capability == 90 else ():
            launches = attention_launches(2, 32768, 8, 4, width, 512, torch.bfloat16, documents)
            clean &= report(launches, f"attention K={width}{' documents' if documents else ''}", capability)
        if capability == 90:
            clean &= report(mlp_launches(65536, 512, 2048, torch.bfloat16), "leaky_square_mlp bfloat16", capability)
    print("no kernel spills" if clean else "SPILLS: see the table")
    return clean
