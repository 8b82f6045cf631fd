//! How tiles are dealt out to persistent clusters of blocks (kernels/runs.cuh): whole ones first, then equal runs of what is left.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// kernels/runs.cuh's `Split`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Split {
    pub workspace: u64,
    pub token: u64,
    pub rounds: i32,
}

/// Microseconds on an H200 of a tile's slot, of a tile's end, and of leaving a part of a tile in memory and adding it to another.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    pub slot_us: f64,
    pub tile_us: f64,
    pub part_us: f64,
}

/// A problem's tiles: how many, and of how many slots along k.
#[derive(Debug, Clone, Copy)]
pub struct Tiles {
    pub count: usize,
    pub slots: usize,
}

/// `rounds` whole tiles for each cluster; what is left is cut into runs of equal length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Runs {
    pub clusters: usize,
    pub rounds: usize,
    /// Tiles that are left.
    rest: usize,
}

impl Runs {
    fn new(tiles: usize, clusters: usize, rounds: usize) -> Self {
        Self { clusters, rounds, rest: tiles.saturating_sub(rounds * clusters) }
    }

    /// The faster of whole tiles and runs, for `most` clusters. Without a workspace tiles stay whole.
    pub fn deal(tiles: Tiles, most: usize, cost: Cost, workspace: bool) -> Self {
        let (count, most) = (tiles.count, most.max(1));
        let whole = Self::new(count, most.min(count), count.div_ceil(most));
        if !workspace || count.is_multiple_of(most) {
            return whole;
        }
        // At least two slots a cluster.
        let rounds = (count / most).saturating_sub(1);
        let cut = Self::new(count, if rounds == 0 { most.min(count * tiles.slots / 2).max(1) } else { most }, rounds);
        if cut.microseconds(tiles, cost) < whole.microseconds(tiles, cost) { cut } else { whole }
    }

    /// Parts of a tile, less one, that is cut.
    fn parts(self) -> f64 {
        (self.clusters as f64 / self.rest as f64).max(1.0)
    }

    /// What it takes, without what comes before and after.
    pub fn microseconds(self, tiles: Tiles, cost: Cost) -> f64 {
        let slots = tiles.slots as f64;
        let whole = tiles.count.min(self.rounds * self.clusters).div_ceil(self.clusters) as f64;
        let run = self.rest as f64 * slots / self.clusters as f64;
        let ends = if self.rest > 0 { cost.tile_us + cost.part_us * self.parts() } else { 0.0 };
        whole * (cost.tile_us + slots * cost.slot_us) + run * cost.slot_us + ends
    }

    /// Bytes of the flags and of the sums of every block: of how many in a cluster, and how many of each.
    pub fn workspace_size(self, blocks: usize, sums: usize) -> usize {
        if self.rest == 0 { 0 } else { blocks * self.clusters * (64 + 4 * sums) }
    }

    /// What the kernel gets.
    pub fn split(self, workspace: u64) -> Split {
        Split { workspace, token: token(), rounds: self.rounds as i32 }
    }
}

/// What flags in a workspace hold once a launch has set them: for each launch another number, none of which memory holds by chance.
pub fn token() -> u64 {
    static NEXT: OnceLock<AtomicU64> = OnceLock::new();
    NEXT.get_or_init(|| AtomicU64::new(RandomState::new().build_hasher().finish())).fetch_add(1, Ordering::Relaxed)
}
