//! The update rules: one element at a time, in float32, an operation a sign, nothing fused.
//!
//! The formulas and the order of their operations are those of `tests/oracle_optim.py`. Choices are fields that do not change within a
//! tensor, so the compiler takes them out of the loop or makes them selections.

use super::element::{Element, F32};
use super::optim_coefficients::Moment;
use super::path::multiversion;
use crate::optim::{Family, Group};

/// An element's numbers; a rule changes what it updates.
#[derive(Clone, Copy)]
struct Lane {
    p: f32,
    g: f32,
    s: [f32; 3],
}

trait Rule: Copy + Sync {
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

/// Calls `work` with a family's rule at one step of one tensor.
pub fn with_rule<T>(family: Family, moment: &Moment, ratio: f32, work: impl FnOnce(&dyn Update) -> T) -> T {
    match family {
        Family::Adam if moment.group.has(Group::AMSGRAD) => work(&Adam::<true>::new(moment)),
        Family::Adam => work(&Adam::<false>::new(moment)),
        Family::Ademamix => work(&Ademamix::new(moment)),
        Family::Lion => work(&Lion::new(moment)),
        Family::Sgd | Family::Lars if moment.group.beta1 != 0.0 => work(&Sgd::<true>::new(moment, ratio)),
        Family::Sgd | Family::Lars => work(&Sgd::<false>::new(moment, ratio)),
        Family::Rmsprop => match (moment.group.beta2 != 0.0, moment.group.has(Group::CENTERED)) {
            (false, false) => work(&Rmsprop::<false, false>::new(moment)),
            (false, true) => work(&Rmsprop::<false, true>::new(moment)),
            (true, false) => work(&Rmsprop::<true, false>::new(moment)),
            (true, true) => work(&Rmsprop::<true, true>::new(moment)),
        },
        Family::Adagrad => work(&Adagrad::new(moment)),
        Family::Lamb => work(&Lamb::new(moment, ratio)),
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

/// Adds weight decay to the gradient.
#[inline(always)]
fn decayed(g: f32, p: f32, weight_decay: Option<f32>) -> f32 {
    match weight_decay {
        Some(weight_decay) => g + weight_decay * p,
        None => g,
    }
}

/// A moving average.
#[inline(always)]
fn average(beta: f32, old: f32, rest: f32, new: f32) -> f32 {
    beta * old + rest * new
}

/// A moving average of squares.
#[inline(always)]
fn average_square(beta: f32, old: f32, rest: f32, new: f32) -> f32 {
    beta * old + rest * new * new
}

/// NaN if one is.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a >= b || a.is_nan() { a } else { b }
}

#[derive(Clone, Copy)]
struct Adam<const AMSGRAD: bool> {
    keep: f32,
    added_decay: Option<f32>,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    inverse: f32,
    eps: f32,
    step: f32,
}

impl<const AMSGRAD: bool> Adam<AMSGRAD> {
    fn new(moment: &Moment) -> Self {
        let group = moment.group;
        let decoupled = group.has(Group::DECOUPLED);
        Self {
            keep: if decoupled { moment.keep() } else { 1.0 },
            added_decay: moment.added_decay().filter(|_| !decoupled),
            beta1: group.beta1 as f32,
            rest1: (1.0 - group.beta1) as f32,
            beta2: group.beta2 as f32,
            rest2: (1.0 - group.beta2) as f32,
            inverse: (1.0 / moment.gathered(group.beta2).sqrt()) as f32,
            eps: group.eps as f32,
            step: (moment.lr / moment.gathered(group.beta1)) as f32,
        }
    }
}

impl<const AMSGRAD: bool> Rule for Adam<AMSGRAD> {
    const STATES: [bool; 3] = [true, true, AMSGRAD];

    #[inline(always)]
    fn update(&self, lane: Lane) -> Lane {
        let p = lane.p * self.keep;
        let g = decayed(lane.g, p, self.added_decay);
        let m = average(self.beta1, lane.s[0], self.rest1, g);
        let v = average_square(self.beta2, lane.s[1], self.rest2, g);
        let largest = if AMSGRAD { larger(lane.s[2], v) } else { v };
        let divisor = largest.sqrt() * self.inverse + self.eps;
        Lane { p: p - self.step * (m / divisor), g: lane.g, s: [m, v, largest] }
    }
}

#[derive(Clone, Copy)]
struct Ademamix {
    keep: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    beta3: f32,
    rest3: f32,
    alpha: f32,
    inverse1: f32,
    inverse2: f32,
    eps: f32,
    lr: f32,
}

impl Ademamix {
    fn new(moment: &Moment) -> Self {
        let (group, beta3) = (moment.group, moment.beta3());
        Self {
            keep: moment.keep(),
            beta1: group.beta1 as f32,
            rest1: (1.0 - group.beta1) as f32,
            beta2: group.beta2 as f32,
            rest2: (1.0 - group.beta2) as f32,
            beta3: beta3 as f32,
            rest3: (1.0 - beta3) as f32,
            alpha: moment.alpha() as f32,
            inverse1: (1.0 / moment.gathered(group.beta1)) as f32,
            inverse2: (1.0 / moment.gathered(group.beta2).sqrt()) as f32,
            eps: group.eps as f32,
            lr: moment.lr as f32,
        }
    }
}

impl Rule for Ademamix {
    const STATES: [bool; 3] = [true; 3];

    #[inline(always)]
    fn update(&self, lane: Lane) -> Lane {
        let p = lane.p * self.keep;
        let fast = average(self.beta1, lane.s[0], self.rest1, lane.g);
        let slow = average(self.beta3, lane.s[1], self.rest3, lane.g);
        let v = average_square(self.beta2, lane.s[2], self.rest2, lane.g);
        let u = fast * self.inverse1 + self.alpha * slow;
        let divisor = v.sqrt() * self.inverse2 + self.eps;
        Lane { p: p - self.lr * (u / divisor), g: lane.g, s: [fast, slow, v] }
    }
}

#[derive(Clone, Copy)]
struct Lion {
    keep: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    lr: f32,
}

impl Lion {
    fn new(moment: &Moment) -> Self {
        let group = moment.group;
        Self {
            keep: moment.keep(),
            beta1: group.beta1 as f32,
            rest1: (1.0 - group.beta1) as f32,
            beta2: group.beta2 as f32,
            rest2: (1.0 - group.beta2) as f32,
            lr: moment.lr as f32,
        }
    }
}

impl Rule for Lion {
    const STATES: [bool; 3] = [true, false, false];

    #[inline(always)]
    fn update(&self, lane: Lane) -> Lane {
        let p = lane.p * self.keep;
        let u = average(self.beta1, lane.s[0], self.rest1, lane.g);
        let positive = if u > 0.0 { 1.0 } else { 0.0 };
        let sign = if u < 0.0 { -1.0 } else { positive };
        let sign = if u.is_nan() { u } else { sign };
        let m = average(self.beta2, lane.s[0], self.rest2, lane.g);
        Lane { p: p - self.lr * sign, g: lane.g, s: [m, lane.s[1], lane.s[2]] }
    }
}

/// SGD and LARS, of which SGD has no trust ratio.
#[derive(Clone, Copy)]
struct Sgd<const MOMENTUM: bool> {
    added_decay: Option<f32>,
    ratio: f32,
    momentum: f32,
    /// What the gradient adds to the momentum after the first step.
    damp: f32,
    first: bool,
    nesterov: bool,
    lr: f32,
}

impl<const MOMENTUM: bool> Sgd<MOMENTUM> {
    fn new(moment: &Moment, ratio: f32) -> Self {
        let group = moment.group;
        Self {
            added_decay: moment.added_decay(),
            ratio,
            momentum: group.beta1 as f32,
            damp: (1.0 - group.dampening) as f32,
            first: moment.t == 1,
            nesterov: group.has(Group::NESTEROV),
            lr: moment.lr as f32,
        }
    }
}

impl<const MOMENTUM: bool> Rule for Sgd<MOMENTUM> {
    const STATES: [bool; 3] = [MOMENTUM, false, false];

    #[inline(always)]
    fn update(&self, lane: Lane) -> Lane {
        // A ratio of 1 changes nothing.
        let g = decayed(lane.g, lane.p, self.added_decay) * self.ratio;
        if !MOMENTUM {
            return Lane { p: lane.p - self.lr * g, ..lane };
        }
        let b = if self.first { g } else { average(self.momentum, lane.s[0], self.damp, g) };
        let g = if self.nesterov { g + self.momentum * b } else { b };
        Lane { p: lane.p - self.lr * g, g: lane.g, s: [b, lane.s[1], lane.s[2]] }
    }
}

#[derive(Clone, Copy)]
struct Rmsprop<const MOMENTUM: bool, const CENTERED: bool> {
    added_decay: Option<f32>,
    alpha: f32,
    rest: f32,
    eps: f32,
    momentum: f32,
    lr: f32,
}

impl<const MOMENTUM: bool, const CENTERED: bool> Rmsprop<MOMENTUM, CENTERED> {
    fn new(moment: &Moment) -> Self {
        let group = moment.group;
        Self {
            added_decay: moment.added_decay(),
            alpha: group.beta1 as f32,
            rest: (1.0 - group.beta1) as f32,
            eps: group.eps as f32,
            momentum: group.beta2 as f32,
            lr: moment.lr as f32,
        }
    }
}

impl<const MOMENTUM: bool, const CENTERED: bool> Rule for Rmsprop<MOMENTUM, CENTERED> {
    const STATES: [bool; 3] = [true, MOMENTUM, CENTERED];

    #[inline(always)]
    fn update(&self, lane: Lane) -> Lane {
        let [s, b, h] = lane.s;
        let g = decayed(lane.g, lane.p, self.added_decay);
        let s = average_square(self.alpha, s, self.rest, g);
        let h = if CENTERED { h + self.rest * (g - h) } else { h };
        let variance = if CENTERED { s - h * h } else { s };
        let step = g / (variance.sqrt() + self.eps);
        let step = if MOMENTUM { self.momentum * b + step } else { step };
        Lane { p: lane.p - self.lr * step, g: lane.g, s: [s, step, h] }
    }
}

#[derive(Clone, Copy)]
struct Adagrad {
    added_decay: Option<f32>,
    lr: f32,
    eps: f32,
}

impl Adagrad {
    fn new(moment: &Moment) -> Self {
        let (lr, eps) = (moment.decayed_lr() as f32, moment.group.eps as f32);
        Self { added_decay: moment.added_decay(), lr, eps }
    }
}

impl Rule for Adagrad {
    const STATES: [bool; 3] = [true, false, false];

    #[inline(always)]
    fn update(&self, lane: Lane) -> Lane {
        let g = decayed(lane.g, lane.p, self.added_decay);
        let s = lane.s[0] + g * g;
        let p = lane.p - self.lr * (g / (s.sqrt() + self.eps));
        Lane { p, g: lane.g, s: [s, lane.s[1], lane.s[2]] }
    }
}

#[derive(Clone, Copy)]
struct Lamb {
    weight_decay: Option<f32>,
    decoupled: bool,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    inverse1: f32,
    inverse2: f32,
    eps: f32,
    /// Learning rate times trust ratio.
    step: f32,
}

impl Lamb {
    fn new(moment: &Moment, ratio: f32) -> Self {
        let group = moment.group;
        let corrected = group.has(Group::BIAS_CORRECTION);
        let gathered = |beta: f64| if corrected { moment.gathered(beta) } else { 1.0 };
        Self {
            weight_decay: moment.added_decay(),
            decoupled: group.has(Group::DECOUPLED),
            beta1: group.beta1 as f32,
            rest1: (1.0 - group.beta1) as f32,
            beta2: group.beta2 as f32,
            rest2: (1.0 - group.beta2) as f32,
            inverse1: (1.0 / gathered(group.beta1)) as f32,
            inverse2: (1.0 / gathered(group.beta2).sqrt()) as f32,
            eps: group.eps as f32,
            step: moment.lr as f32 * ratio,
        }
    }

    /// The update before its trust ratio, and the new states.
    #[inline(always)]
    fn direction(&self, lane: Lane) -> (f32, f32, f32) {
        let g = decayed(lane.g, lane.p, self.weight_decay.filter(|_| !self.decoupled));
        let m = average(self.beta1, lane.s[0], self.rest1, g);
        let v = average_square(self.beta2, lane.s[1], self.rest2, g);
        let r = m * self.inverse1 / (v.sqrt() * self.inverse2 + self.eps);
        (decayed(r, lane.p, self.weight_decay.filter(|_| self.decoupled)), m, v)
    }
}

impl Rule for Lamb {
    const STATES: [bool; 3] = [true, true, false];

    #[inline(always)]
    fn update(&self, lane: Lane) -> Lane {
        let (r, m, v) = self.direction(lane);
        Lane { p: lane.p - self.step * r, g: lane.g, s: [m, v, lane.s[2]] }
    }
}
