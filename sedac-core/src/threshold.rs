//! Thresholds that follow target exit rates while a server runs, published without locks.

use crate::error::{Error, check_shape, check_values};
use crate::histogram::{self, RiskHistogram};
use crate::sync::{Arc, AtomicU32, AtomicU64, Ordering, fence};

/// Sets that may be in the making at once before a writer has to wait for another.
const SLOTS: usize = if cfg!(loom) { 2 } else { 16 };

/// A set of thresholds that many threads read and write: a reader sees one whole set, never parts of two, and is never
/// held up by a writer that the scheduler has put to sleep half-way.
///
/// A ring of slots, each a seqlock. A writer takes the next ticket and with it a slot, makes the slot's version odd,
/// writes, makes the version the ticket's own, and only then moves `latest` on. A reader reads the slot of `latest` and
/// looks again whether the version stayed: it must retry only if the ring went all the way round meanwhile.
#[derive(Debug)]
pub struct Published {
    next: Line<AtomicU64>,
    latest: Line<AtomicU64>,
    slots: Vec<Slot>,
    len: usize,
}

/// A cache line of its own, so that no reader waits for what only writers touch.
#[derive(Debug)]
#[repr(align(64))]
struct Line<T>(T);

/// A cache line: a reader fetches version and values at once, unless there are more than ten.
#[derive(Debug)]
#[repr(align(64))]
struct Slot {
    version: AtomicU64, // 2 · ticket when whole, odd while it is written
    values: [AtomicU32; 10],
    more: Box<[AtomicU32]>,
}

impl Slot {
    fn values(&self) -> impl Iterator<Item = &AtomicU32> {
        self.values.iter().chain(&self.more)
    }
}

impl Published {
    /// Publish the first set.
    #[must_use]
    pub fn new(values: &[f32]) -> Self {
        let value = |i| AtomicU32::new(values.get(i).map_or(0, |value: &f32| value.to_bits()));
        let slot = |_| Slot {
            version: AtomicU64::new(0),
            values: std::array::from_fn(value),
            more: (10..values.len()).map(value).collect(),
        };
        let counter = || Line(AtomicU64::new(0));
        Self { next: counter(), latest: counter(), slots: (0..SLOTS).map(slot).collect(), len: values.len() }
    }

    /// How many thresholds a set has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether a set has no thresholds.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Publish another set; of sets published at the same time the one with the later ticket stays.
    ///
    /// # Panics
    /// If the set has another length than the first.
    pub fn store(&self, values: &[f32]) {
        assert_eq!(values.len(), self.len(), "one threshold for each checkpoint");
        loop {
            let ticket = self.next.0.fetch_add(1, Ordering::Relaxed) + 1;
            let slot = &self.slots[ticket as usize % SLOTS];
            let version = slot.version.load(Ordering::Relaxed);
            let free = version.is_multiple_of(2) && version < 2 * ticket;
            let taken = free
                && slot.version.compare_exchange(version, version + 1, Ordering::Acquire, Ordering::Relaxed).is_ok();
            if !taken {
                continue; // a writer sleeps in this slot: take the next one
            }
            fence(Ordering::Release); // a reader that sees one of our values sees the odd version too
            for (to, value) in slot.values().zip(values) {
                to.store(value.to_bits(), Ordering::Relaxed);
            }
            slot.version.store(2 * ticket, Ordering::Release);
            self.latest.0.fetch_max(ticket, Ordering::Release);
            return;
        }
    }

    /// Copy the set in force into `values`.
    ///
    /// # Panics
    /// If `values` has another length than a set.
    pub fn load(&self, values: &mut [f32]) {
        assert_eq!(values.len(), self.len(), "one threshold for each checkpoint");
        loop {
            let ticket = self.latest.0.load(Ordering::Acquire);
            let slot = &self.slots[ticket as usize % SLOTS];
            if slot.version.load(Ordering::Acquire) == 2 * ticket {
                for (value, from) in values.iter_mut().zip(slot.values()) {
                    *value = f32::from_bits(from.load(Ordering::Relaxed));
                }
                fence(Ordering::Acquire);
                if slot.version.load(Ordering::Relaxed) == 2 * ticket {
                    return;
                }
            }
            crate::sync::spin_loop();
        }
    }
}

/// Drives the thresholds towards target exit rates from the risks of the last tokens that reached each checkpoint.
///
/// Targets are cumulative, so among the tokens that *reach* checkpoint i, (rᵢ - rᵢ₋₁) / (1 - rᵢ₋₁) are to exit: the
/// threshold is that quantile of their critical thresholds (for γ = 0 and level 0.5 these are the risks themselves).
/// The population is all tokens of a long window, never one batch: a batch's own k-th smallest drifts.
#[derive(Debug)]
pub struct Controller {
    shares: Vec<f64>,
    alpha: f64,
    generation: u64,
    seen: Vec<Seen>,
    published: Arc<Published>,
}

