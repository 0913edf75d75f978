//! The decision rule over a batch: one rule for V6.0 (γ = 0) and V6.1 (accumulated confidence).
//!
//! `python/sedac_core/cascade.py` is the readable twin and explains the formula; the operations here are the same ones
//! in the same order, so both agree bit for bit. Floats are never contracted or reordered by rustc.

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::{ArrayView1, ArrayView2, Axis};
use pulp::Arch;
use rayon::prelude::*;

use crate::error::{Error, check_shape, check_values};

/// Tokens handled at a time: their state stays in the first-level cache from one checkpoint to the next.
const BLOCK: usize = 1024;
/// Blocks a thread takes at once; below this many tokens a second thread costs more than it brings.
const BLOCKS_PER_TASK: usize = 16;

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
    if q >= 0.0 && q < f32::INFINITY { m } else { -level }
}

/// Whether a risk can let a token exit at all: not NaN, not negative, not infinite.
#[inline(always)]
pub(crate) fn usable(risk: f32) -> bool {
    risk >= 0.0 && risk < f32::INFINITY
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
    let task = BLOCK * BLOCKS_PER_TASK;
    let run = |(index, part): (usize, Outcome<'_>)| {
        let risks = risks.slice_axis(Axis(1), (index * task..index * task + part.exit_checkpoint.len()).into());
        arch.dispatch(|| evaluate_task(rule, risks, part))
    };
    if tokens <= task {
        return Ok(run((0, outcome)));
    }
    let Outcome { exit_checkpoint, confidence, width } = outcome;
    let parts = exit_checkpoint.par_chunks_mut(task).zip(confidence.par_chunks_mut(task)).enumerate();
    let part = |exit_checkpoint, confidence, width| Outcome { exit_checkpoint, confidence, width };
    Ok(if wide {
        parts.zip(width.par_chunks_mut(task)).map(|((i, (e, c)), w)| run((i, part(e, c, w)))).sum()
    } else {
        parts.map(|(i, (e, c))| run((i, part(e, c, &mut [])))).sum()
    })
}

#[inline(always)]
fn evaluate_task<R: Risk>(rule: &Rule, risks: ArrayView2<'_, R>, outcome: Outcome<'_>) -> u64 {
    let (mut scratch, mut margin) = ([0.0; BLOCK], [0.0; BLOCK]);
    let mut unusable = 0;
    let tokens = outcome.exit_checkpoint.len();
    for start in (0..tokens).step_by(BLOCK) {
        let span = start..(start + BLOCK).min(tokens);
        let exit_checkpoint = &mut outcome.exit_checkpoint[span.clone()];
        let confidence = &mut outcome.confidence[span.clone()];
        let margin = &mut margin[..span.len()];
        let none = i32::try_from(rule.checkpoints()).unwrap_or(i32::MAX);
        exit_checkpoint.fill(none);
        confidence.fill(0.0);
        margin.fill(0.0);
        let mut width = outcome.width.get_mut(span.clone()).filter(|width| !width.is_empty());
        if let Some(width) = width.as_deref_mut() {
            width.fill(1.0);
        }

        let mut greatest = 0.0; // S, the most that C can be
        for (i, (&threshold, &weight)) in (0..).zip(rule.thresholds.iter().zip(&rule.weights)) {
            let Rule { gamma, level, .. } = *rule;
            greatest = gamma * greatest + weight;
            let row = risks.index_axis(Axis(0), i as usize).slice_axis_move(Axis(0), span.clone().into());
            let risk = load(row, &mut scratch[..span.len()]);
            if let Some(width) = width.as_deref_mut() {
                unusable += risk.iter().map(|&r| u64::from(!usable(r))).sum::<u64>();
                let full = (1.0 - level) * greatest;
                for ((((w, &r), &m), &e), _) in
                    width.iter_mut().zip(risk).zip(&*margin).zip(&*exit_checkpoint).zip(0..BLOCK)
                {
                    let m = gamma * m + weight * gain(r, threshold, level);
                    *w = if e == none && m > 0.0 { (1.0 - m / full).clamp(0.0, 1.0) } else { *w };
                }
            }
            for (((m, &r), e), c) in margin.iter_mut().zip(risk).zip(&mut *exit_checkpoint).zip(&mut *confidence) {
                *m = gamma * *m + weight * gain(r, threshold, level);
                let running = *e == none;
                *c = if running { *m + level * greatest } else { *c };
                *e = if running && *m > 0.0 { i } else { *e };
            }
        }
    }
    unusable
}
