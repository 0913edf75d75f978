//! The cascade under a whole grid of settings: thresholds × γ × level.
//!
//! What is shared: with one checkpoint, risks are sorted once and a setting is a binary search. With more, the tokens
//! go by in tiles that stay in the cache; the divisions are done once for each distinct threshold and level, so a
//! setting is multiply and add; and settings are visited in an order where neighbours agree on their first checkpoints,
//! whose margins are kept. In a full grid little more than one checkpoint is left to do for each setting.

use std::ops::Range;

use ndarray::{ArrayView2, Axis};
use pulp::{Arch, Scalar, Simd, WithSimd};
use rayon::prelude::*;

use crate::accumulator::{Risk, Rule, gain, load, usable};
use crate::error::{Error, check_shape};

const LANES: usize = 16;
/// Tokens in a tile, and how many gains the tiles of all distinct thresholds may hold before tiles get smaller.
const TILE: Range<usize> = 256..1024;
const GAINS: usize = 1 << 17;
/// Settings and tokens of one parallel task. Fixed, so that sums are added in one order on any machine.
const SETTINGS: usize = 4096;
const TOKENS: usize = 1 << 16;

/// The settings of a sweep: every combination of a row of thresholds, a γ and a level.
#[derive(Debug, Clone)]
pub struct Grid {
    rows: usize,
    checkpoints: usize,
    thresholds: Vec<f32>, // [rows, checkpoints]
    weights: Vec<f32>,    // [checkpoints]
    gammas: Vec<f32>,
    levels: Vec<f32>,
}

/// What became of the tokens, by setting, in the order rows × γ × level.
#[derive(Debug, Clone, PartialEq)]
pub struct Swept {
    /// Tokens that exit at each checkpoint, `[settings, checkpoints]`.
    pub exits: Vec<u64>,
    /// Sum of the target over the exits, `[settings]`.
    pub target: Vec<f64>,
}

impl Grid {
    /// Thresholds `[rows, checkpoints]`; each setting must be a [`Rule`].
    ///
    /// # Errors
    /// What [`Rule::new`] refuses.
    pub fn new(
        thresholds: ArrayView2<'_, f32>,
        weights: Vec<f32>,
        gammas: Vec<f32>,
        levels: Vec<f32>,
    ) -> Result<Self, Error> {
        let (rows, checkpoints) = thresholds.dim();
        check_shape("weights", &[weights.len()], &[checkpoints])?;
        let rule = |thresholds, gamma, level| Rule::new(thresholds, weights.clone(), gamma, level).map(drop);
        thresholds.rows().into_iter().try_for_each(|row| rule(row.to_vec(), 0.0, 0.5))?;
        gammas.iter().try_for_each(|&gamma| rule(vec![1.0; checkpoints], gamma, 0.5))?;
        levels.iter().try_for_each(|&level| rule(vec![1.0; checkpoints], 0.0, level))?;
        Ok(Self { rows, checkpoints, thresholds: thresholds.iter().copied().collect(), weights, gammas, levels })
    }

    /// Rows of thresholds, γs and levels.
    #[must_use]
    pub fn dim(&self) -> [usize; 3] {
        [self.rows, self.gammas.len(), self.levels.len()]
    }

    fn setting(&self, index: usize) -> Setting {
        let [_, gammas, levels] = self.dim();
        Setting { index, row: index / (gammas * levels), gamma: index / levels % gammas, level: index % levels }
    }

    fn threshold(&self, setting: &Setting, checkpoint: usize) -> f32 {
        self.thresholds[setting.row * self.checkpoints + checkpoint]
    }

    /// Thresholds as numbers that sort like them.
    fn key(&self, setting: &Setting) -> (usize, u32, usize, &[f32]) {
        let row = &self.thresholds[setting.row * self.checkpoints..][..self.checkpoints];
        (setting.level, row[0].to_bits(), setting.gamma, &row[1..])
    }
}

#[derive(Debug, Clone, Copy)]
struct Setting {
    index: usize,
    row: usize,
    gamma: usize,
    level: usize,
}

/// A setting as the tiles need it: where its gains lie, and from which checkpoint on it differs from the one before.
struct Visit {
    index: usize,
    level: usize,
    gamma: f32,
    from: usize,
    gains: Vec<usize>, // [checkpoints], rows of the table of gains
}

