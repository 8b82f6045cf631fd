//! Writes `wgmma.cuh`: the warpgroup product of Hopper, whose operand lists are too long to write by hand.

use std::fmt::Write as _;

/// The header's text: for each type and number of columns, `d += a b` with `a` (64 x 16) in registers.
pub fn header() -> crate::Result<String> {
    let mut text = String::from(
        "// Written by build.rs. d += a b on a warpgroup (`start`: d = a b; `multiply_if`: that, unless `add`): a 64 x 16 from registers, b 16 x N from shared memory by its descriptor, d in\n\
         // float32. The caller fences, commits and waits.\n\
         #pragma once\n\
         struct ProductBF16;\nstruct ProductF16;\ntemplate <class E, int N>\nstruct Wgmma;\n",
    );
    for (element, kind) in [("ProductBF16", "bf16"), ("ProductF16", "f16")] {
        for columns in [8, 16, 32, 64, 128, 256] {
            product(&mut text, element, kind, columns)?;
        }
    }
    text.push_str(
        "// The same of int8, d in int32, b 32 x N and a 64 x 32, that from shared memory, too, or from registers.\ntemplate <int N>\nstruct WgmmaS8;\n",
    );
    for columns in [64, 128, 256] {
        int8_product(&mut text, columns)?;
    }
    Ok(text)
}

fn product(text: &mut String, element: &str, kind: &str, columns: usize) -> crate::Result<()> {
    let sums = columns / 2;
    let numbers = (0..sums).map(|i| format!("%{i}")).collect::<Vec<_>>().join(", ");
    let outputs = (0..sums).map(|i| format!("\"+f\"(d[{i}])")).collect::<Vec<_>>().join(", ");
    let [a0, a1, a2, a3, b] = [0, 1, 2, 3, 4].map(|i| sums + i);
    let fresh = outputs.replace('+', "=");
    writeln!(text, "template <>\nstruct Wgmma<{element}, {columns}> {{")?;
    // `start` takes d as 0.
    for (name, add, operands) in [("multiply", 1, &outputs), ("start", 0, &fresh)] {
        writeln!(
            text,
            "    static __device__ __forceinline__ void {name}(float (&d)[{sums}], const unsigned (&a)[4], unsigned long long b) {{\n        \
                 asm volatile(\"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{numbers}}}, \"\n                     \
                     \"{{%{a0}, %{a1}, %{a2}, %{a3}}}, %{b}, {add}, 1, 1, 0;\"\n                     \
                     : {operands}\n                     : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(b));\n    }}"
        )?;
    }
    let add = sums + 5;
    writeln!(
        text,
        "    static __device__ __forceinline__ void multiply_if(float (&d)[{sums}], const unsigned (&a)[4], unsigned long long b, int add) \
         {{\n        asm volatile(\"{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{add}, 0;\\n\"\n                     \
             \"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{numbers}}}, \"\n                     \
             \"{{%{a0}, %{a1}, %{a2}, %{a3}}}, %{b}, add, 1, 1, 0;\\n}}\"\n                     \
             : {outputs}\n                     : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(b), \"r\"(add));\n    }}"
    )?;
    writeln!(text, "}};")?;
    Ok(())
}

fn int8_product(text: &mut String, columns: usize) -> crate::Result<()> {
    let sums = columns / 2;
    let numbers = (0..sums).map(|i| format!("%{i}")).collect::<Vec<_>>().join(", ");
    let outputs = (0..sums).map(|i| format!("\"+r\"(d[{i}])")).collect::<Vec<_>>().join(", ");
    let (a, b) = (sums, sums + 1);
    let [a1, a2, a3, after] = [1, 2, 3, 4].map(|i| sums + i);
    writeln!(
        text,
        "template <>\nstruct WgmmaS8<{columns}> {{\n    \
             static __device__ __forceinline__ void multiply(int (&d)[{sums}], unsigned long long a, unsigned long long b) {{\n        \
             asm volatile(\"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {{{numbers}}}, %{a}, %{b}, 1;\"\n                     \
                 : {outputs}\n                     : \"l\"(a), \"l\"(b));\n    }}\n    \
             static __device__ __forceinline__ void multiply(int (&d)[{sums}], const unsigned (&a)[4], unsigned long long b) {{\n        \
             asm volatile(\"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {{{numbers}}}, \"\n                     \
                 \"{{%{a}, %{a1}, %{a2}, %{a3}}}, %{after}, 1;\"\n                     \
                 : {outputs}\n                     : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(b));\n    }}\n}};"
    )?;
    Ok(())
}
