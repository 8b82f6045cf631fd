//! Writes `tables.cuh`: what the kernels need of `src/codebook.rs`.

use std::fmt::Write as _;

use crate::codebook::{BucketTable, FP4, NF4, Ranks, dynamic_map};

/// The header's text.
pub fn header() -> crate::Result<String> {
    let mut text = String::from("// Written by build.rs from src/codebook.rs.\n#pragma once\n");
    writeln!(text, "constexpr int QUANT_TYPE_FP4 = 1;")?;
    let nf4 = table(&mut text, "NF4", &NF4, 4, 3)?;
    let fp4 = table(&mut text, "FP4", &FP4, 4, 3)?;
    let dynamic = table(&mut text, "DYNAMIC", &dynamic_map(true), 8, 6)?;
    if nf4.shift != fp4.shift || nf4.lift != fp4.lift {
        return Err("NF4 and FP4 must share one bucket width".into());
    }
    for (name, values) in [("NF4", &NF4), ("FP4", &FP4)] {
        for (dtype, mantissa_bits) in [("BF16", 7), ("F16", 10)] {
            writeln!(text, "constexpr float {name}_{dtype}_FACTOR = {:e}f;", product_factor(values, mantissa_bits))?;
        }
    }
    let unsigned = table(&mut text, "DYNAMIC_UNSIGNED", &dynamic_map(false), 8, 7)?;
    for (name, table) in [("4BIT", nf4), ("8BIT", dynamic), ("UNSIGNED", unsigned)] {
        writeln!(text, "constexpr int SHIFT_{name} = {}, LIFT_{name} = {};", table.shift, table.lift)?;
    }
    Ok(text)
}

fn table(
    text: &mut String,
    name: &str,
    values: &[f32],
    rank_bits: u32,
    mantissa_bits: u32,
) -> crate::Result<BucketTable> {
    let table = BucketTable::new(&Ranks::with_signed_zeros(values), rank_bits, mantissa_bits)
        .ok_or_else(|| format!("{name}: two thresholds in one bucket"))?;
    writeln!(text, "constexpr int {name}_LENGTH = {}, {name}_ORIGIN = {};", table.entries.len(), table.origin)?;
    writeln!(text, "constexpr float {name}_SCALE = {:e}f;", table.scale)?;
    // Whole 16-byte vectors, so that it can be copied by them.
    let padded = table.entries.len().next_multiple_of(4);
    writeln!(text, "constexpr int {name}_PADDED = {padded};")?;
    write!(text, "__device__ const __align__(16) unsigned {name}_ENTRIES[{padded}] = {{")?;
    for entry in &table.entries {
        write!(text, "{entry}u,")?;
    }
    writeln!(text, "}};")?;
    write!(text, "__device__ const float {name}_VALUES[{}] = {{", values.len())?;
    for value in values {
        write!(text, "{value:e}f,")?;
    }
    writeln!(text, "}};")?;
    Ok(table)
}

/// A factor for the values of a code that are rounded to `mantissa_bits` before a product: the one in [1, 2) that leaves the least
/// mean square error over the code. The block's scale is divided by it in float32. It has no more bits than the values, so that
/// 1 and -1 stay exact. NF4 gains a third over no factor, FP4's values become exact.
fn product_factor(values: &[f32], mantissa_bits: u32) -> f32 {
    let steps = 1u32 << mantissa_bits;
    let error = |factor: f64| -> f64 {
        let scaled = values.iter().map(|&value| f64::from(value) * factor).filter(|value| *value != 0.0);
        let rounding = scaled.map(|value| {
            let unit = 2f64.powi(value.abs().log2().floor() as i32 - mantissa_bits as i32);
            value - (value / unit).round_ties_even() * unit
        });
        rounding.map(|difference| (difference / factor).powi(2)).sum()
    };
    let factors = (steps..2 * steps).map(|i| f64::from(i) / f64::from(steps));
    factors.min_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap_or(1.0) as f32
}
