//! Optimizer steps: the tables that describe a launch, argument checks, and the choice between CPU and CUDA.
//!
//! All tensors of one (device, family, state width, parameter type, gradient type) are one launch. A table of [`FIELDS`] integers a
//! tensor, a list of tiles and a few groups of hyperparameters say what to do; tables lie where the tensors lie. The formulas are those
//! of `tests/oracle_optim.py`, in float32 and without fused multiply-add, so that every device writes the same bytes.

use crate::blockwise::check_addresses;
use crate::{Dtype, Error, Result, Target, cpu, cuda};

/// Elements of a tile, the unit of work: sixteen blocks.
pub const TILE: usize = 4096;
/// Elements of a block of 8-bit state, which share one scale.
pub const BLOCK: usize = 256;
/// Integers a tensor in its table; their order is [`Field`]'s.
pub const FIELDS: usize = 16;
/// The most groups of a call: kernels take them by value.
pub const GROUPS: usize = 16;
/// Bytes of workspace, zeroed once by the caller; every call leaves it zeroed.
pub const WORKSPACE: usize = 256;

/// What stands where in a tensor's row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Field {
    /// Address of the parameter.
    P,
    /// Address of the first state; two of them in a row for AdEMAMix.
    State1,
    /// Address of the second state.
    State2,
    /// Address of the third state.
    State3,
    /// Address of the scales of the first state's blocks.
    Absmax1,
    /// Address of the scales of the second state's blocks.
    Absmax2,
    /// Elements.
    N,
    /// Address of an int64: steps done so far.
    Step,
    /// Where the entry's tiles begin in the list of tiles.
    FirstTile,
    /// Index into the groups.
    Group,
    /// Place of the tensor among all of the optimizer's, for random numbers.
    Ordinal,
    /// Offset of this piece within its tensor, a multiple of [`BLOCK`], for random numbers.
    First,
    /// 1 where this entry adds 1 to its step counter when all is done.
    Advance,
}

/// An update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Family {
    /// Adam, AdamW, AMSGrad.
    Adam,
    /// AdEMAMix.
    Ademamix,
    /// Lion.
    Lion,
    /// SGD with momentum.
    Sgd,
    /// RMSprop.
    Rmsprop,
    /// Adagrad.
    Adagrad,
    /// LAMB.
    Lamb,
    /// LARS.
    Lars,
}

impl Family {
    /// All of them, in the order of their numbers in kernels and at the Python boundary.
    pub const ALL: [Self; 8] =
        [Self::Adam, Self::Ademamix, Self::Lion, Self::Sgd, Self::Rmsprop, Self::Adagrad, Self::Lamb, Self::Lars];

    /// As kernels are named.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adam => "adam",
            Self::Ademamix => "ademamix",
            Self::Lion => "lion",
            Self::Sgd => "sgd",
            Self::Rmsprop => "rmsprop",
            Self::Adagrad => "adagrad",
            Self::Lamb => "lamb",
            Self::Lars => "lars",
        }
    }

    /// Which states its rule has with these hyperparameters: of AdEMAMix the fast, the slow and the squares', of the others the first, the
    /// second and the third of the table.
    pub fn states(self, group: &Group) -> [bool; 3] {
        match self {
            Self::Adam => [true, true, group.has(Group::AMSGRAD)],
            Self::Ademamix => [true; 3],
            Self::Lamb => [true, true, false],
            Self::Lion | Self::Adagrad => [true, false, false],
            Self::Sgd | Self::Lars => [group.beta1 != 0.0, false, false],
            Self::Rmsprop => [true, group.beta2 != 0.0, group.has(Group::CENTERED)],
        }
    }

    /// Whether its steps are scaled by a trust ratio a tensor.
    pub fn has_trust_ratio(self) -> bool {
        matches!(self, Self::Lamb | Self::Lars)
    }
}

/// Width of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// Codes of the dynamic maps, in blocks of [`BLOCK`].
    Eight,
    /// float32.
    ThirtyTwo,
}

/// Hyperparameters, as kernels receive them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Group {
    /// Learning rate.
    pub lr: f64,
    /// Address of a float32 on the device that replaces `lr`, or 0.
    pub lr_address: u64,
    /// Decay of the first average; momentum of SGD and LARS; smoothing constant of RMSprop.
    pub beta1: f64,
    /// Decay of the second average; momentum of RMSprop.
    pub beta2: f64,
    /// Decay of AdEMAMix's slow average.
    pub beta3: f64,
    /// Weight of AdEMAMix's slow average.
    pub alpha: f64,
    /// Steps over which `alpha` rises from 0, or 0.
    pub t_alpha: f64,
    /// Steps over which `beta3` rises from `beta1`, or 0.
    pub t_beta3: f64,
    /// Added to denominators.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Dampening of momentum.
    pub dampening: f64,
    /// Decay of Adagrad's learning rate.
    pub lr_decay: f64,
    /// Trust coefficient of LAMB and LARS.
    pub trust: f64,
    /// The constants below.
    pub flags: u64,
    /// For later.
    pub spare: [u64; 2],
}