/// Run every setting over `risks [checkpoints, tokens]`; `target`, of the same shape, is what exits are to be summed by
/// (the entropy or the damage at the checkpoint where a token exits).
///
/// # Errors
/// [`Error::Shape`] if grid, risks and target do not fit.
pub fn sweep<R: Risk>(
    grid: &Grid,
    risks: ArrayView2<'_, R>,
    target: Option<ArrayView2<'_, f32>>,
) -> Result<Swept, Error> {
    let (checkpoints, tokens) = risks.dim();
    check_shape("thresholds' rows", &[grid.checkpoints], &[checkpoints])?;
    if let Some(target) = &target {
        check_shape("target", target.shape(), &[checkpoints, tokens])?;
    }
    let settings = grid.dim().iter().product();
    if checkpoints == 0 {
        return Ok(Swept { exits: vec![], target: vec![0.0; settings] });
    }
    if checkpoints == 1 {
        return Ok(sweep_sorted(grid, risks, target, settings));
    }
    let mut order: Vec<Setting> = (0..settings).map(|index| grid.setting(index)).collect();
    order.sort_by(|a, b| grid.key(a).partial_cmp(&grid.key(b)).unwrap_or(std::cmp::Ordering::Equal));

    let mut swept = Swept { exits: vec![0; settings * checkpoints], target: vec![0.0; settings] };
    let chunks: Vec<Totals> = order
        .par_chunks(SETTINGS)
        .map(|chunk| {
            let plan = Plan::new(grid, chunk);
            let parts: Vec<Totals> = (0..tokens.div_ceil(TOKENS))
                .into_par_iter()
                .map(|part| {
                    let span = part * TOKENS..((part + 1) * TOKENS).min(tokens);
                    let risks = risks.slice_axis(Axis(1), span.clone().into());
                    let target = target.map(|target| target.slice_axis_move(Axis(1), span.into()));
                    Arch::new().dispatch(Part { plan: &plan, risks, target })
                })
                .collect();
            parts.into_iter().fold(Totals::new(chunk.len(), checkpoints), Totals::add)
        })
        .collect();
    for (chunk, totals) in order.chunks(SETTINGS).zip(chunks) {
        for (i, setting) in chunk.iter().enumerate() {
            let from = &totals.exits[i * checkpoints..][..checkpoints];
            swept.exits[setting.index * checkpoints..][..checkpoints].copy_from_slice(from);
            swept.target[setting.index] = totals.target[i];
        }
    }
    Ok(swept)
}

/// One checkpoint: a margin falls as the risk rises, so the exits are the first of the sorted risks.
fn sweep_sorted<R: Risk>(
    grid: &Grid,
    risks: ArrayView2<'_, R>,
    target: Option<ArrayView2<'_, f32>>,
    settings: usize,
) -> Swept {
    let value = |token| target.map_or(0.0, |target| target[[0, token]]);
    let tokens = risks.row(0).into_iter().map(|risk| risk.to_f32() + 0.0).enumerate(); // -0 becomes 0
    let mut sorted: Vec<(f32, f32)> = tokens.filter(|&(_, r)| usable(r)).map(|(token, r)| (r, value(token))).collect();
    sorted.par_sort_unstable_by_key(|&(risk, target)| (risk.to_bits(), target.to_bits()));
    let mut sums = vec![0.0];
    sums.extend(sorted.iter().scan(0.0, |sum, &(_, target)| {
        *sum += f64::from(target);
        Some(*sum)
    }));
    let exits = |index| {
        let setting = grid.setting(index);
        let (threshold, level) = (grid.threshold(&setting, 0), grid.levels[setting.level]);
        sorted.partition_point(|&(risk, _)| grid.weights[0] * gain(Scalar, risk, threshold, level) > 0.0)
    };
    let exits: Vec<usize> = (0..settings).into_par_iter().map(exits).collect();
    Swept { target: exits.iter().map(|&n| sums[n]).collect(), exits: exits.iter().map(|&n| n as u64).collect() }
}

/// Exits and sums of a chunk of settings.
struct Totals {
    exits: Vec<u64>,
    target: Vec<f64>,
}

impl Totals {
    fn new(settings: usize, checkpoints: usize) -> Self {
        Self { exits: vec![0; settings * checkpoints], target: vec![0.0; settings] }
    }

    fn add(mut self, other: Self) -> Self {
        self.exits.iter_mut().zip(other.exits).for_each(|(a, b)| *a += b);
        self.target.iter_mut().zip(other.target).for_each(|(a, b)| *a += b);
        self
    }
}

/// The order in which a chunk of settings is visited, tile by tile.
struct Plan<'a> {
    grid: &'a Grid,
    visits: Vec<Visit>,
    table: Vec<(usize, f32)>, // the distinct (checkpoint, threshold) pairs whose gains are kept
    tile: usize,
}

/// A plan's work on a run of tokens, compiled for each kind of vector unit that the machine may have.
struct Part<'a, R> {
    plan: &'a Plan<'a>,
    risks: ArrayView2<'a, R>,
    target: Option<ArrayView2<'a, f32>>,
}

impl<R: Risk> WithSimd for Part<'_, R> {
    type Output = Totals;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> Totals {
        self.plan.run(self.risks, self.target)
    }
}

