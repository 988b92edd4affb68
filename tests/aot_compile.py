"""Compile the kernels ahead of time, with no GPU, and print what they take as JSON: python aot_compile.py sm_90 gfx942.

Run by test_kernel_compile.py in a process of its own: in Triton's interpreter nothing is compiled.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vgf_fast.kernels import launch, selection, svgd

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Particles (the paper's, a middle number, the most), dtype, bandwidth gradient. The direction kernel is the first half
# of the step kernel: two of its variants do.
STEPS = [(n, *variant) for n in (10, 40, 128) for variant in (("fp32", True), ("bf16", False))]
DIRECTIONS = [(10, "fp32", False), (128, "bf16", True)]
FLOAT32_POINTERS = ("phi_ptr", "m_ptr", "v_ptr", "uniform_ptr", "y_ptr", "reward_ptr", "mask_ptr")
MODES = {"BANDWIDTH_GRADIENT": True, "REPULSION": True, "ADAM": True}


def variants(amd):
    """(kernel, name, dtype, constants and launch options) of every variant to compile."""
    for n, dtype, bandwidth_gradient in STEPS:
        options = MODES | {"BANDWIDTH_GRADIENT": bandwidth_gradient} | launch.svgd(n, amd).options()
        yield svgd.svgd_step_kernel, f"step {n} {bandwidth_gradient}", dtype, options
    for n, dtype, bandwidth_gradient in DIRECTIONS:
        options = MODES | {"BANDWIDTH_GRADIENT": bandwidth_gradient} | launch.svgd(n, amd).options()
        yield svgd.svgd_direction_kernel, f"direction {n} {bandwidth_gradient}", dtype, options
    options = {"BLOCK_A": launch.ACTION_BLOCK} | launch.selection(10).options()
    yield selection.select_kernel, "select max", "bf16", options | {"MODE": "max"}
    yield selection.select_kernel, "select softmax", "fp32", options | {"MODE": "softmax"}
    yield selection.td_target_kernel, "td mean of min", "fp32", options | {"MINIMUM": True, "LARGEST": False}
    yield selection.td_target_kernel, "td max of mean", "bf16", options | {"MINIMUM": False, "LARGEST": True}
    aggregate = {"BLOCK": launch.AGGREGATE_BLOCK, "num_warps": launch.AGGREGATE_WARPS}
    yield selection.aggregate_kernel, "aggregate", "bf16", aggregate | {"MINIMUM": True}


def argument_type(name, dtype, constants):
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*i64" if name == "index_ptr" else "*fp32" if name in FLOAT32_POINTERS else f"*{dtype}"
    return "i32" if name.startswith("stride_") or len(name) == 1 else "fp32"


def compile_variant(kernel, dtype, options, target):
    """As for contiguous, aligned tensors, which is what a launch specialises for."""
    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    constants |= {
        name: 1 for name in ("stride_xa", "stride_ga", "stride_ma", "stride_va", "stride_qn") if name in names
    }
    signature = {name: argument_type(name, dtype, constants) for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": options["num_warps"]})


def nvidia_resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", report).group(1)) for key in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled_bytes": stack + local}


def amd_resources(assembly):
    keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = {key: int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1)) for key in keys}
    return {
        "registers": found["vgpr_count"],
        "spilled_bytes": found["private_segment_fixed_size"] + found["vgpr_spill_count"],
        "scalar_spills": found["sgpr_spill_count"],
    }


def main(targets):
    rows = []
    for name in targets:
        for kernel, variant, dtype, options in variants(amd=name == "gfx942"):
            compiled = compile_variant(kernel, dtype, options, TARGETS[name])
            cubin = compiled.asm.get("cubin")
            resources = nvidia_resources(cubin) if cubin else amd_resources(compiled.asm["amdgcn"])
            row = {"target": name, "variant": variant, "dtype": dtype, "shared": compiled.metadata.shared}
            rows.append(row | resources)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
