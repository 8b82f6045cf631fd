//! The formulas of the eight families: one element at a time, in float32, an operation a sign, nothing fused.
//!
//! They and the order of their operations are those of `tests/oracle_optim.py`. Choices are constants, or fields that do not change within
//! a tensor: so the compiler takes them out of the loop or makes them selections.

use super::optim_coefficients::Moment;
use super::optim_rules::{Lane, Rule};
use crate::optim::Group;

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
pub struct Adam<const AMSGRAD: bool> {
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
    pub fn new(moment: &Moment) -> Self {
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
pub struct Ademamix {
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
    pub fn new(moment: &Moment) -> Self {
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
pub struct Lion {
    keep: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    lr: f32,
}

impl Lion {
    pub fn new(moment: &Moment) -> Self {
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
pub struct Sgd<const MOMENTUM: bool> {
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
    pub fn new(moment: &Moment, ratio: f32) -> Self {
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
pub struct Rmsprop<const MOMENTUM: bool, const CENTERED: bool> {
    added_decay: Option<f32>,
    alpha: f32,
    rest: f32,
    eps: f32,
    momentum: f32,
    lr: f32,
}

impl<const MOMENTUM: bool, const CENTERED: bool> Rmsprop<MOMENTUM, CENTERED> {
    pub fn new(moment: &Moment) -> Self {
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
pub struct Adagrad {
    added_decay: Option<f32>,
    lr: f32,
    eps: f32,
}

impl Adagrad {
    pub fn new(moment: &Moment) -> Self {
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
pub struct Lamb {
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
    pub fn new(moment: &Moment, ratio: f32) -> Self {
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
    pub fn direction(&self, lane: Lane) -> (f32, f32, f32) {
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
