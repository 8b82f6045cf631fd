//! Writes `matmul4_instances.cuh`: which instances of the 4-bit products' kernels are compiled.

use std::fmt::Write as _;

use crate::matmul4_instances::{BROAD, MID, SCALES, SKINNY, TYPES, Tokens, WIDE};

/// The header's text.
pub fn header() -> crate::Result<String> {
    let mut text =
        String::from("// Written by build.rs from src/matmul4_instances.rs.\n#pragma once\n#define SKINNY_INSTANCES");
    for_types(|kind, element, scales, nested| {
        for s in SKINNY {
            if nested && !s.takes_nested() {
                continue;
            }
            let (tokens, kept) = match s.tokens {
                Tokens::Held(stages) => ("HELD", stages),
                Tokens::Read => ("READ", 0),
                Tokens::Copied => ("COPIED", 0),
            };
            let (name, warps, split, depth, eights) = (s.name, s.warps, s.split, s.depth, s.eights);
            let (sixteens, stride, resident) = (s.sixteens, s.stride, s.resident);
            write!(
                text,
                " \\\n    SKINNY(matmul4_skinny_{name}_{kind}_{scales}, {resident}, {warps}, {element}, {nested}, {warps}, {split}, \
                 {depth}, {eights}, {sixteens}, {tokens}, {kept}, {stride})"
            )?;
        }
        Ok(())
    })?;
    text.push_str("\n#define WIDE_INSTANCES");
    for_types(|kind, element, scales, nested| {
        for w in WIDE {
            let (columns, codes, tokens) = (w.columns, w.code_slots, w.token_slots);
            write!(
                text,
                " \\\n    WIDE(matmul4_wide_{columns}_{kind}_{scales}, {element}, {nested}, {columns}, {codes}, {tokens})"
            )?;
        }
        Ok(())
    })?;
    text.push_str("\n#define MID_INSTANCES");
    for_types(|kind, element, scales, nested| {
        for m in MID {
            let (name, columns, groups, halves, split) = (m.name(), m.columns, m.groups, m.halves, m.split);
            let (codes, tokens) = (m.code_slots, m.token_slots);
            write!(
                text,
                " \\\n    MID(matmul4_mid_{name}_{kind}_{scales}, {element}, {nested}, {columns}, {groups}, {halves}, {split}, \
                 {codes}, {tokens})"
            )?;
        }
        Ok(())
    })?;
    text.push_str("\n#define BROAD_INSTANCES");
    for_types(|kind, element, scales, nested| {
        let scales_of = if nested { "NestedScales" } else { "PlainScales" };
        for b in BROAD {
            let (columns, slots) = (b.columns, b.token_slots);
            write!(
                text,
                " \\\n    BROAD(matmul4_broad_{columns}_{kind}_{scales}, {element}, {scales_of}, {columns}, {slots})"
            )?;
        }
        Ok(())
    })?;
    text.push('\n');
    Ok(text)
}

fn for_types(mut write: impl FnMut(&str, &str, &str, bool) -> crate::Result<()>) -> crate::Result<()> {
    for kind in TYPES {
        for scales in SCALES {
            write(kind, &kind.to_uppercase(), scales, scales == "nested")?;
        }
    }
    Ok(())
}
