//! The batch evaluation and the sweep against the rule written down token by token.

use ndarray::{Array2, ArrayView2, array};
use proptest::prelude::*;
use sedac_core::accumulator::{Outcome, Risk, Rule, evaluate};
use sedac_core::sweep::{Grid, sweep};

#[derive(Debug, PartialEq)]
struct Decided {
    exits: Vec<i32>,
    confidence: Vec<u32>,
    width: Vec<u32>,
    unusable: u64,
}

fn fast<R: Risk>(rule: &Rule, risks: ArrayView2<'_, R>) -> Decided {
    let tokens = risks.dim().1;
    let (mut exits, mut confidence, mut width) = (vec![9; tokens], vec![9.0; tokens], vec![9.0; tokens]);
    let outcome = Outcome { exit_checkpoint: &mut exits, confidence: &mut confidence, width: &mut width };
    let unusable = evaluate(rule, risks, outcome).unwrap();
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    Decided { exits, confidence: bits(confidence), width: bits(width), unusable }
}

/// The rule as its definition reads, one token after another.
fn slow(thresholds: &[f32], weights: &[f32], gamma: f32, level: f32, risks: &Array2<f32>) -> Decided {
    let mut decided = Decided { exits: vec![], confidence: vec![], width: vec![], unusable: 0 };
    for token in risks.columns() {
        let (mut margin, mut greatest, mut exit, mut width) = (0.0_f32, 0.0_f32, thresholds.len(), 1.0_f32);
        let mut confidence = 0.0_f32;
        for (i, &risk) in token.iter().enumerate() {
            let q = risk / thresholds[i];
            let trusted = risk >= 0.0 && q < f32::INFINITY;
            let gain = if trusted { ((1.0 - level) - level * q) / (1.0 + q) } else { -level };
            margin = gamma * margin + weights[i] * gain;
            greatest = gamma * greatest + weights[i];
            decided.unusable += u64::from(risk.is_nan() || risk < 0.0 || risk == f32::INFINITY);
            if exit == thresholds.len() {
                confidence = margin + level * greatest;
                if margin > 0.0 {
                    exit = i;
                    width = (1.0 - margin / ((1.0 - level) * greatest)).clamp(0.0, 1.0);
                }
            }
        }
        decided.exits.push(exit as i32);
        decided.confidence.push(confidence.to_bits());
        decided.width.push(width.to_bits());
    }
    decided
}

fn awkward() -> impl Strategy<Value = f32> {
    let special = [0.0, -0.0, 1.0, 0.8, f32::MIN_POSITIVE, 1e-45, 1e-40, f32::MAX, f32::INFINITY, f32::NAN, -1.0];
    prop_oneof![2 => 0.0_f32..3.0, 1 => prop::sample::select(special.to_vec()), 1 => any::<f32>()]
}

fn threshold() -> impl Strategy<Value = f32> {
    prop_oneof![3 => 0.0_f32..3.0, 1 => prop::sample::select(vec![0.0, 1.0, 0.8, 1e-45, f32::MAX, f32::INFINITY])]
}