impl Group {
    /// Flag: weight decay shrinks the parameter; else it is added to the gradient.
    pub const DECOUPLED: u64 = 1;
    /// Flag: divide by the largest second average so far.
    pub const AMSGRAD: u64 = 2;
    /// Flag: Nesterov's momentum.
    pub const NESTEROV: u64 = 4;
    /// Flag: RMSprop by the variance.
    pub const CENTERED: u64 = 8;
    /// Flag: LAMB divides averages by the weight that they have gathered.
    pub const BIAS_CORRECTION: u64 = 16;

    /// Whether a flag is set.
    pub fn has(&self, flag: u64) -> bool {
        self.flags & flag != 0
    }
}

/// One launch.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Update rule.
    pub family: Family,
    /// Width of the states.
    pub bits: Bits,
    /// Type of the parameters.
    pub parameters: Dtype,
    /// Type of the gradients.
    pub gradients_dtype: Dtype,
    /// Address of `count` rows of [`FIELDS`] int64.
    pub tensors: u64,
    /// Entries of the table.
    pub count: usize,
    /// Address of `count` int64: the addresses of the gradients.
    pub gradients: u64,
    /// Address of one int32 a tile: its entry.
    pub tiles: u64,
    /// How many tiles.
    pub tile_count: usize,
    /// Hyperparameters, in host memory.
    pub groups: &'a [Group],
    /// Address of [`WORKSPACE`] bytes, zero at each call.
    pub workspace: u64,
    /// Address of a [`Control`]'s result, or 0.
    pub control: u64,
    /// Address of one float32 an entry, for families with a trust ratio; else 0.
    pub ratios: u64,
    /// Seed of stochastic rounding.
    pub seed: u64,
    /// Whether bfloat16 parameters are rounded stochastically. Without meaning for the other types.
    pub stochastic: bool,
}

/// What [`norms`] sums up for each tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norms {
    /// One float64: squares of the unscaled gradient.
    Gradient,
    /// Two float64: squares of the parameter and of the update, for the trust ratio.
    Trust,
}

/// From the sums of the gradients to the factor that they are multiplied by, and whether the step is left out.
#[derive(Debug, Clone, Copy)]
pub struct Control {
    /// Address of `count` float64.
    pub partials: u64,
    /// How many; 0 sums up to 0.
    pub count: usize,
    /// Largest norm allowed; 0 or less for any.
    pub max_norm: f64,
    /// Address of the float32 that the loss was multiplied by, or 0.
    pub grad_scale: u64,
    /// Address of a float32 that is not 0 where the step shall be left out, or 0.
    pub found_inf: u64,
    /// Whether a sum that is not finite leaves the step out.
    pub skip_nonfinite: bool,
    /// Address of a float32, the factor, and a uint32, not 0 where the step is left out.
    pub control: u64,
}

/// From the sums of [`Norms::Trust`] to the trust ratios.
#[derive(Debug, Clone, Copy)]
pub struct Trust<'a> {
    /// Address of two float64 a tile.
    pub partials: u64,
    /// The table, as in [`Step`].
    pub tensors: u64,
    /// Entries of the table.
    pub count: usize,
    /// How many tiles.
    pub tile_count: usize,
    /// LAMB or LARS.
    pub family: Family,
    /// Hyperparameters, in host memory.
    pub groups: &'a [Group],
    /// Address of one float32 an entry.
    pub ratios: u64,
}

/// One step of the optimizer. On the CPU it is done when this returns, on CUDA queued.
///
/// # Safety
/// Tables, tensors, states, counters and the addresses in `groups` are on the target's device and hold what their fields say; no two of
/// the memories written overlap each other or any of those read, and nobody else moves or writes them until the work is done.
///
/// # Errors
/// A null address, more than [`GROUPS`] groups, a state that 8 bits do not have; on the CPU also a table that does not fit together. Nothing
/// has been written then. A driver failure.
pub unsafe fn step(step: &Step, target: Target) -> Result<()> {
    check(step)?;
    if step.family.has_trust_ratio() {
        check_addresses(step.count, &[("ratios", step.ratios)])?;
    }
    if step.count == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::optim::step(step, threads),
            Target::Cuda { device, stream } => {
                check_addresses(step.count, &[("workspace", step.workspace)])?;
                cuda::optim::step(step, device, stream)
            }
        }
    }
}

