//! A streaming histogram of risks: bounded memory, mergeable, quantiles with a stated error.
//!
//! Bins are spaced logarithmically by octave and evenly inside one, so a bin's number is the upper bits of the float
//! itself: no logarithm, one shift for each risk. Between 2⁻²⁴ and 2²⁴ every bin is at most 2⁻⁷ of its lower edge wide.

use crate::accumulator::usable;

/// Bits of the mantissa that number the bins of an octave.
const FINE_BITS: u32 = 7;
const FINE: usize = 1 << FINE_BITS;
/// Binary exponents covered: risks below the first count as the smallest bin, from the last on as the largest.
const LOWEST: i32 = -24;
const OCTAVES: usize = 48;
const SHIFT: u32 = f32::MANTISSA_DIGITS - 1 - FINE_BITS;
const FIRST: u32 = ((LOWEST + 127) as u32) << FINE_BITS;

/// How far [`RiskHistogram::quantile`] can be from the exact order statistic, relative to it, for risks in the range.
pub const RELATIVE_ERROR: f32 = 1.0 / FINE as f32;

/// Counts of risks in log-spaced bins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RiskHistogram {
    bins: Vec<u32>,    // [OCTAVES * FINE]
    octaves: Vec<u64>, // [OCTAVES], sums of the bins, so that a quantile reads 48 + 128 numbers and not 6,144
    total: u64,
    unreachable: u64,
    unusable: u64,
}

impl Default for RiskHistogram {
    fn default() -> Self {
        Self { bins: vec![0; OCTAVES * FINE], octaves: vec![0; OCTAVES], total: 0, unreachable: 0, unusable: 0 }
    }
}

impl RiskHistogram {
    /// Count risks. Infinite ones are part of the population (quantiles reach infinity there); NaN and negative ones
    /// are counted apart, and part of it too: they are tokens that no threshold lets exit.
    pub fn add(&mut self, risks: impl IntoIterator<Item = f32>) {
        for risk in risks {
            self.total += 1;
            if usable(risk) {
                let bin = ((risk.to_bits() & 0x7fff_ffff) >> SHIFT).saturating_sub(FIRST) as usize;
                let bin = bin.min(OCTAVES * FINE - 1);
                self.bins[bin] += 1;
                self.octaves[bin >> FINE_BITS] += 1;
            } else if risk == f32::INFINITY {
                self.unreachable += 1;
            } else {
                self.unusable += 1;
            }
        }
    }

    /// Add another histogram's counts: the same as having counted its risks here.
    pub fn merge(&mut self, other: &Self) {
        self.bins.iter_mut().zip(&other.bins).for_each(|(a, b)| *a += b);
        self.octaves.iter_mut().zip(&other.octaves).for_each(|(a, b)| *a += b);
        self.total += other.total;
        self.unreachable += other.unreachable;
        self.unusable += other.unusable;
    }

    /// Forget everything, keeping the memory.
    pub fn clear(&mut self) {
        self.bins.fill(0);
        self.octaves.fill(0);
        (self.total, self.unreachable, self.unusable) = (0, 0, 0);
    }

    /// How many risks were counted, unusable ones included.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many of them were NaN or negative.
    #[must_use]
    pub fn unusable(&self) -> u64 {
        self.unusable
    }

    /// The risk that a share of all counted risks lies under: within [`RELATIVE_ERROR`] of the exact order statistic.
    /// 0 for a share of 0, infinity where the share reaches risks that no threshold admits; None when empty.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<f32> {
        quantile(&[self], share)
    }
}

/// The quantile of several histograms together, without merging them.
pub(crate) fn quantile(parts: &[&RiskHistogram], share: f64) -> Option<f32> {
    let total: u64 = parts.iter().map(|part| part.total).sum();
    if total == 0 {
        return None;
    }
    let wanted = share * total as f64; // risks to lie under the answer
    if wanted <= 0.0 {
        return Some(0.0);
    }
    let mut below = 0.0;
    for octave in 0..OCTAVES {
        let here: u64 = parts.iter().map(|part| part.octaves[octave]).sum();
        if below + (here as f64) < wanted {
            below += here as f64;
            continue;
        }
        for bin in octave * FINE..(octave + 1) * FINE {
            let here = f64::from(parts.iter().map(|part| part.bins[bin]).sum::<u32>());
            if here > 0.0 && below + here >= wanted {
                let (low, high) = (edge(bin), edge(bin + 1));
                return Some(low + (high - low) * ((wanted - below) / here) as f32);
            }
            below += here;
        }
    }
    Some(f32::INFINITY)
}

/// The lower edge of a bin.
fn edge(bin: usize) -> f32 {
    if bin == 0 { 0.0 } else { f32::from_bits((bin as u32 + FIRST) << SHIFT) }
}