impl<'a> Plan<'a> {
    fn new(grid: &'a Grid, chunk: &[Setting]) -> Self {
        let checkpoints = grid.checkpoints;
        let key = |setting: &Setting, i| (i, grid.threshold(setting, i).to_bits());
        let mut table: Vec<_> =
            chunk.iter().flat_map(|setting| (0..checkpoints).map(move |i| key(setting, i))).collect();
        table.sort_unstable();
        table.dedup();
        let mut visits: Vec<Visit> = Vec::with_capacity(chunk.len());
        for setting in chunk {
            let gamma = grid.gammas[setting.gamma];
            let gains: Vec<_> =
                (0..checkpoints).map(|i| table.partition_point(|entry| *entry < key(setting, i))).collect();
            let from = visits.last().filter(|before| before.level == setting.level).map_or(0, |before| {
                let agree = before.gains.iter().zip(&gains).take_while(|(a, b)| a == b).count();
                // γ plays no part at the first checkpoint
                if before.gamma.to_bits() == gamma.to_bits() { agree } else { agree.min(1) }
            });
            visits.push(Visit { index: visits.len(), level: setting.level, gamma, from, gains });
        }
        let tile = (GAINS / table.len().max(1)).clamp(TILE.start, TILE.end).next_multiple_of(LANES);
        let table = table.into_iter().map(|(i, bits)| (i, f32::from_bits(bits))).collect();
        Self { grid, visits, table, tile }
    }

    #[inline(always)]
    fn run<R: Risk>(&self, risks: ArrayView2<'_, R>, target: Option<ArrayView2<'_, f32>>) -> Totals {
        let Self { tile, grid, .. } = *self;
        let (checkpoints, tokens) = risks.dim();
        let mut totals = Totals::new(self.visits.len(), checkpoints);
        let mut risk = vec![0.0; checkpoints * tile];
        let mut value = vec![0.0; checkpoints * tile];
        let mut gains = vec![0.0; self.table.len() * tile];
        let mut margins = vec![0.0; (checkpoints + 1) * tile]; // before the first checkpoint, and after each
        let mut reached = vec![(0, 0.0); checkpoints]; // exits and their target at each checkpoint of this visit
        for start in (0..tokens).step_by(tile) {
            let span = start..(start + tile).min(tokens);
            for i in 0..checkpoints {
                let filled = i * tile..i * tile + span.len();
                let row = risks.index_axis(Axis(0), i).slice_axis_move(Axis(0), span.clone().into());
                risk[i * tile..(i + 1) * tile].fill(f32::NAN); // never exits: fills up the last tile
                risk[filled.clone()].copy_from_slice(load(row, &mut vec![]));
                if let Some(target) = &target {
                    let row = target.index_axis(Axis(0), i).slice_axis_move(Axis(0), span.clone().into());
                    value[filled].copy_from_slice(load(row, &mut vec![]));
                }
            }
            let mut level = None;
            for visit in &self.visits {
                if level != Some(visit.level) {
                    level = Some(visit.level);
                    for (gains, &(i, threshold)) in gains.chunks_exact_mut(tile).zip(&self.table) {
                        for (gained, &r) in gains.iter_mut().zip(&risk[i * tile..(i + 1) * tile]) {
                            *gained = gain(Scalar, r, threshold, grid.levels[visit.level]);
                        }
                    }
                }
                for i in visit.from..checkpoints {
                    let gains = &gains[visit.gains[i] * tile..][..tile];
                    let (before, after) = margins[i * tile..(i + 2) * tile].split_at_mut(tile);
                    reached[i] = step(visit.gamma, grid.weights[i], before, gains, &value[i * tile..][..tile], after);
                }
                let exits = &mut totals.exits[visit.index * checkpoints..][..checkpoints];
                exits.iter_mut().zip(&reached).for_each(|(exits, (more, _))| *exits += u64::from(*more));
                totals.target[visit.index] += reached.iter().map(|(_, sum)| f64::from(*sum)).sum::<f64>();
            }
        }
        totals
    }
}

/// One checkpoint over a tile. A token that has exited is marked by a margin of minus infinity, which no later gain
/// makes positive (γ = 0 makes it NaN, which is not positive either).
#[inline(always)]
fn step(gamma: f32, weight: f32, before: &[f32], gains: &[f32], target: &[f32], after: &mut [f32]) -> (u32, f32) {
    let (mut exits, mut sum) = ([0_u32; LANES], [0.0_f32; LANES]);
    let runs = |values| <[f32]>::as_chunks::<LANES>(values).0.iter();
    let tile = runs(before).zip(runs(gains)).zip(runs(target));
    for (((before, gains), target), after) in tile.zip(after.as_chunks_mut::<LANES>().0) {
        for lane in 0..LANES {
            let margin = gamma * before[lane] + weight * gains[lane];
            let (exit, value) = (margin > 0.0, target[lane]);
            exits[lane] += u32::from(exit);
            sum[lane] += if exit { value } else { 0.0 };
            after[lane] = if exit { f32::NEG_INFINITY } else { margin };
        }
    }
    (exits.iter().sum(), sum.iter().sum())
}