prop_compose! {
    fn case()(checkpoints in 0_usize..5, tokens in prop_oneof![0_usize..40, Just(16_385)])
        (thresholds in prop::collection::vec(threshold(), checkpoints),
         weights in prop::collection::vec(0.1_f32..4.0, checkpoints),
         pattern in prop::collection::vec(awkward(), 1..(checkpoints * 50).max(2)),
         shape in Just((checkpoints, tokens)),
         gamma in prop_oneof![Just(0.0_f32), 0.0_f32..1.5], level in prop_oneof![Just(0.5_f32), 0.01_f32..0.99])
        -> (Vec<f32>, Vec<f32>, f32, f32, Array2<f32>) {
        let risks = Array2::from_shape_fn(shape, |(i, token)| pattern[(i + token * shape.0) % pattern.len()]);
        (thresholds, weights, gamma, level, risks)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_batch_decides_like_each_token_alone((thresholds, weights, gamma, level, risks) in case()) {
        let expected = slow(&thresholds, &weights, gamma, level, &risks);
        let rule = Rule::new(thresholds, weights, gamma, level).unwrap();
        prop_assert_eq!(fast(&rule, risks.view()), expected);
    }

    #[test]
    fn strided_and_half_precision_risks_decide_like_their_f32_copy((thresholds, weights, gamma, level, risks) in case()) {
        let rule = Rule::new(thresholds, weights, gamma, level).unwrap();
        let turned = Array2::from_shape_fn((risks.dim().1, risks.dim().0), |(token, i)| risks[[i, token]]);
        prop_assert_eq!(fast(&rule, turned.t()), fast(&rule, risks.view()));
        let half = risks.mapv(half::f16::from_f32);
        prop_assert_eq!(fast(&rule, half.view()), fast(&rule, half.mapv(f32::from).view()));
        let brain = risks.mapv(|risk| half::bf16::from_f32(risk).to_bits());
        let widened = brain.mapv(|bits| f32::from(half::bf16::from_bits(bits)));
        prop_assert_eq!(fast(&rule, brain.view()), fast(&rule, widened.view()));
    }

    #[test]
    fn gamma_zero_and_level_one_half_are_risk_under_threshold(risk in awkward(), threshold in threshold()) {
        let rule = Rule::new(vec![threshold], vec![1.0], 0.0, 0.5).unwrap();
        let exits = fast(&rule, array![[risk]].view()).exits == [0];
        prop_assert_eq!(exits, (0.0..f32::INFINITY).contains(&risk) && risk < threshold);
    }

    #[test]
    fn a_sweep_counts_what_single_evaluations_count(
        (thresholds, weights, gamma, level, risks) in case(), other in prop::collection::vec(threshold(), 4)
    ) {
        let (checkpoints, tokens) = risks.dim();
        let rows = [thresholds.clone(), other[..checkpoints].to_vec(), thresholds];
        let grid = Array2::from_shape_fn((3, checkpoints), |(row, i)| rows[row][i]);
        let (gammas, levels) = ([0.0, gamma, 0.9], [level, 0.3]);
        let target = Array2::from_shape_fn((checkpoints, tokens), |(i, token)| (i * 7 + token % 13) as f32);
        let grid = Grid::new(grid.view(), weights.clone(), gammas.to_vec(), levels.to_vec()).unwrap();
        if checkpoints == 0 {
            return Ok(());
        }
        let swept = sweep(&grid, risks.view(), Some(target.view())).unwrap();
        for (index, row) in (0..18).zip(rows.iter().flat_map(|row| [row; 6])) {
            let (gamma, level) = (gammas[index / 2 % 3], levels[index % 2]);
            let rule = Rule::new(row.clone(), weights.clone(), gamma, level).unwrap();
            let exits = fast(&rule, risks.view()).exits;
            let mut counts = vec![0; checkpoints];
            let mut sum = 0.0;
            for (token, &exit) in exits.iter().enumerate().filter(|(_, exit)| **exit < checkpoints as i32) {
                counts[exit as usize] += 1;
                sum += f64::from(target[[exit as usize, token]]);
            }
            prop_assert_eq!(&swept.exits[index * checkpoints..][..checkpoints], &counts);
            prop_assert!((swept.target[index] - sum).abs() <= 1e-5 * sum);
        }
    }
}

#[test]
fn a_batch_for_many_threads_decides_like_its_parts() {
    let risks = Array2::from_shape_fn((3, 300_001), |(i, token)| ((token * 7919 + i * 104_729) % 1000) as f32 / 400.0);
    let rule = Rule::new(vec![0.3, 0.7, 1.1], vec![1.0, 2.0, 1.0], 0.6, 0.55).unwrap();
    let whole = fast(&rule, risks.view());
    for start in (0..300_001).step_by(997) {
        let part = fast(&rule, risks.slice_axis(ndarray::Axis(1), (start..(start + 997).min(300_001)).into()));
        assert_eq!(part.exits, whole.exits[start..start + part.exits.len()]);
    }
}

#[test]
fn settings_outside_their_domain_are_refused_by_name() {
    let message = |rule: Result<Rule, sedac_core::Error>| rule.unwrap_err().to_string();
    assert_eq!(message(Rule::new(vec![-1.0], vec![1.0], 0.0, 0.5)), "thresholds must be from 0 to infinity, found -1");
    assert!(message(Rule::new(vec![f32::NAN], vec![1.0], 0.0, 0.5)).contains("found NaN"));
    assert!(message(Rule::new(vec![1.0], vec![0.0], 0.0, 0.5)).starts_with("weights must be positive"));
    assert!(message(Rule::new(vec![1.0], vec![1.0], -0.1, 0.5)).starts_with("gamma"));
    assert!(message(Rule::new(vec![1.0], vec![1.0], 0.0, 1.0)).starts_with("level"));
    assert_eq!(message(Rule::new(vec![1.0], vec![1.0; 2], 0.0, 0.5)), "weights must have shape [1], found [2]");
}
