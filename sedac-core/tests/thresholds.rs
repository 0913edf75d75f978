//! Streaming quantiles, the controller, the lock-free publication and the certificate.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use sedac_core::certify::{certify, p_value};
use sedac_core::histogram::{RELATIVE_ERROR, RiskHistogram};
use sedac_core::threshold::{Controller, Published};

/// A small generator, so that the tests need no crate for it.
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as f64 + 0.5) / f64::from(1_u32 << 31)
    }

    fn risk(&mut self) -> f32 {
        (-self.uniform().ln() * (-self.uniform().ln()).sqrt()) as f32
    }
}

fn counted(risks: &[f32]) -> RiskHistogram {
    let mut histogram = RiskHistogram::default();
    histogram.add(risks.iter().copied());
    histogram
}

proptest! {
    #[test]
    fn a_quantile_lies_within_the_stated_error_of_the_exact_one(
        exponents in prop::collection::vec(-20.0_f32..20.0, 1..300), share in 0.001_f64..1.0
    ) {
        let mut risks: Vec<f32> = exponents.iter().map(|e| e.exp2()).collect();
        let found = counted(&risks).quantile(share).unwrap();
        risks.sort_by(f32::total_cmp);
        let exact = risks[((share * risks.len() as f64).ceil() as usize).clamp(1, risks.len()) - 1];
        prop_assert!((found - exact).abs() <= RELATIVE_ERROR * exact, "{found} for {exact}");
    }

    #[test]
    fn merging_is_the_same_as_counting_together(a in prop::collection::vec(any::<f32>(), 0..50), b in prop::collection::vec(any::<f32>(), 0..50)) {
        let mut merged = counted(&a);
        merged.merge(&counted(&b));
        prop_assert_eq!(merged, counted(&[a, b].concat()));
    }
}

#[test]
fn risks_that_no_threshold_admits_are_counted_and_lie_over_every_quantile() {
    let histogram = counted(&[0.5, f32::NAN, -1.0, f32::INFINITY]);
    assert_eq!((histogram.total(), histogram.unusable()), (4, 2));
    assert!((histogram.quantile(0.25).unwrap() - 0.5).abs() < 0.01);
    assert_eq!(histogram.quantile(0.5), Some(f32::INFINITY));
    assert_eq!(histogram.quantile(0.0), Some(0.0));
    assert_eq!(RiskHistogram::default().quantile(0.5), None);
}

#[test]
fn the_controller_holds_cumulative_rates_over_ten_thousand_shuffled_batches_without_drift() {
    let mut noise = Noise(7);
    let targets = [0.2_f32, 0.6, 0.9];
    let mut controller = Controller::new(&targets, 0.2, 8192, &[0.8, 1.3, 1.7]).unwrap();
    let published = controller.published();
    let (mut exits, mut tokens, mut first_half) = ([0.0; 3], 0.0, [0.0; 3]);
    for step in 0..10_000 {
        let mut thresholds = [0.0; 3];
        published.load(&mut thresholds);
        for _ in 0..=(noise.uniform() * 8.0) as usize {
            let difficulty = noise.risk();
            let mut running = true;
            for i in 0..3 {
                let risk = difficulty * (0.5 + noise.uniform() as f32);
                if running {
                    controller.observe(i, [risk]).unwrap();
                    running = !(risk < thresholds[i]);
                }
                exits[i] += f64::from(u8::from(!running));
            }
            tokens += 1.0;
        }
        controller.update();
        if step == 4_999 {
            first_half = exits.map(|exits| exits / tokens);
            (exits, tokens) = ([0.0; 3], 0.0);
        }
    }
    for i in 0..3 {
        let second_half = exits[i] / tokens;
        assert!((second_half - f64::from(targets[i])).abs() < 0.02, "checkpoint {i}: {second_half}");
        assert!((second_half - first_half[i]).abs() < 0.02, "checkpoint {i} drifts from {}", first_half[i]);
    }
}

#[test]
fn rates_of_nothing_and_of_everything_give_thresholds_of_zero_and_infinity() {
    let mut controller = Controller::new(&[0.0, 0.5, 1.0], 0.5, 10, &[1.0; 3]).unwrap();
    for i in 0..3 {
        controller.observe(i, [0.5, 1.0, 2.0, f32::NAN]).unwrap();
    }
    controller.update();
    let mut thresholds = [9.0; 3];
    controller.published().load(&mut thresholds);
    assert_eq!((thresholds[0], thresholds[2]), (0.0, f32::INFINITY));
    assert!((thresholds[1] - 1.0).abs() < 0.02, "{thresholds:?}");
    assert_eq!(controller.tokens(0), Ok((4, 1)));
    assert!(controller.observe(3, []).is_err());
    assert!(Controller::new(&[0.5, 0.4], 0.5, 10, &[1.0; 2]).is_err());
}

#[test]
fn eight_readers_never_see_a_half_updated_set_while_eight_writers_publish() {
    let published = Published::new(&[0.0; 12]);
    let writing = AtomicBool::new(true);
    let seen = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let (mut set, mut reads) = ([0.0; 12], 0_u64);
                    while writing.load(Ordering::Relaxed) || reads == 0 {
                        published.load(&mut set);
                        assert!(set.iter().all(|&value| value.to_bits() == set[0].to_bits()), "{set:?}");
                        reads += 1;
                    }
                    reads
                })
            })
            .collect();
        let writers: Vec<_> = (0_u16..8)
            .map(|writer| {
                let published = &published;
                scope.spawn(move || {
                    (0..5_000_u16).for_each(|n| published.store(&[f32::from(writer) * 1e4 + f32::from(n); 12]));
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        writing.store(false, Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).sum::<u64>()
    });
    assert!(seen >= 8);
    let mut last = [0.0; 12];
    published.load(&mut last);
    assert!((last[0] as u32 % 10_000) == 4_999, "the last ticket's set stays: {last:?}");
}

#[test]
fn a_certified_bound_is_broken_in_at_most_delta_of_two_thousand_draws() {
    let (tolerated, delta, samples) = (0.1, 0.1, 400_u32);
    let true_losses = [0.02, 0.05, 0.08, 0.101, 0.12, 0.3]; // the last three break the bound
    let mut noise = Noise(11);
    let (mut broken, mut useful) = (0, 0);
    for _ in 0..2_000 {
        let means = true_losses
            .map(|p| f64::from((0..samples).filter(|_| noise.uniform() < p).count() as u32) / f64::from(samples));
        let (chain, _) = certify(&means, 6, u64::from(samples), tolerated, delta).unwrap();
        let (each, _) = certify(&means, 1, u64::from(samples), tolerated, delta).unwrap();
        broken += u32::from(chain[3..].iter().chain(&each[3..]).any(|&certified| certified));
        useful += u32::from(chain[1] && each[0]);
    }
    assert!(broken <= 200, "{broken} of 2,000");
    assert!(useful > 1_800, "{useful} of 2,000 certify a clearly good setting");
}

#[test]
fn p_values_fall_with_the_mean_and_with_more_samples() {
    assert!(p_value(0.0, 10, 0.1) > p_value(0.0, 100, 0.1));
    assert!(p_value(0.05, 1_000, 0.1) < p_value(0.08, 1_000, 0.1));
    assert!((p_value(0.1, 1_000, 0.1) - 1.0).abs() < 1e-12);
    assert!((p_value(0.0, 1, 0.5) - 0.5).abs() < 1e-12, "one success at a coin's chance");
    assert!(certify(&[1.5], 1, 10, 0.1, 0.1).is_err());
}
