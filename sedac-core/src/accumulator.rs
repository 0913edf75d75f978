//! The decision rule over a batch: one rule for V6.0 (γ = 0) and V6.1 (accumulated confidence).
//!
//! `python/sedac_core/cascade.py` is the readable twin and explains the formula; the operations here are the same ones
//! in the same order, so both agree bit for bit. Floats are never contracted or reordered by rustc.

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::{ArrayView1, ArrayView2, Axis};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::error::{Error, check_shape, check_values};

/// Tokens handled at a time: their state stays in the cache from one checkpoint to the next.
const BLOCK: usize = 4096;
/// The same for a decode step, where clearing a full block's state would cost more than the decisions.
const SMALL: usize = 64;
/// Tokens that a thread takes at once.
const TASK: usize = 1 << 14;
/// Up to here one thread takes them all: it needs 0.3 ms, and on a busy machine waiting for a second may take longer.
const PARALLEL_FROM: usize = 1 << 17;

/// An element type that risks may come in.
pub trait Risk: Copy + Send + Sync {
    /// The value as f32, exactly.
    fn to_f32(self) -> f32;

    /// A contiguous run as f32: itself where it is f32 already, else widened into `scratch` of the same length.
    fn widen<'a>(run: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        for (to, from) in scratch.iter_mut().zip(run) {
            *to = from.to_f32();
        }
        scratch
    }
}

impl Risk for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    fn widen<'a>(run: &'a [Self], _scratch: &'a mut [f32]) -> &'a [f32] {
        run
    }
}

impl Risk for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    fn widen<'a>(run: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        run.convert_to_f32_slice(scratch); // uses F16C where the processor has it
        scratch
    }
}

/// The bits of a bfloat16, for which NumPy has no type: `tensor.view(torch.uint16).numpy()`.
impl Risk for u16 {
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// A block of one checkpoint's risks as contiguous f32.
pub(crate) fn load<'a, R: Risk>(row: ArrayView1<'a, R>, scratch: &'a mut [f32]) -> &'a [f32] {
    if let Some(run) = row.to_slice() {
        return R::widen(run, scratch);
    }
    for (to, from) in scratch.iter_mut().zip(row) {
        *to = from.to_f32();
    }
    scratch
}

/// Settings of the cascade, validated: one threshold and one weight for each checkpoint.
#[derive(Debug, Clone)]
pub struct Rule {
    thresholds: Vec<f32>,
    weights: Vec<f32>,
    gamma: f32,
    level: f32,
}

impl Rule {
    /// Thresholds from 0 on (infinity exits all finite risks), weights positive, γ from 0 on, level between 0 and 1.
    ///
    /// # Errors
    /// [`Error::Value`] names the first number outside its domain, [`Error::Shape`] lists of different lengths.
    pub fn new(thresholds: Vec<f32>, weights: Vec<f32>, gamma: f32, level: f32) -> Result<Self, Error> {
        check_shape("weights", &[weights.len()], &[thresholds.len()])?;
        check_values("thresholds", &thresholds, |t| t >= 0.0, "from 0 to infinity")?;
        check_values("weights", &weights, |w| w > 0.0 && w < f32::INFINITY, "positive and finite")?;
        check_values("gamma", &[gamma], |g| (0.0..f32::INFINITY).contains(&g), "from 0 on and finite")?;
        check_values("level", &[level], |l| l > 0.0 && l < 1.0, "between 0 and 1")?;
        Ok(Self { thresholds, weights, gamma, level })
    }

    /// How many checkpoints the rule is for.
    #[must_use]
    pub fn checkpoints(&self) -> usize {
        self.thresholds.len()
    }
}

/// One checkpoint's evidence: confidence less the exit level, `-level` for a risk that is no number to trust.
#[inline(always)]
pub(crate) fn gain(risk: f32, threshold: f32, level: f32) -> f32 {
    let q = risk / threshold;
    let m = ((1.0 - level) - level * q) / (1.0 + q);
    if risk >= 0.0 && q < f32::INFINITY { m } else { -level }
}

/// Whether a risk can let a token exit at all: not NaN, not negative, not infinite.
#[inline(always)]
pub(crate) fn usable(risk: f32) -> bool {
    (0.0..f32::INFINITY).contains(&risk)
}

/// Where [`evaluate`] writes, one entry a token.
pub struct Outcome<'a> {
    /// Index of the checkpoint where it exits, the number of checkpoints if it never does.
    pub exit_checkpoint: &'a mut [i32],
    /// Accumulated confidence at its exit, or at the last checkpoint.
    pub confidence: &'a mut [f32],
    /// Share of an MLP that soft exit keeps (1 just at the exit level, 0 at full confidence), or empty if not wanted.
    pub width: &'a mut [f32],
}

