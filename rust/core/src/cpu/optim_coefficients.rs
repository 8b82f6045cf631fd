//! What an update rule computes once a tensor: in float64, then rounded once to float32.

use crate::optim::Group;

/// `base^exponent` by squaring: the same products in the same order on every device.
pub fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// A group's numbers at one step of one tensor.
pub struct Moment<'a> {
    pub group: &'a Group,
    pub lr: f64,
    pub t: i64,
}

impl<'a> Moment<'a> {
    /// # Safety
    /// `lr_address` is 0 or holds a float32.
    pub unsafe fn new(group: &'a Group, t: i64) -> Self {
        let lr = match group.lr_address {
            0 => group.lr,
            // SAFETY: the caller's promise.
            address => f64::from(unsafe { (address as *const f32).read_unaligned() }),
        };
        Self { group, lr, t }
    }

    /// `1 - beta^t`: the weight that an average with decay `beta` has gathered.
    pub fn gathered(&self, beta: f64) -> f64 {
        1.0 - power(beta, self.t as u64)
    }

    /// What decoupled weight decay leaves of a parameter.
    pub fn keep(&self) -> f32 {
        (1.0 - self.lr * self.group.weight_decay) as f32
    }

    /// The weight decay that is added to the gradient, if any.
    pub fn added_decay(&self) -> Option<f32> {
        (self.group.weight_decay != 0.0).then_some(self.group.weight_decay as f32)
    }

    /// AdEMAMix: the slow average's decay, rising so that its half-life does.
    pub fn beta3(&self) -> f64 {
        let group = self.group;
        if group.t_beta3 == 0.0 {
            return group.beta3;
        }
        let (fast, slow, part) = (group.beta1.ln(), group.beta3.ln(), self.t as f64 / group.t_beta3);
        let risen = (fast * slow / ((1.0 - part) * slow + part * fast)).exp();
        if risen < group.beta3 { risen } else { group.beta3 }
    }

    /// AdEMAMix: the slow average's weight, rising from 0.
    pub fn alpha(&self) -> f64 {
        let group = self.group;
        if group.t_alpha == 0.0 {
            return group.alpha;
        }
        let risen = self.t as f64 * group.alpha / group.t_alpha;
        if risen < group.alpha { risen } else { group.alpha }
    }

    /// Adagrad's learning rate.
    pub fn decayed_lr(&self) -> f64 {
        self.lr / (1.0 + (self.t as f64 - 1.0) * self.group.lr_decay)
    }
}
