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

/// Tokens that a thread takes at once: their risks, widened, stay in its cache.
const TASK: usize = 1 << 14;
/// Tasks that a thread takes at least: 131,072 tokens need 0.1 ms, and on a busy machine waiting for another thread may
/// take longer.
const TASKS: usize = 8;

/// An element type that risks may come in.
pub trait Risk: Copy + Send + Sync {
    /// The value as f32, exactly.
    fn to_f32(self) -> f32;

    /// A contiguous run as f32: itself where it is f32 already, else widened into `scratch`.
    fn widen<'a>(run: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.clear();
        scratch.extend(run.iter().map(|risk| risk.to_f32()));
        scratch
    }
}

impl Risk for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    fn widen<'a>(run: &'a [Self], _scratch: &'a mut Vec<f32>) -> &'a [f32] {
        run
    }
}

impl Risk for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    fn widen<'a>(run: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(run.len(), 0.0);
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

/// One checkpoint's risks as contiguous f32: themselves where they are, else in `scratch`.
pub(crate) fn load<'a, R: Risk>(row: ArrayView1<'a, R>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
    if let Some(run) = row.to_slice() {
        return R::widen(run, scratch);
    }
    scratch.clear();
    scratch.extend(row.iter().map(|risk| risk.to_f32()));
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

/// One checkpoint's evidence: confidence less the exit level, `-level` for a risk that is no number to trust. Written
/// once for vectors of any width; with [`pulp::Scalar`] they are plain numbers.
#[inline(always)]
pub(crate) fn gain<S: Simd>(simd: S, risk: S::f32s, threshold: f32, level: f32) -> S::f32s {
    let all = |value| simd.splat_f32s(value);
    let q = simd.div_f32s(risk, all(threshold));
    let m = simd.sub_f32s(all(1.0 - level), simd.mul_f32s(all(level), q));
    let m = simd.div_f32s(m, simd.add_f32s(all(1.0), q));
    let m = simd.select_f32s(simd.less_than_f32s(q, all(f32::INFINITY)), m, all(-level));
    simd.select_f32s(simd.greater_than_or_equal_f32s(risk, all(0.0)), m, all(-level))
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
    let Outcome { exit_checkpoint, confidence, width } = outcome;
    let parts = exit_checkpoint.par_chunks_mut(TASK).zip(confidence.par_chunks_mut(TASK)).enumerate();
    let part = |exit_checkpoint, confidence, width| Outcome { exit_checkpoint, confidence, width };
    Ok(if wide {
        let parts = parts.zip(width.par_chunks_mut(TASK)).with_min_len(TASKS);
        parts.map(|((i, (e, c)), w)| run((i, part(e, c, w)))).sum()
    } else {
        parts.with_min_len(TASKS).map(|(i, (e, c))| run((i, part(e, c, &mut [])))).sum()
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
    fn with_simd<S: Simd>(self, simd: S) -> u64 {
        if self.outcome.width.is_empty() { self.run::<S, false>(simd) } else { self.run::<S, true>(simd) }
    }
}

impl<R: Risk> Task<'_, R> {
    #[inline(always)]
    fn run<S: Simd, const SOFT: bool>(self, simd: S) -> u64 {
        let Self { rule, risks, outcome } = self;
        let mut scratch = vec![Vec::new(); rule.checkpoints()];
        let rows: Vec<&[f32]> =
            risks.rows().into_iter().zip(&mut scratch).map(|(row, scratch)| load(row, scratch)).collect();
        let (runs, rest): (Vec<_>, Vec<_>) = rows.iter().map(|row| S::as_simd_f32s(row)).unzip();
        let (exits, last_exits) = S::as_mut_simd_i32s(outcome.exit_checkpoint);
        let (confidence, last_confidence) = S::as_mut_simd_f32s(outcome.confidence);
        let (width, last_width) = S::as_mut_simd_f32s(outcome.width);
        for (at, (exit, confidence)) in exits.iter_mut().zip(confidence).enumerate() {
            let decided = decide::<S, SOFT>(simd, rule, runs.iter().map(|run: &&[S::f32s]| run[at]));
            (*exit, *confidence) = (decided.exit, decided.confidence);
            if SOFT {
                width[at] = decided.width;
            }
        }
        if !last_exits.is_empty() {
            let decided = decide::<S, SOFT>(simd, rule, rest.iter().map(|rest| simd.partial_load_f32s(rest)));
            simd.partial_store_i32s(last_exits, decided.exit);
            simd.partial_store_f32s(last_confidence, decided.confidence);
            simd.partial_store_f32s(last_width, decided.width);
        }
        let odd = |row: &&[f32]| row.iter().map(|&risk| u32::from(!usable(risk))).sum::<u32>();
        if SOFT { rows.iter().map(|row| u64::from(odd(row))).sum() } else { 0 }
    }
}

/// What [`Outcome`] holds, for as many tokens as a vector has lanes.
struct Decided<S: Simd> {
    exit: S::i32s,
    confidence: S::f32s,
    width: S::f32s,
}

/// The cascade for one vector of tokens, whose state stays in registers from one checkpoint to the next.
#[inline(always)]
fn decide<S: Simd, const SOFT: bool>(simd: S, rule: &Rule, risks: impl Iterator<Item = S::f32s>) -> Decided<S> {
    let &Rule { ref thresholds, ref weights, gamma, level } = rule;
    let all = |value| simd.splat_f32s(value);
    let (zero, one) = (all(0.0), all(1.0));
    let (mut margin, mut exit) = (zero, simd.splat_i32s(0));
    let (mut greatest, mut reached) = (0.0, zero); // S, the most that C can be: here, and where the token exited
    for ((risk, &threshold), &weight) in risks.zip(thresholds).zip(weights) {
        greatest = gamma * greatest + weight;
        let more = simd.mul_f32s(all(weight), gain(simd, risk, threshold, level));
        let after = simd.add_f32s(simd.mul_f32s(all(gamma), margin), more);
        // A token that exits keeps its margin from then on, and a margin over 0 says that it has.
        let gone = simd.greater_than_f32s(margin, zero);
        margin = simd.select_f32s(gone, margin, after);
        reached = simd.select_f32s(gone, reached, all(greatest));
        let exits = simd.greater_than_f32s(margin, zero);
        // The exit is the first checkpoint not passed running.
        exit = simd.add_i32s(exit, simd.select_i32s(exits, simd.splat_i32s(0), simd.splat_i32s(1)));
    }
    let confidence = simd.add_f32s(margin, simd.mul_f32s(all(level), reached));
    let mut width = one;
    if SOFT {
        let shrunk = simd.sub_f32s(one, simd.div_f32s(margin, simd.mul_f32s(all(1.0 - level), reached)));
        let shrunk = simd.min_f32s(simd.max_f32s(shrunk, zero), one);
        width = simd.select_f32s(simd.greater_than_f32s(margin, zero), shrunk, one);
    }
    Decided { exit, confidence, width }
}