/// Decide for each token of `risks [checkpoints, tokens]`; returns how many risks were NaN, negative or infinite, a
/// number that is only counted when widths are wanted.
///
/// Contiguous and strided input alike; large batches run on all threads of rayon's pool.
///
/// ```
/// # use sedac_core::accumulator::{Outcome, Rule, evaluate};
/// let rule = Rule::new(vec![0.8, 1.3], vec![1.0, 1.0], 0.0, 0.5)?;
/// let risks = ndarray::array![[0.5_f32, 1.0, f32::NAN], [2.0, 1.0, 1.5]];
/// let (mut exit_checkpoint, mut confidence) = ([0; 3], [0.0; 3]);
/// let outcome = Outcome { exit_checkpoint: &mut exit_checkpoint, confidence: &mut confidence, width: &mut [] };
/// evaluate(&rule, risks.view(), outcome)?;
/// assert_eq!(exit_checkpoint, [0, 1, 2]);
/// # Ok::<(), sedac_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] if the rule or an output does not fit the risks.
pub fn evaluate<R: Risk>(rule: &Rule, risks: ArrayView2<'_, R>, outcome: Outcome<'_>) -> Result<u64, Error> {
    let (checkpoints, tokens) = risks.dim();
    check_shape("thresholds", &[rule.checkpoints()], &[checkpoints])?;
    check_shape("exit_checkpoint", &[outcome.exit_checkpoint.len()], &[tokens])?;
    check_shape("confidence", &[outcome.confidence.len()], &[tokens])?;
    let wide = !outcome.width.is_empty();
    if wide {
        check_shape("width", &[outcome.width.len()], &[tokens])?;
    }
    let arch = Arch::new();
    let run = |(index, part): (usize, Outcome<'_>)| {
        let risks = risks.slice_axis(Axis(1), (index * TASK..index * TASK + part.exit_checkpoint.len()).into());
        arch.dispatch(Task { rule, risks, outcome: part })
    };
    if tokens < PARALLEL_FROM {
        return Ok(run((0, outcome)));
    }
    let Outcome { exit_checkpoint, confidence, width } = outcome;
    let parts = exit_checkpoint.par_chunks_mut(TASK).zip(confidence.par_chunks_mut(TASK)).enumerate();
    let part = |exit_checkpoint, confidence, width| Outcome { exit_checkpoint, confidence, width };
    Ok(if wide {
        parts.zip(width.par_chunks_mut(TASK)).map(|((i, (e, c)), w)| run((i, part(e, c, w)))).sum()
    } else {
        parts.map(|(i, (e, c))| run((i, part(e, c, &mut [])))).sum()
    })
}

/// A run of tokens for one thread, compiled for each kind of vector unit that the machine may have.
struct Task<'a, R> {
    rule: &'a Rule,
    risks: ArrayView2<'a, R>,
    outcome: Outcome<'a>,
}

impl<R: Risk> WithSimd for Task<'_, R> {
    type Output = u64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> u64 {
        let soft = !self.outcome.width.is_empty();
        match (soft, self.outcome.exit_checkpoint.len() <= SMALL) {
            (false, false) => self.run::<false, BLOCK>(),
            (false, true) => self.run::<false, SMALL>(),
            (true, false) => self.run::<true, BLOCK>(),
            (true, true) => self.run::<true, SMALL>(),
        }
    }
}

impl<R: Risk> Task<'_, R> {
    #[inline(always)]
    fn run<const SOFT: bool, const BLOCK: usize>(self) -> u64 {
        let Self { rule: &Rule { ref thresholds, ref weights, gamma, level }, risks, outcome } = self;
        let greatest = weights.iter().scan(0.0, |greatest, &weight| {
            *greatest = gamma * *greatest + weight;
            Some(*greatest)
        });
        let mut greatest: Vec<f32> = greatest.collect(); // S, the most that C can be, by checkpoint
        greatest.push(greatest.last().copied().unwrap_or(0.0)); // and for tokens that never exit
        let (mut scratch, mut margins) = ([0.0; BLOCK], [0.0; BLOCK]);
        let mut unusable = 0;
        let tokens = outcome.exit_checkpoint.len();
        for start in (0..tokens).step_by(BLOCK) {
            let span = start..(start + BLOCK).min(tokens);
            let margins = &mut margins[..span.len()];
            let exits = &mut outcome.exit_checkpoint[span.clone()];
            margins.fill(0.0);
            exits.fill(0);
            for (i, (&threshold, &weight)) in thresholds.iter().zip(weights).enumerate() {
                let row = risks.index_axis(Axis(0), i).slice_axis_move(Axis(0), span.clone().into());
                let risk = load(row, &mut scratch[..span.len()]);
                for ((margin, &r), exit) in margins.iter_mut().zip(risk).zip(&mut *exits) {
                    // A token that exits keeps its margin from then on, and a margin over 0 says that it has.
                    let after = gamma * *margin + weight * gain(r, threshold, level);
                    *margin = if *margin > 0.0 { *margin } else { after };
                    *exit += i32::from(!(*margin > 0.0)); // the exit is the first checkpoint not passed running
                }
                if SOFT {
                    unusable += risk.iter().map(|&r| u32::from(!usable(r))).sum::<u32>();
                }
            }
            for ((confidence, &margin), &exit) in
                outcome.confidence[span.clone()].iter_mut().zip(&*margins).zip(&*exits)
            {
                *confidence = margin + level * greatest[exit as usize];
            }
            if SOFT {
                for ((width, &margin), &exit) in outcome.width[span].iter_mut().zip(&*margins).zip(&*exits) {
                    let shrunk = (1.0 - margin / ((1.0 - level) * greatest[exit as usize])).clamp(0.0, 1.0);
                    *width = if margin > 0.0 { shrunk } else { 1.0 };
                }
            }
        }
        u64::from(unusable)
    }
}