/// A checkpoint's window: two generations, of which the older is dropped when the newer is full.
#[derive(Debug, Default)]
struct Seen {
    newer: RiskHistogram,
    older: RiskHistogram,
    tokens: u64,
    unusable: u64,
    started: bool, // whether a quantile has replaced the initial threshold
}

impl Controller {
    /// `exit_rates` cumulative by checkpoint, from 0 to 1 and never falling; `alpha` the newest quantile's weight in the
    /// moving average, over 0 and at most 1; quantiles look back on the last `window / 2` to `window` tokens.
    ///
    /// # Errors
    /// [`Error::Value`] or [`Error::Shape`], naming what is out of its domain.
    pub fn new(exit_rates: &[f32], alpha: f32, window: u64, initial: &[f32]) -> Result<Self, Error> {
        check_shape("initial_thresholds", &[initial.len()], &[exit_rates.len()])?;
        check_values("exit_rates", exit_rates, |r| (0.0..=1.0).contains(&r), "between 0 and 1")?;
        check_values("alpha", &[alpha], |a| a > 0.0 && a <= 1.0, "over 0 and at most 1")?;
        check_values("initial_thresholds", initial, |t| t >= 0.0, "from 0 to infinity")?;
        if let Some(pair) = exit_rates.windows(2).find(|pair| pair[0] > pair[1]) {
            return Err(Error::Value {
                what: "exit_rates",
                found: pair[1].into(),
                expected: "cumulative, never falling",
            });
        }
        if window == 0 {
            return Err(Error::Value { what: "window", found: 0.0, expected: "at least one token" });
        }
        let before = std::iter::once(0.0).chain(exit_rates.iter().copied());
        let share = |(&rate, before): (&f32, f32)| {
            let (rate, before) = (f64::from(rate), f64::from(before));
            if before < 1.0 { (rate - before) / (1.0 - before) } else { 1.0 }
        };
        Ok(Self {
            shares: exit_rates.iter().zip(before).map(share).collect(),
            alpha: f64::from(alpha),
            generation: window.div_ceil(2),
            seen: exit_rates.iter().map(|_| Seen::default()).collect(),
            published: Arc::new(Published::new(initial)),
        })
    }

    /// The thresholds as readers on other threads share them.
    #[must_use]
    pub fn published(&self) -> Arc<Published> {
        Arc::clone(&self.published)
    }

    /// Count the critical thresholds of the tokens that reached a checkpoint in this step.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such checkpoint.
    pub fn observe(&mut self, checkpoint: usize, critical: impl IntoIterator<Item = f32>) -> Result<(), Error> {
        let seen = self.seen_mut(checkpoint)?;
        let (tokens, unusable) = (seen.newer.total(), seen.newer.unusable());
        seen.newer.add(critical);
        seen.tokens += seen.newer.total() - tokens;
        seen.unusable += seen.newer.unusable() - unusable;
        if seen.newer.total() >= self.generation {
            let seen = &mut self.seen[checkpoint];
            std::mem::swap(&mut seen.newer, &mut seen.older);
            seen.newer.clear();
        }
        Ok(())
    }

    /// Once a forward step: move each threshold towards its quantile and publish the new set. The first quantile takes
    /// effect at once; later ones by `alpha`, in the logarithm, for risks span orders of magnitude.
    pub fn update(&mut self) {
        let mut thresholds = vec![0.0; self.seen.len()];
        self.published.load(&mut thresholds);
        for ((seen, threshold), &share) in self.seen.iter_mut().zip(&mut thresholds).zip(&self.shares) {
            let quantile = if share >= 1.0 && seen.tokens > 0 {
                Some(f32::INFINITY)
            } else {
                histogram::quantile(&[&seen.newer, &seen.older], share)
            };
            let Some(quantile) = quantile else { continue };
            let smooth = seen.started && [*threshold, quantile].iter().all(|t| *t > 0.0 && *t < f32::INFINITY);
            seen.started = true;
            *threshold = if smooth {
                let (old, new) = (f64::from(*threshold).ln(), f64::from(quantile).ln());
                (old + self.alpha * (new - old)).exp() as f32
            } else {
                quantile
            };
        }
        self.published.store(&thresholds);
    }

    /// How many tokens have reached a checkpoint, and how many of their risks were NaN or negative.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such checkpoint.
    pub fn tokens(&self, checkpoint: usize) -> Result<(u64, u64), Error> {
        let seen = self.seen.get(checkpoint).ok_or(no_checkpoint(checkpoint))?;
        Ok((seen.tokens, seen.unusable))
    }

    fn seen_mut(&mut self, checkpoint: usize) -> Result<&mut Seen, Error> {
        self.seen.get_mut(checkpoint).ok_or(no_checkpoint(checkpoint))
    }
}

fn no_checkpoint(checkpoint: usize) -> Error {
    Error::Value { what: "checkpoint", found: checkpoint as f64, expected: "one of the exit rates' indices" }
}
