//! The optimizer's table of tensors, read and checked.

use crate::optim::{BLOCK, Bits, Family, Field, Group, Step, TILE};
use crate::{Error, Result};

/// One state of one entry.
#[derive(Debug, Clone, Copy, Default)]
pub struct State {
    /// Of float32, or of codes.
    pub address: u64,
    /// Of the scales of its blocks, for codes.
    pub absmax: u64,
    /// Whether its codes are those of the signed map.
    pub signed: bool,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub p: u64,
    pub gradient: u64,
    /// The states in the order of the update rules; absent ones have address 0.
    pub states: [State; 3],
    pub n: usize,
    pub first_tile: usize,
    pub group: usize,
    pub ordinal: u32,
    pub first: u64,
    /// Steps with this one.
    pub t: i64,
    /// Which entry this is.
    pub index: usize,
}

impl Entry {
    /// Elements `start..end` that tile `tile` covers.
    pub fn range(&self, tile: usize) -> (usize, usize) {
        let start = (tile - self.first_tile) * TILE;
        (start, (start + TILE).min(self.n))
    }
}

/// A row's integers.
///
/// # Safety
/// The table at `tensors` has more than `index` rows.
pub unsafe fn row(tensors: u64, index: usize) -> [i64; crate::optim::FIELDS] {
    // SAFETY: the caller's promise; any alignment will do.
    unsafe { (tensors as *const [i64; crate::optim::FIELDS]).add(index).read_unaligned() }
}

/// The table of a step whose rows fit together.
pub struct Table<'a> {
    pub step: &'a Step<'a>,
}

impl<'a> Table<'a> {
    /// Checks all rows and tiles.
    ///
    /// # Safety
    /// As of [`crate::optim::step`].
    pub unsafe fn new(step: &'a Step<'a>, reads_states: bool) -> Result<Self> {
        let table = Self { step };
        for index in 0..step.count {
            // SAFETY: the caller's promise.
            unsafe { table.check_row(index, reads_states)? };
        }
        for tile in 0..step.tile_count {
            // SAFETY: there are `tile_count` tiles, and `count` rows.
            let fits = unsafe {
                let entry = (step.tiles as *const i32).add(tile).read_unaligned();
                usize::try_from(entry).is_ok_and(|entry| {
                    entry < step.count && {
                        let row = row(step.tensors, entry);
                        let (n, first) = (row[Field::N as usize] as usize, row[Field::FirstTile as usize] as usize);
                        tile.checked_sub(first).is_some_and(|own| own < n.div_ceil(TILE))
                    }
                })
            };
            if !fits {
                return Err(Error::argument("tiles", format!("a wrong entry at {tile}"), "the tensor of each tile"));
            }
        }
        Ok(table)
    }

    /// # Safety
    /// As of [`crate::optim::step`]; `index` is below the count.
    unsafe fn check_row(&self, index: usize, reads_states: bool) -> Result<()> {
        let fail =
            |what: &str, expected: &str| Err(Error::argument("tensors", format!("{what} of entry {index}"), expected));
        // SAFETY: the caller's promise.
        let row = unsafe { row(self.step.tensors, index) };
        let field = |field: Field| row[field as usize];
        if field(Field::N) < 0 || field(Field::N) > isize::MAX as i64 / 8 {
            return fail("n", "a tensor that fits the address space");
        }
        if !usize::try_from(field(Field::Group)).is_ok_and(|group| group < self.step.groups.len()) {
            return fail("group", "an index into the groups");
        }
        if field(Field::FirstTile) < 0 {
            return fail("first_tile", "a place in the list of tiles");
        }
        if field(Field::Step) == 0 {
            return fail("step", "the address of a counter");
        }
        if field(Field::N) == 0 {
            return Ok(());
        }
        // SAFETY: the row is checked as far as reading it goes.
        let entry = unsafe { self.entry(index) };
        if entry.p == 0 || entry.gradient == 0 {
            return fail("p or gradient", "the address of a tensor");
        }
        let apart = |address: u64, size: usize| !address.is_multiple_of(size as u64);
        if apart(entry.p, self.step.parameters.size()) || apart(entry.gradient, self.step.gradients_dtype.size()) {
            return fail("p or gradient", "an address that its elements divide");
        }
        let wanted = self.step.family.states(self.group(&entry));
        let missing = |state: &State| match self.step.bits {
            Bits::Eight => state.address == 0 || state.absmax == 0,
            Bits::ThirtyTwo => state.address == 0 || apart(state.address, 4),
        };
        if reads_states && entry.states.iter().zip(wanted).any(|(state, wanted)| wanted && missing(state)) {
            return fail("state or absmax", "the address of a state of its family");
        }
        Ok(())
    }

    pub fn group(&self, entry: &Entry) -> &'a Group {
        &self.step.groups[entry.group]
    }

    /// The entry of a tile.
    ///
    /// # Safety
    /// There is such a tile; the table has been checked.
    pub unsafe fn of_tile(&self, tile: usize) -> Entry {
        // SAFETY: the caller's promise.
        unsafe { self.entry((self.step.tiles as *const i32).add(tile).read_unaligned() as usize) }
    }

    /// # Safety
    /// There is such an entry; its counter has an address.
    pub unsafe fn entry(&self, index: usize) -> Entry {
        // SAFETY: the caller's promise.
        let (row, gradient, steps) = unsafe {
            let row = row(self.step.tensors, index);
            let gradient = (self.step.gradients as *const u64).add(index).read_unaligned();
            (row, gradient, (row[Field::Step as usize] as *const i64).read_unaligned())
        };
        let address = |field: Field| row[field as usize] as u64;
        let n = row[Field::N as usize] as usize;
        let first = State { address: address(Field::State1), absmax: address(Field::Absmax1), signed: true };
        let second = State { address: address(Field::State2), absmax: address(Field::Absmax2), signed: false };
        let third = State { address: address(Field::State3), ..State::default() };
        let size = if self.step.bits == Bits::Eight { 1 } else { 4 };
        let states = match self.step.family {
            Family::Ademamix => {
                let slow = State {
                    address: first.address.wrapping_add(n as u64 * size),
                    absmax: first.absmax.wrapping_add(n.div_ceil(BLOCK) as u64 * 4),
                    signed: true,
                };
                [first, slow, second]
            }
            _ => [first, second, third],
        };
        let mut entry = Entry {
            p: address(Field::P),
            gradient,
            states,
            n,
            first_tile: row[Field::FirstTile as usize] as usize,
            group: row[Field::Group as usize] as usize,
            ordinal: row[Field::Ordinal as usize] as u32,
            first: row[Field::First as usize] as u64,
            t: steps.wrapping_add(1),
            index,
        };
        let wanted = self.step.family.states(self.group(&entry));
        for (state, wanted) in entry.states.iter_mut().zip(wanted) {
            if !wanted {
                *state = State::default();
            }
        }
        entry
    }
}