/// Sums of squares, one or two float64 a tile at `partials`; nothing else is written. Of `step`, `workspace`, `ratios`, `seed` and
/// `stochastic` are not used.
///
/// # Safety
/// As of [`step`]; `partials` has room for the sums of all tiles.
///
/// # Errors
/// As of [`step`], and a family without a trust ratio where its sums are asked for.
pub unsafe fn norms(step: &Step, kind: Norms, partials: u64, target: Target) -> Result<()> {
    check(step)?;
    if kind == Norms::Trust {
        check_trust(step.family)?;
    }
    check_addresses(step.tile_count, &[("partials", partials)])?;
    if step.tile_count == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::optim_norms::norms(step, kind, partials, threads),
            Target::Cuda { device, stream } => cuda::optim::norms(step, kind, partials, device, stream),
        }
    }
}

/// Writes the factor of the gradients and whether the step is left out.
///
/// # Safety
/// The addresses are on the target's device and hold what the fields say.
///
/// # Errors
/// A null address, a driver failure.
pub unsafe fn control(control: &Control, target: Target) -> Result<()> {
    check_addresses(control.count, &[("partials", control.partials)])?;
    check_addresses(1, &[("control", control.control)])?;
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { .. } => {
                cpu::optim_norms::control(control);
                Ok(())
            }
            Target::Cuda { device, stream } => cuda::optim::control(control, device, stream),
        }
    }
}

/// Writes the trust ratio of every entry.
///
/// # Safety
/// The addresses are on the target's device and hold what the fields say.
///
/// # Errors
/// A null address, a family without a trust ratio, on the CPU a table that does not fit together, a driver failure.
pub unsafe fn trust(trust: &Trust, target: Target) -> Result<()> {
    check_trust(trust.family)?;
    check_groups(trust.groups)?;
    check_counts(trust.count, trust.tile_count)?;
    check_addresses(trust.count, &[("tensors", trust.tensors), ("ratios", trust.ratios)])?;
    check_addresses(trust.tile_count, &[("partials", trust.partials)])?;
    if trust.count == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { .. } => cpu::optim_norms::trust(trust),
            Target::Cuda { device, stream } => cuda::optim::trust(trust, device, stream),
        }
    }
}

fn check(step: &Step) -> Result<()> {
    check_groups(step.groups)?;
    check_counts(step.count, step.tile_count)?;
    check_addresses(step.count, &[("tensors", step.tensors), ("gradients", step.gradients)])?;
    check_addresses(step.tile_count, &[("tiles", step.tiles)])?;
    if step.bits == Bits::Eight {
        for group in step.groups {
            let refused = match step.family {
                Family::Adam if group.has(Group::AMSGRAD) => "amsgrad",
                Family::Rmsprop if group.has(Group::CENTERED) => "centered",
                Family::Rmsprop if group.beta2 != 0.0 => "momentum",
                _ => continue,
            };
            return Err(Error::argument(refused, "8-bit states", "32-bit states"));
        }
    }
    Ok(())
}

fn check_groups(groups: &[Group]) -> Result<()> {
    if (1..=GROUPS).contains(&groups.len()) {
        return Ok(());
    }
    Err(Error::argument("groups", format!("{} groups", groups.len()), format!("1 to {GROUPS}")))
}

/// Tiles name their entries with int32, and no entry has a tile without the list of tiles saying so.
fn check_counts(count: usize, tile_count: usize) -> Result<()> {
    if count > i32::MAX as usize {
        return Err(Error::argument("count", count, "at most 2^31 - 1 tensors"));
    }
    if tile_count > 0 && count == 0 || tile_count > isize::MAX as usize / TILE {
        return Err(Error::argument("tile_count", tile_count, format!("the tiles of {count} tensors")));
    }
    Ok(())
}

fn check_trust(family: Family) -> Result<()> {
    if family.has_trust_ratio() {
        return Ok(());
    }
    Err(Error::argument("family", family.name(), "lamb or lars, which have a trust ratio"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_python_agree_with_the_layouts() {
        assert_eq!(size_of::<Group>(), 128);
        assert_eq!(std::mem::offset_of!(Group, flags), 13 * 8);
        assert_eq!(Field::Advance as usize, 12);
        assert!(Family::ALL.iter().enumerate().all(|(i, &family)| family as usize == i));
    }
}
