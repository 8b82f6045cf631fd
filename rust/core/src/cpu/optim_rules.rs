//! Update rules over many elements: the loop, compiled for each instruction set, and the choice of the rule.

use super::element::{Element, F32};
use super::optim_coefficients::Moment;
use super::optim_families::{Adagrad, Adam, Ademamix, Lamb, Lion, Rmsprop, Sgd};
use super::path::multiversion;
use crate::optim::Family;

/// An element's numbers; a rule changes what it updates.
#[derive(Clone, Copy)]
pub struct Lane {
    pub p: f32,
    pub g: f32,
    pub s: [f32; 3],
}

/// A family's formula with its coefficients.
pub trait Rule: Copy + Sync {
    /// Which of the three states it has.
    const STATES: [bool; 3];
    fn update(&self, lane: Lane) -> Lane;
}

/// A rule, ready to update many elements.
pub trait Update {
    /// Updates parameters and states in place; gradients are multiplied by `scale` first. States that the rule does not have are not
    /// looked at.
    fn apply(&self, scale: f32, p: &mut [f32], g: &[f32], s: [&mut [f32]; 3]);
}

impl<R: Rule> Update for R {
    fn apply(&self, scale: f32, p: &mut [f32], g: &[f32], [s0, s1, s2]: [&mut [f32]; 3]) {
        let lengths = [s0.len(), s1.len(), s2.len()];
        assert!(g.len() >= p.len() && (0..3).all(|k| !R::STATES[k] || lengths[k] >= p.len()));
        // SAFETY: all are as long as the parameters.
        unsafe { run(self, scale, p, g, s0, s1, s2) }
    }
}

/// Every NaN becomes the one that GPUs write.
#[inline(always)]
fn plain_nan(x: f32) -> f32 {
    F32::narrow(x).widen()
}

/// # Safety
/// The gradients and the states that the rule has are as long as the parameters.
#[inline(always)]
unsafe fn each<R: Rule>(
    rule: &R,
    scale: f32,
    p: &mut [f32],
    g: &[f32],
    s0: &mut [f32],
    s1: &mut [f32],
    s2: &mut [f32],
) {
    let (rule, [has0, has1, has2]) = (*rule, R::STATES);
    for (i, p) in p.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let s = [
                if has0 { *s0.get_unchecked(i) } else { 0.0 },
                if has1 { *s1.get_unchecked(i) } else { 0.0 },
                if has2 { *s2.get_unchecked(i) } else { 0.0 },
            ];
            let lane = rule.update(Lane { p: *p, g: *g.get_unchecked(i) * scale, s });
            *p = plain_nan(lane.p);
            if has0 {
                *s0.get_unchecked_mut(i) = plain_nan(lane.s[0]);
            }
            if has1 {
                *s1.get_unchecked_mut(i) = plain_nan(lane.s[1]);
            }
            if has2 {
                *s2.get_unchecked_mut(i) = plain_nan(lane.s[2]);
            }
        }
    }
}

// Arguments of their own, not fields of one: so the compiler knows that they do not overlap.
multiversion! {
    unsafe fn run[R: Rule][R](
        rule: &R, scale: f32, p: &mut [f32], g: &[f32], s0: &mut [f32], s1: &mut [f32], s2: &mut [f32],
    ) => each
}

/// Calls `work` with a family's rule at one step of one tensor, whose trust ratio is 1 where the family has none.
pub fn with_rule<T>(family: Family, moment: &Moment, ratio: f32, work: impl FnOnce(&dyn Update) -> T) -> T {
    match (family, family.states(moment.group)) {
        (Family::Adam, [.., false]) => work(&Adam::<false>::new(moment)),
        (Family::Adam, [.., true]) => work(&Adam::<true>::new(moment)),
        (Family::Ademamix, _) => work(&Ademamix::new(moment)),
        (Family::Lion, _) => work(&Lion::new(moment)),
        (Family::Sgd | Family::Lars, [false, ..]) => work(&Sgd::<false>::new(moment, ratio)),
        (Family::Sgd | Family::Lars, [true, ..]) => work(&Sgd::<true>::new(moment, ratio)),
        (Family::Rmsprop, [_, false, false]) => work(&Rmsprop::<false, false>::new(moment)),
        (Family::Rmsprop, [_, false, true]) => work(&Rmsprop::<false, true>::new(moment)),
        (Family::Rmsprop, [_, true, false]) => work(&Rmsprop::<true, false>::new(moment)),
        (Family::Rmsprop, [_, true, true]) => work(&Rmsprop::<true, true>::new(moment)),
        (Family::Adagrad, _) => work(&Adagrad::new(moment)),
        (Family::Lamb, _) => work(&Lamb::new(moment, ratio)),
    }
}

/// The update before its trust ratio: gradients, already scaled, are replaced by it.
pub fn direction(family: Family, moment: &Moment, p: &[f32], g: &mut [f32], m: &[f32], v: &[f32]) {
    if family == Family::Lamb {
        assert!(p.len() >= g.len() && m.len() >= g.len() && v.len() >= g.len());
        // SAFETY: all are as long as the gradients.
        unsafe { run_direction(&Lamb::new(moment, 1.0), p, g, m, v) }
    }
}

#[inline(always)]
unsafe fn each_direction(rule: &Lamb, p: &[f32], g: &mut [f32], m: &[f32], v: &[f32]) {
    let rule = *rule;
    for (i, g) in g.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let (p, m, v) = unsafe { (*p.get_unchecked(i), *m.get_unchecked(i), *v.get_unchecked(i)) };
        *g = rule.direction(Lane { p, g: *g, s: [m, v, 0.0] }).0;
    }
}

multiversion! {
    unsafe fn run_direction[][](rule: &Lamb, p: &[f32], g: &mut [f32], m: &[f32], v: &[f32]) => each_direction
}
